"""A disk that fills while vectors lie on it: what was solved until then is right, and the rest says why it is not there."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from tiny import build
from typer.testing import CliRunner

from curvcli import analyze
from curvcli.analysis.cache import MemoryCache
from curvcli.analysis.explain import explain
from curvcli.analysis.plan import Sizes, predicted
from curvcli.analysis.track import track
from curvcli.cli.app import app
from curvcli.curvature import resources
from curvcli.documents import Report
from curvcli.errors import FullDiskError
from curvcli.judge.readings import ReportReadings

GIB = 2**30
BASIS = 50


class Disk:
    """Has room for so many files, and says what was asked of it when it is full."""

    def __init__(self, files: float) -> None:
        self.files, self.asked = files, 0

    def posix_fallocate(self, descriptor: int, offset: int, size: int) -> None:
        self.asked += 1
        if self.asked > self.files:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.truncate(descriptor, size)


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Disk]:
    """Vectors lie on a disk with room for so many files."""
    plan = predicted(Sizes(0, 1, 1, 1, 0, 32), "fresh", 32, BASIS, offload=True)
    monkeypatch.setattr(resources, "return_blocks", lambda: True)
    monkeypatch.setattr("curvcli.analysis.api.fitted", lambda problem, *rest, **how: (problem, plan))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def made(files: float) -> Disk:
        disk = Disk(files)
        monkeypatch.setattr(os, "posix_fallocate", disk.posix_fallocate)
        return disk

    return made


def measure(**changes: Any) -> Report:
    batches = models.data()
    model = models.Net(blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"weights": models.weights(batches), "mode": "fresh", "truncated": True, "memory": GIB}
    return analyze(model, models.loss, batches, optimizer, **(settings | changes))


def entries(report: Report) -> list[Any]:
    curves = report.cumulative
    return [report.full, report.ends, *report.layers, *curves.restricted, *curves.truncated]


def test_wherever_the_disk_fills_what_converged_is_right(filled: Callable[[float], Disk]) -> None:
    disk = filled(float("inf"))
    whole = entries(measure())
    seen = {"nothing": 0, "unresolved": 0, "partly": 0}
    for files in itertools.chain(range(8), range(8, disk.asked, 7)):
        filled(files)
        try:
            report = measure()
        except FullDiskError:
            seen["nothing"] += 1
            assert files < 8
            continue
        found = entries(report)
        for estimate, right in zip(found, whole, strict=True):
            if estimate.status == "converged":
                assert estimate.eigenvalue == pytest.approx(right.eigenvalue, rel=3e-2)
            elif estimate.status == "unconverged":
                assert estimate.eigenvalue <= right.eigenvalue * (1 + 1e-6), "a lower bound"
            else:
                assert estimate.status == "skipped"
        told = {f.code: f.message for f in report.findings}
        assert "out-of-time" not in told
        if all(estimate.status == "converged" for estimate in found):  # the vector it had no room for was not needed
            assert "disk-full" not in told
            continue
        assert told["disk-full"].startswith("the disk was full: cannot keep ")
        assert "set TMPDIR" in told["disk-full"]
        skipped = sum(estimate.status == "skipped" for estimate in found)
        assert (f"; {skipped} of {len(found) - 1} layers and depths were not measured, " in told["disk-full"]) == (
            skipped > 0
        )
        if report.full.status == "unconverged":
            assert (report.verdict, report.update.status) == ("unresolved", "skipped")
            assert "the disk was full: set TMPDIR" in told["unresolved-residual"]
            assert 0 < report.full.hvps < BASIS
            seen["unresolved"] += 1
        else:
            seen["partly"] += 1
        assert not any("--budget" in f.message for f in report.findings)
    assert min(seen.values()) >= 3, seen


def test_folds_are_of_the_products_that_were_made(filled: Callable[[float], Disk], monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector that the disk had room for, and its product's sum had none."""
    filled(float("inf"))
    sizes: list[tuple[int, int]] = []
    from curvcli.curvature.folds import Folds

    theirs = Folds.__init__

    def made(self: Folds, weights: Any, matrices: Any) -> None:
        sizes.append((matrices.shape[1], int((matrices.abs().sum(dim=(0, 1)) > 0).sum())))
        theirs(self, weights, matrices)

    monkeypatch.setattr(Folds, "__init__", made)
    for files in range(10, 14):
        filled(files)
        report = measure()
        assert sizes[-1] == (report.full.hvps, report.full.hvps)


def test_a_gate_says_why_there_is_no_number(filled: Callable[[float], Disk]) -> None:
    filled(12)
    report = measure(depths=False, truncated=None)
    assert report.full.status == "unconverged"
    reason = ReportReadings(report).update_ratio().reason
    assert reason is not None
    assert reason.startswith("it was not measured, the disk was full: cannot keep ")
    assert "--budget" not in reason
    filled(float("inf"))
    assert "disk-full" not in {f.code for f in measure(depths=False, truncated=None).findings}


def test_the_command_line_says_where_and_what_to_do(filled: Callable[[float], Disk], run: Path, tmp_path: Path) -> None:
    command = ["analyze", str(run), "--device", "cpu", "--memory", "1G", "--no-depths", "--quiet", "--tokens", "64"]
    filled(0)
    nothing = CliRunner().invoke(app, command)
    assert nothing.exit_code == 2
    assert f"of vectors in {tmp_path}: No space left on device" in nothing.stderr
    assert "set TMPDIR to a folder on another disk, or give it more --memory" in " ".join(nothing.stderr.split())
    filled(12)
    partly = CliRunner().invoke(app, [*command, "--format", "markdown"])
    assert partly.exit_code == 0
    assert "disk-full" in partly.stdout


@pytest.mark.slow
def test_a_report_that_the_disk_cut_short_is_not_kept(filled: Callable[[float], Disk], run: Path) -> None:
    cache = MemoryCache()
    settings: dict[str, Any] = {"cache": cache, "memory": "1G", "device": "cpu", "tokens": 64, "sequence_length": 16}
    filled(12)
    (cut,) = track(run.parent, **settings).points
    filled(float("inf"))
    (whole,) = track(run.parent, **settings).points
    (kept,) = track(run.parent, **settings).points
    assert cut.report is not None
    assert "disk-full" in {f.code for f in cut.report.findings}
    assert (whole.source, kept.source) == ("measured", "cached")


@pytest.mark.slow
@pytest.mark.parametrize(("left", "status", "removals"), [(None, "unconverged", 0), (2, "converged", 1)])
def test_what_was_explained_until_then_stands(
    left: int | None, status: str, removals: int, filled: Callable[[float], Disk], tmp_path: Path
) -> None:
    place = tmp_path / "small"
    build().save_pretrained(place)
    np.save(place / "data.npy", np.random.default_rng(0).integers(0, 50, (12, 17)))
    how: dict[str, Any] = {"data": place / "data.npy", "device": "cpu", "memory": "1G", "optimizer": "SGD", "lr": 0.5}
    disk = filled(float("inf"))
    whole = explain(place, **how)
    filled(8 if left is None else disk.asked - left)
    found = explain(place, **how)
    (said,) = [f.message for f in found.findings if f.code in ("disk-full", "out-of-time")]
    assert said.startswith("the disk was full: cannot keep ")
    assert said.endswith("; set TMPDIR to a folder on another disk, or give it more --memory")
    assert found.estimate.status == status
    assert len(whole.removals) == 2
    assert found.removals == whole.removals[:removals]
