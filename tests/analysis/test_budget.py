"""What is kept of a time budget, wherever a measurement is when it ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from budgets import late_after
from tiny import run_of
from torch import Tensor

from curvcli import analyze
from curvcli.analysis import checkpoint as opened
from curvcli.analysis import solve, whole
from curvcli.analysis.budget import Budget, measure
from curvcli.analysis.cache import FileCache
from curvcli.analysis.checkpoint import Options, open_for_analysis
from curvcli.analysis.track import track, track_run
from curvcli.documents import Report, TrackPoint
from curvcli.errors import OutOfTime

OPTIONS = Options(tokens=64, mode="kept", depths=False, max_hvps=3)
PLAIN: dict[str, Any] = {"tokens": 64, "mode": "kept", "max_hvps": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("run"), 1, 2, 3)


def trained() -> tuple[models.Net, list[tuple[Tensor, Tensor]], torch.optim.Optimizer]:
    model, batches = models.Net(), models.data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    models.train(model, optimizer, batches)
    return model, batches, optimizer


@pytest.mark.parametrize(
    ("place", "name", "never"),
    [
        (opened, "weight_findings", (opened, "_optimizer")),
        (opened, "_optimizer", (solve, "chosen")),
        (solve, "chosen", (solve, "mean_gradient")),
        (solve, "mean_gradient", (solve, "engine")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_more_is_begun_before_the_full_model(
    run: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, never: tuple[Any, str]
) -> None:
    (deadline,) = late_after(monkeypatch, place, name)
    monkeypatch.setattr(*never, lambda *_, **__: pytest.fail(f"{never[1]} was begun"))
    with pytest.raises(OutOfTime):
        open_for_analysis(run / "checkpoint-3", Options(tokens=64, deadline=deadline)).measure()


def test_past_the_full_model_no_product_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    (deadline,) = late_after(monkeypatch, whole, "folds_of")
    monkeypatch.setattr(solve, "next_update", lambda *_: pytest.fail("the next update was measured"))
    model, batches, optimizer = trained()
    early: list[Report] = []
    report = analyze(
        model, models.loss, batches, optimizer, weights=models.weights(batches), mode="fresh", deadline=deadline,
        truncated=True, on_verdict=early.append,
    )  # fmt: skip
    assert report.full.status == "converged"
    assert report.update.status == "skipped"
    curves = report.cumulative
    assert {part.status for part in (*report.parts, *curves.restricted[:-1], *curves.truncated[:-1])} == {"skipped"}
    assert [curve[-1].eigenvalue for curve in (curves.restricted, curves.truncated)] == [report.full.eigenvalue] * 2
    assert not early, "the report is the verdict"


@pytest.mark.slow
def test_the_alarm_breaks_into_what_looks_at_no_deadline(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    monkeypatch.setattr(opened, "read_data", lambda *_, **__: time.sleep(60))
    report, why = measure(run / "checkpoint-3", {"tokens": 64}, started=started, seconds=0.5)
    assert report is None
    assert "0.5 s ran out (at: reading)" in why
    assert 1.5 <= time.monotonic() - started < 20  # and not 60


@pytest.mark.slow
def test_a_run_goes_on_where_its_budget_ended(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TrackPoint] = []
    real = open_for_analysis

    def late(path: Path, options: Options) -> Any:
        if path.name == "checkpoint-2":
            raise OutOfTime
        return real(path, options)

    with monkeypatch.context() as patch:
        patch.setattr("curvcli.analysis.track.open_for_analysis", late)
        found = track_run(run, OPTIONS, FileCache(tmp_path), on_point=made.append, budget=Budget(3600))
    assert [point.source for point in found.points] == ["measured", "failed", "failed"]
    assert made == found.points[:1]
    (said,) = [finding for finding in found.findings if finding.code in ("out-of-time", "not-measured")]
    assert said.message.startswith("the time budget ran out before 2 of 3 checkpoints")
    assert "--budget" in (found.points[-1].message or "")
    again = track_run(run, OPTIONS, FileCache(tmp_path))
    assert [point.source for point in again.points] == ["cached", "measured", "measured"]


def test_what_is_cut_short_by_the_deadline_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        late_after(patch, whole, "folds_of")
        found = track(run, last=1, cache=FileCache(tmp_path), budget=3600, **PLAIN)
    assert found.points[0].report is not None
    assert found.points[0].report.layers[0].status == "skipped"
    again = track(run, last=1, cache=FileCache(tmp_path), **PLAIN)
    assert again.points[0].source == "measured"
    assert again.points[0].report is not None
    assert again.points[0].report.layers[0].status != "skipped"


def test_a_run_of_which_nothing_was_measured_in_time(run: Path) -> None:
    with pytest.raises(OutOfTime):
        track(run, cache=False, budget=10, started=time.monotonic() - 11, **PLAIN)


def test_the_early_report_has_the_verdict_and_says_nothing_of_time() -> None:
    model, batches, optimizer = trained()
    early: list[Report] = []
    report = analyze(
        model, models.loss, batches, optimizer, weights=models.weights(batches), mode="fresh", on_verdict=early.append
    )
    (first,) = early
    same = ("body", "update", "verdict", "attribution")
    assert [getattr(first, name) for name in same] == [getattr(report, name) for name in same]
    # A part that comes out a trifle above the whole lifts it.
    assert first.full.eigenvalue == pytest.approx(report.full.eigenvalue, rel=1e-3)
    assert {part.status for part in first.parts} == {"skipped"}
    assert {part.status for part in report.parts} == {"converged"}
    assert "out-of-time" not in {finding.code for finding in first.findings}
