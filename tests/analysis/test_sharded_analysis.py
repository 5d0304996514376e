"""`analyze` with weights, moments and vectors divided over gloo processes gives what it gives in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
from equal_reports import OPTIMIZERS, same
from ranks import launch

from curvcli import analyze
from curvcli.analysis.api import Estimated, Shard

pytestmark = pytest.mark.slow

# A way of dividing for each optimizer, and a mode that it goes with.
WAYS: dict[str, tuple[Shard, Any]] = {
    "AdamW": ("all", "auto"),
    "SGD with decay": ("vectors", "kept"),
    "estimated": ("all", "forward"),
}


def _measured(name: str, shard: Shard | None) -> dict[str, Any]:
    batches = models.data()
    model = models.Net()
    optimizer = OPTIMIZERS[name](model)
    if optimizer is not None:
        models.train(model, optimizer, batches)
    said: Any = optimizer or Estimated({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
    report = analyze(
        model, models.loss, batches, said, weights=models.weights(batches), tolerance=1e-6, max_hvps=200,
        truncated=True, mode=WAYS[name][1], shard=shard,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(report.to_json())
    return found


def _names(world: int) -> list[str]:
    return list(WAYS)[: 3 if world == 2 else 1]


def _work(rank: int, path: Path) -> None:
    from curvcli.curvature.ranks import Processes, within

    with within(Processes()) as ranks, ranks.together():
        found = {name: _measured(name, WAYS[name][0]) for name in _names(ranks.world)}
    (path / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("world", [2, 4])
def test_a_report_of_divided_tensors_is_that_of_one_process(world: int, tmp_path: Path) -> None:
    launch(_work, tmp_path, world=world)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    for name in _names(world):
        one = _measured(name, None)
        assert one["full"]["status"] == "converged"
        assert one["attribution"]
        for reports in found:
            same(one, reports[name])
            assert reports[name]["cost"]["ranks"] == world
            same(found[0][name], reports[name])
