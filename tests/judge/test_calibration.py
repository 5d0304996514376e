"""The calibration: what follows from its coefficients by hand, and what must hold whatever they are fitted to."""

from __future__ import annotations

import importlib.util
import json
from importlib.resources import files
from itertools import product
from math import exp, inf, log, sqrt
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ASSETS, ROOT
from pydantic import ValidationError
from tracks import at, track

from curvcli.documents import Estimate, Generalisation, Optimizer, Report, Rule, load_report
from curvcli.judge import calibration as module
from curvcli.judge.calibration import (
    Bracket,
    Calibration,
    bracket_of,
    calibrated,
    calibration,
    odds,
    settled_after,
    stable_lr,
    too_early,
    uncovered,
)
from curvcli.judge.findings import explain
from curvcli.judge.gate import judge as judge_rules
from curvcli.judge.limits import changed
from curvcli.judge.readings import ReportReadings, past
from curvcli.judge.verdict import judge

OPTIMIZERS = ("AdamW", "Adam", "SGD", "NAdam", "Adagrad")
FIXED = {
    "source": {
        "command": "fit", "runs": 9, "ramps": 5, "families": ["a"], "parameters": [10, 1000], "tokens_per_batch": [8, 256],
        "optimizers": ["AdamW", "SGD"],
    },
    "edge": {
        "adaptive": {"low": 1.0, "middle": 2.0, "high": 8.0, "confidence": 0.9, "ramps": 3},
        "sgd": {"low": 0.5, "middle": 1.0, "high": 1.5, "confidence": 0.9, "ramps": 2},
    },
    "odds": {
        "adaptive": {"intercept": 0.0, "slope": 1.0, "runs": 5}, "sgd": {"intercept": 1.0, "slope": 2.0, "runs": 4},
    },
    "edge_from": 0.1, "stable_below": 0.3, "hot_from": 0.6, "unstable_from": 0.7, "early_steps": 12,
}  # fmt: skip


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """Coefficients with which one can reckon in one's head."""
    found = Calibration.model_validate(FIXED)
    monkeypatch.setattr(module, "calibration", lambda: found)
    return found


def estimate(
    rho: float | None, *, residual: float = 0.0, status: Any = "converged", ceiling: float | None = None
) -> Estimate:
    return Estimate(
        eigenvalue=None if rho is None else 100 * rho, rho=rho, residual=None if rho is None else residual,
        most_negative=None, most_negative_residual=None, most_negative_status=None, hvps=1, status=status, ceiling=ceiling,
    )  # fmt: skip


def held(low: float | None, high: float | None) -> Generalisation:
    return Generalisation(held_out=low, rho_low=low, rho_high=high)


def optimizer(**changes: object) -> Optimizer:
    values = {
        "name": "AdamW", "lr": 0.1, "lr_source": "checkpoint", "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0,
        "momentum": None, "step": 100, "threshold": 100.0, "preconditioner": "checkpoint",
    }  # fmt: skip
    return Optimizer.model_validate({**values, **changes})


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_read_and_says_where_it_is_from() -> None:
    text = (files("curvcli.judge") / "calibration.json").read_text()
    assert json.loads(calibration().to_json())["edge"] == json.loads(text)["edge"]
    assert calibration().source.command.startswith("python benchmarks/")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("edge.adaptive.low", 3.0),
        ("edge.sgd.low", 0.0),
        ("odds.sgd.slope", -1.0),
        ("hot_from", 1.0),
        ("hot_from", 0.2),
        ("unstable_from", 0.5),
        ("early_steps", 0),
    ],
)
def test_coefficients_that_make_no_sense_are_refused(where: str, value: float) -> None:
    found = json.loads(json.dumps(FIXED))
    *parents, last = where.split(".")
    at = found
    for parent in parents:
        at = at[parent]
    at[last] = value
    with pytest.raises(ValidationError):
        Calibration.model_validate(found)


def test_a_group_without_coefficients_is_refused() -> None:
    with pytest.raises(ValidationError, match="adaptive and sgd"):
        Calibration.model_validate({**FIXED, "odds": {"sgd": FIXED["odds"]["sgd"]}})


def test_the_page_has_the_coefficients_of_the_file() -> None:
    spec = importlib.util.spec_from_file_location("write_calibration", ROOT / "docs" / "write_calibration.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    text = writer.PAGE.read_text()
    assert writer.page(text) == text, "run python docs/write_calibration.py"
    for edge in json.loads((files("curvcli.judge") / "calibration.json").read_text())["edge"].values():
        assert f"{edge['low']:g} to {edge['high']:g}" in text


# --- the largest stable learning rate --------------------------------------------------------------------------------


def test_the_learning_rate_by_hand(fixed: Calibration) -> None:
    exact = stable_lr(0.1, Bracket(4.0, 4.0, 4.0), "AdamW")
    assert (exact.value, exact.low, exact.high) == pytest.approx((0.05, 0.025, 0.2))
    assert (exact.ratio, exact.confidence, exact.group) == (pytest.approx(2.0), 0.9, "adaptive")
    # Distances from the middle in logarithms: ln 2 and ln 4 of the edge, ln 2 and ln 3 of rho.
    wide = stable_lr(0.1, Bracket(4 / 3, 4.0, 8.0), "AdamW")
    assert wide.low == pytest.approx(0.05 * exp(-sqrt(log(2) ** 2 + log(2) ** 2)))
    assert wide.high == pytest.approx(0.05 * exp(sqrt(log(4) ** 2 + log(3) ** 2)))
    assert stable_lr(0.1, Bracket(-1.0, 4.0, 4.0), "AdamW").high is None, "rho of the data may be 0: nothing bounds it"


def test_an_optimizer_that_no_run_had_gets_the_widest_ends(fixed: Calibration) -> None:
    found = stable_lr(1.0, Bracket(1.0, 1.0, 1.0), "NAdam")
    assert (found.low, found.value, found.high, found.group) == (0.5, 2.0, 8.0, "all")
    assert uncovered("NAdam", 500, 0.5) == ["NAdam (the runs had AdamW, SGD)"]
    assert uncovered("SGD", 1001, 0.5) == ["1,001 parameters (the runs had 10 to 1,000)"]
    assert uncovered("SGD", 1000, 0.1) == uncovered("AdamW", 10, 5.0) == []
    assert uncovered("SGD", 1000, 0.09) == ["rho below 0.1, where curvature can still grow by decades"]
    assert odds(2.0, "NAdam") == odds(2.0, "AdamW"), "of the widest group"


RHO = st.floats(1e-6, 1e6)
FACTOR = st.floats(1.0, 1e3)


@settings(max_examples=200)
@given(lr=st.floats(1e-8, 10), rho=RHO, below=FACTOR, above=FACTOR, name=st.sampled_from(OPTIMIZERS))
def test_the_interval_holds_the_value_and_widens_with_the_bracket(
    lr: float, rho: float, below: float, above: float, name: str
) -> None:
    found, exact = (stable_lr(lr, b, name) for b in (Bracket(rho / below, rho, rho * above), Bracket(rho, rho, rho)))
    assert 0 < found.low <= found.value <= found.high
    assert found.low <= exact.low * (1 + 1e-9)
    assert found.high >= exact.high * (1 - 1e-9)
    assert found.ratio * found.value == pytest.approx(lr)


@settings(max_examples=200)
@given(rhos=st.tuples(RHO, RHO), name=st.sampled_from(OPTIMIZERS))
def test_a_larger_rho_means_a_smaller_rate_and_worse_odds(rhos: tuple[float, float], name: str) -> None:
    small, large = sorted(rhos)
    rates = [stable_lr(1e-3, Bracket(rho, rho, rho), name) for rho in (small, large)]
    for end in ("low", "value", "high"):
        assert getattr(rates[0], end) >= getattr(rates[1], end)
    assert 0 <= odds(small, name) <= odds(large, name) <= 1


@given(rho=RHO, lr=st.floats(1e-8, 10), times=st.floats(0.1, 10), name=st.sampled_from(OPTIMIZERS))
def test_the_rate_does_not_depend_on_where_on_the_ramp_it_was_measured(
    rho: float, lr: float, times: float, name: str
) -> None:
    here, there = stable_lr(lr, Bracket(rho, rho, rho), name), stable_lr(lr * times, Bracket(*3 * [rho * times]), name)
    assert there.value == pytest.approx(here.value)


@pytest.mark.parametrize("rho", [1e-320, 1e-303, 1e-300, 1e300])
def test_numbers_past_any_range_give_no_learning_rate_or_one_that_can_be_written(rho: float) -> None:
    for lr, name in product((1e-300, 1e-3, 1.0, 1e300), OPTIMIZERS):
        found = stable_lr(lr, Bracket(rho, rho, rho), name)
        assert found is None or 0 < found.low <= found.value < inf


def test_odds_by_hand(fixed: Calibration) -> None:
    assert odds(1.0, "AdamW") == 0.5
    assert odds(3.0, "AdamW") == pytest.approx(0.75)
    assert odds(1.0, "SGD") == pytest.approx(1 / (1 + exp(-1)))
    assert odds(0.0, "AdamW") is odds(-1.0, "SGD") is None


# --- what of a measurement it rests on -------------------------------------------------------------------------------


def test_the_bracket_is_that_of_the_data_else_that_of_the_solve() -> None:
    assert bracket_of(estimate(2.0), held(1.0, 3.0), 100.0) == Bracket(1.0, 2.0, 3.0)
    assert bracket_of(estimate(2.0), held(2.5, 3.0), 100.0) == Bracket(2.0, 2.0, 3.0)
    assert bracket_of(estimate(2.0, residual=10.0), held(None, None), 100.0) == Bracket(2.0, 2.0, 2.1)
    assert bracket_of(estimate(2.0, residual=10.0, ceiling=250.0), held(None, 2.6), 100.0) == Bracket(2.0, 2.0, 2.5)
    for none in (estimate(2.0, status="unconverged"), estimate(None, status="skipped"), estimate(0.0), estimate(-1.0)):
        assert bracket_of(none, held(1.0, 3.0), 100.0) is None


def test_what_has_no_learning_rate_says_none(fixed: Calibration) -> None:
    def of(rho: Estimate, doubts: bool = False, **changes: object) -> tuple[bool, ...]:
        found = calibrated(rho, held(1.0, 3.0), optimizer(**changes), step=100, parameters=5, doubts=doubts)
        return found.early, found.stable_lr is not None, found.odds is not None

    assert of(estimate(2.0)) == (False, True, True)
    assert calibrated(estimate(2.0), held(1.0, 3.0), optimizer(), step=1, parameters=5).stable_lr.uncovered
    assert of(estimate(2.0), preconditioner="estimated", step=None) == (False, False, False)
    assert of(estimate(2.0), doubts=True) == of(estimate(2.0), doubts=True, step=3) == (False, False, False)
    assert of(estimate(-2.0)) == of(estimate(2.0, status="unconverged")) == (False, False, False)
    assert of(estimate(2.0), step=3) == (True, False, False)
    assert of(estimate(2.0), gradient_ratio=4.0) == (False, False, False)
    assert of(estimate(2.0), step=3, gradient_ratio=4.0) == (
        True,
        False,
        False,
    )  # young moments are as young where they are short
    assert of(estimate(None, status="non-finite"), step=3) == of(estimate(2.0), threshold=None, step=3) == (False,) * 3


@pytest.mark.parametrize(
    ("step", "moments", "betas", "momentum", "early"),
    [
        (0, 0, (0.9, 0.999), None, True),
        (500, 11, (0.9, 0.999), None, True),  # a restart with fresh moments
        (500, 12, (0.9, 0.999), None, False),
        (3, 500, (0.9, 0.999), None, False),  # weights that are counted anew, moments that are not
        (19, 19, (0.95, 0.999), None, True),
        (20, 20, (0.95, 0.999), None, False),
        (11, None, None, None, True),
        (12, None, None, 0.9, False),
        (99, None, None, 0.99, True),
        (100, None, None, 0.99, False),
        (None, None, None, None, False),
        (12, None, (1.0, 1.0), None, False),
    ],
)
def test_too_early(
    fixed: Calibration, step: int, moments: int, betas: tuple[float, float], momentum: float, early: bool
) -> None:
    assert too_early(step, moments, betas, momentum) is early


@given(st.integers(0, 10**6), st.floats(0, 0.999), st.floats(0, 0.999))
def test_what_is_old_enough_stays_so(step: int, beta: float, momentum: float) -> None:
    settled = settled_after((beta, 0.999), momentum)
    assert settled >= calibration().early_steps
    assert too_early(step, None, (beta, 0.999), momentum) == (step < settled)


# --- the verdict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "odds", "verdict"),
    [
        (1.0, 3.0, 0.61, "hot"),
        (1.0, 3.0, 0.59, "unresolved"),
        (1.0, 3.0, None, "unresolved"),
        (0.5, 3.0, 0.9, "hot"),
        (0.5, 1.0, 0.31, "edge"),  # of two verdicts neither is unstable
        (0.5, 1.0, 0.29, "unresolved"),
        (0.5, 1.0, None, "unresolved"),
        (1.3, 3.0, 0.71, "unstable"),
        (1.3, 3.0, 0.69, "hot"),
        (1.3, 3.0, None, "unstable"),
        (0.9, 1.2, 0.9, "edge"),
        (0.1, 0.7, 0.29, "stable"),
        (0.1, 0.7, 0.31, "edge"),
        (0.1, 0.7, None, "stable"),
    ],
)
def test_odds_and_the_limits_make_the_verdict(
    fixed: Calibration, monkeypatch: pytest.MonkeyPatch, low: float, high: float, odds: float | None, verdict: str
) -> None:
    monkeypatch.setattr("curvcli.judge.verdict.calibration", lambda: fixed)
    assert judge(estimate(high), held(low, high), odds=odds) == verdict
    assert judge(estimate(high), held(low, high), odds=odds, early=True) == "early"
    assert judge(estimate(high, status="unconverged"), held(low, high), odds=odds) == "unresolved"


def test_a_change_to_a_hot_verdict_is_a_warning() -> None:
    assert [changed(verdict) for verdict in ("unstable", "hot", "early", "stable")] == ["error", "warning", "info", "info"]


@pytest.fixture
def report() -> Report:
    return load_report(ASSETS / "hot-60.gate.report.json")


def said(report: Report, **changes: object) -> Report:
    """The report with the findings that its numbers have now."""
    new = report.model_copy(update=changes)
    return new.model_copy(update={"findings": explain(new, idle=0, left_out=0, notes={})})


def test_the_headline_says_why_it_is_early(report: Report, fixed: Calibration) -> None:
    young = said(report, verdict="early", optimizer=report.optimizer.model_copy(update={"step": 3}))
    assert (young.findings[0].code, young.findings[0].severity) == ("early", "info")
    assert "the optimizer has made 3 steps, and before step 12" in young.findings[0].message
    no_count = said(
        report, verdict="early", optimizer=report.optimizer.model_copy(update={"step": None}),
        checkpoint=report.checkpoint.model_copy(update={"step": 1}),
    )  # fmt: skip
    assert "the run has made 1 step," in no_count.findings[0].message


def test_the_headline_says_how_hot_it_is(report: Report) -> None:
    hot = said(report, verdict="hot", odds=0.63)
    assert (hot.findings[0].code, hot.findings[0].severity) == ("hot", "warning")
    assert "rho 1.51" in hot.findings[0].message
    assert "63%" in hot.findings[0].message


# --- the gate --------------------------------------------------------------------------------------------------------


def outcome(report: Report, name: str, limit: float | None) -> tuple[str, str]:
    (found,) = judge_rules([Rule(name=name, limit=limit, source="test")], ReportReadings(report))
    return found.outcome, found.message


@pytest.mark.parametrize("rule", ["max-rho", "max-layer-rho", "max-lr-ratio", "max-surge"])
def test_an_early_report_neither_passes_nor_breaks(report: Report, rule: str) -> None:
    young = said(report, verdict="early", stable_lr=None, optimizer=report.optimizer.model_copy(update={"step": 3}))
    for limit in (1e-9, 1e9):
        found, message = outcome(young, rule, limit)
        assert found == "unresolved"
        assert "too early" in message


def test_the_ratio_of_learning_rates_is_held_against_its_interval(report: Report, fixed: Calibration) -> None:
    lr = report.optimizer.lr
    found = stable_lr(lr, Bracket(4.0, 4.0, 4.0), "AdamW")  # lr is twice it, 4 times its low end, half its high one
    new = report.model_copy(update={"stable_lr": found})
    assert [outcome(new, "max-lr-ratio", limit)[0] for limit in (0.49, 0.51, 2.0, 3.9, 4.1)] == [
        "broken", "unresolved", "unresolved", "unresolved", "passed",
    ]  # fmt: skip
    open_above = report.model_copy(update={"stable_lr": found.model_copy(update={"high": None})})
    assert [outcome(open_above, "max-lr-ratio", limit)[0] for limit in (1e-9, 4.1)] == ["unresolved", "passed"]
    assert outcome(report, "max-lr-ratio", 1.0)[0] == "unresolved", "a document of before has none"


def test_points_that_are_too_early_are_no_past(report: Report) -> None:
    points = [at(report, step) for step in (1, 20, 40)]
    points[0] = points[0].model_copy(update={"verdict": "early"})
    assert [r.checkpoint.step for r in past(track(points).points, 5)] == [20, 40]


def test_what_the_odds_keep_from_being_stable_is_unresolved_where_rho_may_be_too_high(fixed: Calibration) -> None:
    """A loss that has leapt looks like clipping: a rho that is `edge` by its odds is not made `stable` by not knowing."""
    for rho, verdict in ((0.7, "unresolved"), (0.1, "stable")):
        found, generalisation = estimate(rho), held(rho / 8, rho)
        told = calibrated(found, generalisation, optimizer(gradient_ratio=4.0, batch_ratio=8.0), step=100, parameters=5)
        assert judge(found, generalisation, odds=told.odds, odds_at_most=told.odds_at_most) == verdict
