"""`analyze` on several gloo processes gives what it gives in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from equal_reports import OPTIMIZERS, same
from ranks import launch

from curvcli import analyze
from curvcli.analysis.api import Estimated

pytestmark = pytest.mark.slow

MODES = {"AdamW": "auto", "SGD with decay": "fresh", "estimated": "forward"}


def _measured(name: str) -> dict[str, Any]:
    batches = models.data()
    model = models.Net()
    optimizer = OPTIMIZERS[name](model)
    if optimizer is not None:
        models.train(model, optimizer, batches)
    said: Any = optimizer or Estimated({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
    report = analyze(
        model, models.loss, batches, said, weights=models.weights(batches), tolerance=1e-6, max_hvps=200,
        truncated=True, mode=MODES[name],  # type: ignore[arg-type]
    )  # fmt: skip
    found: dict[str, Any] = json.loads(report.to_json())
    return found


def _names(world: int) -> list[str]:
    return list(OPTIMIZERS)[: 3 if world == 2 else 1]


def _work(rank: int, path: Path) -> None:
    from curvcli.curvature.ranks import Processes, within

    with within(Processes()) as ranks, ranks.together():
        found = {name: _measured(name) for name in _names(ranks.world)}
    (path / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("world", [2, 4])  # two batches: with four ranks they are halved
def test_a_report_of_many_ranks_is_that_of_one(world: int, tmp_path: Path) -> None:
    launch(_work, tmp_path, world=world)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    for name in _names(world):
        one = _measured(name)
        assert one["full"]["status"] == "converged"
        assert one["generalisation"]["folds"] == 2
        for reports in found:
            same(one, reports[name])
            assert reports[name]["cost"]["ranks"] == world
            same(found[0][name], reports[name])


def _idle(rank: int, path: Path) -> None:
    from curvcli.curvature.ranks import Processes, within

    def loss(model: Any, batch: Any) -> torch.Tensor:  # a batch's is no mean over its rows: it cannot be cut
        logits = model(batch[0])
        return torch.nn.functional.cross_entropy(logits, batch[1]) + logits.std()

    batches = models.data()
    arguments: Any = (models.Net(), loss, batches, None)
    weights = models.weights(batches)
    alone = analyze(*arguments, weights=weights)
    with within(Processes()):
        report = analyze(*arguments, weights=weights)
    assert report.full.eigenvalue == pytest.approx(alone.full.eigenvalue, rel=1e-6)
    (said,) = (finding.message for finding in report.findings if finding.code == "idle-ranks")
    assert said == "2 of 4 ranks had no batch: the shard has 2"


def test_ranks_without_a_batch_wait_and_the_report_says_so(tmp_path: Path) -> None:
    launch(_idle, tmp_path, world=4)


def _other(rank: int, path: Path) -> None:
    from curvcli.curvature.ranks import Processes, within
    from curvcli.errors import UsageError

    model, batches = models.Net(), models.data()
    if rank:
        with torch.no_grad():
            model.embed.weight[0, 0] += 1e-6
    with within(Processes()), pytest.raises(UsageError, match="rank 1 of 2 has other weights, optimizer state or data"):
        analyze(model, models.loss, batches, None, weights=models.weights(batches))


def test_a_rank_with_other_weights_is_named(tmp_path: Path) -> None:
    launch(_other, tmp_path)
