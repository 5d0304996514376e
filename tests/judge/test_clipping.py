"""What is said of a rho that clipping may have made too high, and of a gradient that clipping does not explain."""

from __future__ import annotations

from typing import Any

import pytest
from tracks import asset

from curvcli.documents import Report
from curvcli.judge.clipping import clipping_findings, lowest, too_high
from curvcli.judge.findings import explain
from curvcli.judge.readings import ReportReadings
from curvcli.judge.run import judge_run


def clipped(**optimizer: Any) -> Report:
    hot = asset("hot")
    return hot.model_copy(update={"optimizer": hot.optimizer.model_copy(update=optimizer)})


@pytest.mark.parametrize(
    ("ratio", "batch", "clip", "times"),
    [
        (2.9, 9.0, None, 1.0),  # batches are longer than their mean by chance
        (3.1, 9.0, None, 9.0),
        (3.1, None, None, 3.1),
        (30.0, 90.0, 0.03, 1.0),  # rho counts with that already
        (30.0, 90.0, 1.0, 1.0),  # nothing was clipped: the loss has leapt
        (None, None, None, 1.0),
    ],
)
def test_how_much_too_high_rho_may_be(ratio: float | None, batch: float | None, clip: float | None, times: float) -> None:
    assert too_high(clipped(gradient_ratio=ratio, batch_ratio=batch, clip=clip).optimizer) == times


def test_a_layers_bracket_goes_down_to_what_hard_clipping_would_leave() -> None:
    plain, hard = (ReportReadings(clipped(**known)).layers() for known in ({}, {"gradient_ratio": 4.0, "batch_ratio": 8.0}))
    assert [reading.low for reading in hard] == [reading.low / 8 for reading in plain if reading.low is not None]
    assert {reading.narrow for reading in hard} == {"find out how hard gradients were clipped"}


@pytest.mark.parametrize(
    ("clip", "said"),
    [(None, "rho is up to 50 times too high; else data are"), (1.0, "clipping is not why: data are"), (0.05, "")],
)
def test_a_long_gradient_is_a_warning_but_where_clipping_on_record_explains_it(clip: float | None, said: str) -> None:
    found = clipping_findings(clipped(gradient_ratio=20.0, batch_ratio=50.0, clip=clip).optimizer)
    assert [(f.code, f.severity) for f in found] == ([("gradient-over-moments", "warning")] if said else [])
    assert all(said in finding.message for finding in found)


def test_a_lower_end_below_zero_stays() -> None:
    """What rho is lies within its own bracket, also where nothing is convex."""
    optimizer = clipped(gradient_ratio=4.0, batch_ratio=8.0).optimizer
    assert (lowest(4.0, optimizer), lowest(-4.0, optimizer)) == (0.5, -4.0)


@pytest.mark.parametrize(("clip", "said"), [(None, ""), (0.05, ", and rho is times that")])
def test_a_note_says_that_rho_counts_with_clipping_only_where_it_does(clip: float | None, said: str) -> None:
    report = clipped(clip=clip)
    found = explain(report, idle=0, left_out=0, notes={"clipped-moments": "0.05 was left", "other": "as it is"})
    assert {f.code: f.message for f in found if f.code in ("clipped-moments", "other")} == {
        "clipped-moments": f"0.05 was left{said}",
        "other": "as it is",
    }


def test_rho_neither_surges_nor_falls_because_clipping_has_come_on_record() -> None:
    """The same run, measured the same, of whose clipping the first points know nothing yet."""

    def points(*shares: float | None) -> list[Report]:
        hot = [clipped(clip=share) for share in shares]
        scaled = [r.full.model_copy(update={"rho": (r.full.rho or 0.0) * (r.optimizer.clip or 1.0)}) for r in hot]
        tall = [(r.optimizer.threshold or 0.0) / (r.optimizer.clip or 1.0) for r in hot]
        return [
            r.model_copy(update={"full": full, "optimizer": r.optimizer.model_copy(update={"threshold": threshold})})
            for r, full, threshold in zip(hot, scaled, tall, strict=True)
        ]

    for shares, surge in (((None, None, 0.1), 1.0), ((0.1, 0.1, None), 1.0), ((0.2, 0.2, 0.1), 0.5)):
        *before, newest = points(*shares)
        assert ReportReadings(newest, history=before).surge().value == pytest.approx(surge)
        assert ReportReadings(newest, baseline=before[0]).surge().value == pytest.approx(surge)
        assert judge_run([*before, newest]).trend == ("flat" if surge == 1 else "falling")
