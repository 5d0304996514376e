"""The level of a training job's record, and what to do about it."""

from __future__ import annotations

from typing import Any

import pytest
from logs import record

from curvcli.documents import StableLr
from curvcli.judge.level import alert_of, lower_lr
from curvcli.judge.verdict import verdict_of

OUT = {"gradient_sigmas": 7.5, "gradient_outlier": True}


@pytest.mark.parametrize(
    ("rho", "more", "level", "action"),
    [
        (0.5, {}, "INFO", "go on"),
        (1.0, {}, "INFO", "go on"),
        (1.3, {}, "ERROR", "lower the lr"),
        (1.3, {"odds": 0.5}, "WARN", "lower the lr"),
        (1.3, {"odds": 0.9}, "ERROR", "lower the lr"),
        (40.0, {"early": True}, "INFO", "go on"),
        (40.0, {"early": True, **OUT}, "INFO", "go on"),
        (40.0, {"status": "unconverged"}, "INFO", "go on"),
        (0.5, OUT, "WARN", "go on"),
        (0.5, {"loss_sigmas": 6.5}, "WARN", "go on"),
        (0.5, {"loss_sigmas": 5.5}, "INFO", "go on"),
        (40.0, {"early": True, "loss_finite": False}, "ERROR", "stop"),
        (None, {"status": "failed", "loss_finite": False}, "ERROR", "stop"),
        (1.3, OUT, "ERROR", "lower the lr"),
        (None, {"z": 1.3, "status": "converged"}, "INFO", "go on"),
        (None, {"z": 1.5, "status": "converged"}, "WARN", "go on"),
        (1.3, {"z": 1.5}, "ERROR", "lower the lr"),
        (None, {"status": "failed", "message": "OutOfMemoryError: no"}, "WARN", "go on"),
        (None, {"status": "asymmetric"}, "WARN", "go on"),
        (None, {"status": "failed", "lr": 0.0, "message": "the learning rate is 0"}, "INFO", "go on"),
        (None, {"status": "non-finite", "message": "a weight of the model is NaN or inf"}, "ERROR", "stop"),
    ],
)
def test_level(rho: float | None, more: dict[str, Any], level: str, action: str) -> None:
    alert = alert_of(record(7, rho, **more))
    assert (alert.step, alert.level, alert.action) == (7, level, action)
    assert alert.text
    assert (alert.factor is None) is (action != "lower the lr")


def test_where_to() -> None:
    """To the low end of the largest stable learning rate, else to where rho is stable."""
    plain = alert_of(record(0, 2.0))
    assert plain.lr == pytest.approx(1e-3 * 0.8 / 2.0)
    assert plain.factor == pytest.approx(0.4)
    limit = StableLr(value=5e-4, low=2e-4, high=1e-3, confidence=0.9, ratio=2.0, group="adaptive", uncovered=[])
    assert alert_of(record(0, 2.0, stable_lr=limit)).lr == 2e-4
    above = limit.model_copy(update={"low": 2e-3})
    assert lower_lr(1e-3, 2.0, above) == pytest.approx(4e-4), "lowering never raises"
    assert lower_lr(None, 2.0, limit) is None
    assert lower_lr(1e-3, -1.0, None) is None
    assert lower_lr(1e-3, 0.7, None) is None, "rho is stable there already: 0.8 of it would raise the rate"
    unknown = alert_of(record(0, 2.0, lr=None))
    assert (unknown.action, unknown.lr, unknown.factor) == ("lower the lr", None, None)


@pytest.mark.parametrize(("rho", "verdict"), [(0.1, "unresolved"), (1.0, "edge"), (2.0, "unstable")])
def test_rho_of_some_parameters_makes_no_job_stable(rho: float, verdict: str) -> None:
    """Those that Muon moves have none; that the others are past their edge says enough."""
    assert verdict_of(record(0, rho, sharpness=300.0, z=0.4)) == verdict


def test_both_reasons_are_said() -> None:
    text = alert_of(record(0, 2.0, **OUT)).text
    assert text == "rho is 2: unstable; the gradient's norm is 7.5 standard deviations above the run's own"
