"""The tracker in jobs of Lion, and of Muon beside AdamW."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from normalised import Lion, split
from rich.console import Console

import curvcli
from curvcli.documents import Follower, Record
from curvcli.render.watch import curve, screen
from curvcli.training import CurvatureTracker


def job(
    net: models.Net, optimizers: list[torch.optim.Optimizer], tracker: CurvatureTracker | None, batches: list[Any]
) -> Any:
    records = []
    for step in range(1, 5):
        for optimizer in optimizers:
            models.train(net, optimizer, batches, steps=10)
        records.append(tracker.step(step) if tracker else None)
    return records


def made(kind: str, net: models.Net) -> list[torch.optim.Optimizer]:
    if kind == "Lion":
        return [Lion(net.parameters(), lr=0.01)]
    matrices, others = split(net)
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3)]


@pytest.mark.parametrize("kind", ["Lion", "Muon with AdamW"])
def test_records_have_z_and_training_is_untouched(kind: str) -> None:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    alone = copy.deepcopy(net)
    optimizers = made(kind, net)
    tracker = CurvatureTracker(
        net, optimizers if len(optimizers) > 1 else optimizers[0], models.loss, probe=batches,
        weights=models.weights(batches), max_hvps=60,
    )  # fmt: skip
    records = job(net, optimizers, tracker, batches)
    job(alone, made(kind, alone), None, batches)
    for mine, theirs in zip(net.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    report = curvcli.analyze(net, models.loss, batches, optimizers, weights=models.weights(batches), depths=False)
    last = records[-1]
    assert report.steepest is not None
    assert last.status == "converged", last.message
    assert last.dual_norm == pytest.approx(report.steepest.dual_norm)
    # Both are lower bounds of one number, from other starts.
    assert last.z == pytest.approx(report.steepest.z, rel=0.15)
    assert (last.update_ratio is None) == (report.update.ratio is None)
    assert last.update_ratio == pytest.approx(report.update.ratio)
    assert (last.eigenvalue is None) == (kind == "Lion") == (last.rho is None)
    assert (last.stable_lr, last.odds) == (None, None)
    if kind != "Lion":
        assert last.eigenvalue == pytest.approx(report.full.eigenvalue, rel=0.02)
    assert Record.read(last.to_line()) == last


def test_a_kept_direction_is_gone_on_from_and_is_in_the_state() -> None:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    (optimizer,) = made("Lion", net)

    def fresh() -> CurvatureTracker:
        return CurvatureTracker(net, optimizer, models.loss, probe=batches, weights=models.weights(batches), max_hvps=8)

    tracker = fresh()
    first = job(net, [optimizer], tracker, batches)[-1]
    again = tracker.step(5)
    assert again is not None
    assert again.sharpness >= first.sharpness * (1 - 1e-9)
    resumed, cold = fresh(), fresh()
    resumed.load_state_dict(tracker.state_dict())
    warm, new = resumed.step(6), cold.step(6)
    assert warm is not None
    assert new is not None
    assert warm.sharpness >= again.sharpness * (1 - 1e-9)
    assert set(tracker.state_dict()["direction"]) == {n for n, _ in net.named_parameters()}


def test_an_option_that_is_not_known_takes_z_away() -> None:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    (optimizer,) = made("Lion", net)
    models.train(net, optimizer, batches, steps=3)
    optimizer.param_groups[0]["mystery"] = 1
    tracker = CurvatureTracker(net, optimizer, models.loss, probe=batches, weights=models.weights(batches))
    record = tracker.step(1)
    assert record is not None
    assert record.sharpness is not None
    assert record.z is None


def test_watch_shows_z_where_there_is_no_rho(tmp_path: Path) -> None:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    (optimizer,) = made("Lion", net)
    tracker = CurvatureTracker(
        net, optimizer, models.loss, probe=batches, weights=models.weights(batches), log=tmp_path / "a.jsonl"
    )
    records = job(net, [optimizer], tracker, batches)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(screen(Follower(tmp_path / "a.jsonl").poll(), console, tail=3))
    text = console.export_text()
    assert f"Z {records[-1].z:.3g}"[:5] in text
    assert "Z over steps, edge 1" in text
    assert "lambda" not in text
    (drawn,) = curve(tuple(records)).runs
    assert [y for _, y in drawn] == [record.z for record in records]


def test_blocks_to_come_fail_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a normalised optimizer no gradient tells what a locked block's state will be: nothing is foreseen."""
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    (optimizer,) = made("Lion", net)
    models.train(net, optimizer, batches, steps=3)
    tracker = CurvatureTracker(net, optimizer, models.loss, probe=batches, weights=models.weights(batches))
    known = tracker._known(1)
    coming = frozenset(n for n, _ in net.named_parameters() if n.startswith("layers.1."))
    monkeypatch.setattr(tracker, "_known", lambda step: replace(known, coming=coming))
    record = tracker.step(1)
    assert record is not None
    assert record.status != "failed", record.message
    assert tracker.rho_with(coming) is None
