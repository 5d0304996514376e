"""What a measurement is said to cost, held against what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import build, run_of

from curvcli.analysis import solve
from curvcli.analysis.cache import FileCache
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.analysis.estimate import estimate_checkpoint, estimate_run
from curvcli.analysis.plan import WANTED
from curvcli.analysis.stages import products
from curvcli.analysis.track import track_run
from curvcli.curvature import resources
from curvcli.errors import UsageError

OPTIONS = Options(tokens=256, mode="kept", depths=False, device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("run"), 1, 2, 3)


@pytest.mark.slow
def test_the_prediction_is_within_a_factor_of_four(run: Path) -> None:
    """Of a network this small, whose products take milliseconds, the solver's own work is the larger part."""
    options = replace(OPTIONS, tokens=128)
    for _ in range(3):  # both are times on a clock, which other work on the machine moves
        found = estimate_checkpoint(run / "checkpoint-3", options)
        report = analyze_checkpoint(run / "checkpoint-3", options)
        if 0.25 < found["seconds"] / report.cost.seconds < 4:
            break
    assert 0.25 < found["seconds"] / report.cost.seconds < 4
    assert (found["mode"], found["device"]) == (report.cost.mode, report.cost.device)
    assert found["checkpoint"] == report.checkpoint.path
    assert found["products"] == products(2, depths=False)


def test_memory_is_that_of_the_parameters_the_graphs_and_the_vectors(run: Path) -> None:
    size = 4 * sum(p.numel() for p in build().parameters())
    kept = estimate_checkpoint(run / "checkpoint-3", OPTIONS)["memory_bytes"]
    fresh = estimate_checkpoint(run / "checkpoint-3", replace(OPTIONS, mode="fresh", batch_size=4))["memory_bytes"]
    assert (kept["parameters"], fresh["parameters"]) == (size, size)
    assert 0 < kept["basis"] <= WANTED * size  # weights that never had a gradient are left out
    assert kept["graphs"] == 4 * fresh["graphs"], "16 windows in batches of 4: all graphs are kept, or one"


def test_a_limit_of_memory_is_planned_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "return_blocks", lambda: True)
    found = estimate_checkpoint(run / "checkpoint-3", replace(OPTIONS, memory=2**40))
    assert found["plan"].startswith("of 1024.00 GiB: kept graphs, batches of ")
    assert "plan" not in estimate_checkpoint(run / "checkpoint-3", OPTIONS)
    with pytest.raises(UsageError, match=r"GiB of memory at least, the limit is 0\.00 GiB"):
        estimate_checkpoint(run / "checkpoint-3", replace(OPTIONS, memory=2**20))


def test_nothing_is_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve.Measurement, "run", lambda *_: pytest.fail("it was measured"))
    assert estimate_checkpoint(run / "checkpoint-3", OPTIONS)["seconds"] > 0


def test_more_is_said_to_cost_more() -> None:
    counts = [products(8, depths=False), products(8), products(8, truncated=True), products(16, truncated=True)]
    assert counts == sorted(set(counts))
    assert products(0) < counts[0]


@pytest.mark.slow
def test_of_a_run_what_is_kept_costs_nothing(run: Path, tmp_path: Path) -> None:
    cache: Any = FileCache(tmp_path)
    options = replace(OPTIONS, tokens=64, max_hvps=3)
    told: list[str] = []
    before = estimate_run(run, options, cache, progress=lambda stage, done: told.append(stage))
    assert (before["checkpoints"], before["kept"], before["products"]) == (3, 0, 3 * products(2, depths=False))
    assert "one product" in told
    track_run(run, options, cache, last=2)
    after = estimate_run(run, options, cache)
    assert (after["checkpoints"], after["kept"], after["products"]) == (3, 2, products(2, depths=False))
    assert estimate_run(run, options, cache, last=1)["seconds"] == 0
