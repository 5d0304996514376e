"""A measurement that runs out of time: what it gives is right, what it lacks is a status, and it does stop."""

from __future__ import annotations

import itertools

import models
import pytest
import torch

from curvcli import analyze
from curvcli.curvature import davidson, lanczos
from curvcli.documents import Report
from curvcli.errors import OutOfTime


class Clock:
    """Stands in for `time`; every look at it moves it on by a second."""

    def __init__(self) -> None:
        self.looks = 0

    def monotonic(self) -> float:
        self.looks += 1
        return float(self.looks)


def measure(deadline: float, **changes: object) -> Report:
    batches = models.data()
    model = models.Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    models.train(model, optimizer, batches)
    settings = {"weights": models.weights(batches), "mode": "fresh", "tolerance": 1e-5, "max_hvps": 400, "truncated": True}
    settings.update(changes)
    return analyze(model, models.loss, batches, optimizer, deadline=deadline, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole() -> Report:
    return measure(float("inf"))


@pytest.mark.slow
def test_whatever_the_deadline_what_converged_is_right(whole: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"nothing": 0, "partly": 0, "whole": 0}
    for deadline in itertools.chain(range(1, 130, 3), range(130, 5000, 90)):
        clock = Clock()
        monkeypatch.setattr(lanczos, "time", clock)
        monkeypatch.setattr(davidson, "time", clock)
        try:
            report = measure(deadline)
        except OutOfTime:
            seen["nothing"] += 1
            continue
        names = [len(part) for part in (report.layers, report.cumulative.restricted, report.cumulative.truncated)]
        assert names == [3, 4, 4], "an entry for everything, measured or not"
        mine = [report.full, *report.layers, *report.cumulative.restricted, *report.cumulative.truncated]
        true = [whole.full, *whole.layers, *whole.cumulative.restricted, *whole.cumulative.truncated]
        for estimate, right in zip(mine, true, strict=True):
            if estimate.status == "converged":
                assert estimate.eigenvalue == pytest.approx(right.eigenvalue, rel=1e-3)
            else:
                assert estimate.status in ("unconverged", "skipped", "inconsistent")
            assert (estimate.eigenvalue is None) == (estimate.status == "skipped")
        if report.full.status != "converged":
            assert report.verdict in ("unresolved", "early")
        skipped = sum(estimate.status == "skipped" for estimate in mine)
        assert any(f.code == "out-of-time" for f in report.findings) == bool(skipped)
        seen["partly" if skipped else "whole"] += 1
        # Past the deadline a solve ends at once: at most its start vectors are still multiplied.
        assert skipped == 0 or clock.looks <= deadline + 3
        if not skipped and report.update.status != "skipped" and clock.looks < deadline:
            break
    assert min(seen.values()) >= 1, seen
    assert seen["partly"] >= 10


def test_the_full_model_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first deadline that gives anything, it gives the full model and no layer."""
    for deadline in range(1, 1000, 2):
        clock = Clock()
        monkeypatch.setattr(lanczos, "time", clock)
        monkeypatch.setattr(davidson, "time", clock)
        try:
            report = measure(deadline)
        except OutOfTime:
            continue
        assert report.full.eigenvalue is not None
        assert {layer.status for layer in report.layers} == {"skipped"}
        return
    pytest.fail("no deadline gave a report")


def test_an_interrupt_keeps_the_full_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """OutOfTime from anywhere, as the alarm raises it, past the full model: it stays."""

    def interrupt(stage: str, done: float) -> None:
        if stage == "layer 1":
            raise OutOfTime

    report = measure(1e300, progress=interrupt)
    assert report.full.status == "converged"
    assert [layer.status for layer in report.layers] == ["converged", "skipped", "skipped"]
    assert report.update.status == "ok"
