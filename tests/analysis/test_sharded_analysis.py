"""`analyze` with weights, moments and vectors divided over gloo processes gives what it gives in one."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import models
import pytest
import torch
from equal_reports import OPTIMIZERS, same
from fixed_step import fixed_step
from ranks import launch

from curvcli import analyze
from curvcli.analysis.api import Estimated, Shard
from curvcli.curvature import shards
from curvcli.curvature.hvp import Mode
from curvcli.curvature.ranks import Processes, within
from curvcli.curvature.slicewise import Sums
from curvcli.curvature.streaming import Streamed
from curvcli.errors import OutOfTime
from curvcli.optimizers.preconditioner import live

pytestmark = pytest.mark.slow

# A way of dividing for each optimizer, and a mode that it goes with.
WAYS: dict[str, tuple[Shard, Any]] = {
    "AdamW": ("all", "auto"),
    "SGD with decay": ("vectors", "kept"),
    "estimated": ("all", "forward"),
    "SOAP": ("all", "auto"),  # whose P is no matter of entries
    "Lion": ("all", "auto"),  # of which all parameters have a norm, and none a P
    "Muon": ("all", "auto"),
}


def _measured(name: str, shard: Shard | None, told: Callable[[Any], None] | None = None) -> dict[str, Any]:
    batches = models.data()
    model = models.Net()
    optimizer = OPTIMIZERS[name](model)
    if optimizer is not None:
        models.train(model, optimizer, batches)
    said: Any = optimizer or Estimated({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
    report = analyze(
        model, models.loss, batches, said, weights=models.weights(batches), tolerance=1e-6, max_hvps=200,
        truncated=True, mode=WAYS[name][1], shard=shard, on_verdict=told,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(report.to_json())
    return found


def _names(world: int) -> list[str]:
    return list(WAYS) if world == 2 else ["AdamW", "Muon"]


def _work(rank: int, path: Path) -> None:
    with within(Processes()) as ranks, ranks.together():
        told: list[Any] = []  # on rank 0 alone, as where it alone shows a verdict
        show = None if rank else told.append
        found = {name: _measured(name, WAYS[name][0], show) for name in _names(ranks.world)}
    assert len(told) == (0 if rank else len(found))
    (path / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("world", [2, 4])
def test_a_report_of_divided_tensors_is_that_of_one_process(world: int, tmp_path: Path) -> None:
    launch(_work, tmp_path, world=world)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    for name in _names(world):
        one = _measured(name, None)
        assert one["full"]["status"] == "converged" or name == "Lion"
        assert one["attribution"] or name == "Lion"
        assert (one["steepest"] is None) == (name not in ("Lion", "Muon"))
        for reports in found:
            same(one, reports[name])
            assert reports[name]["cost"]["ranks"] == world
            same(found[0][name], reports[name])


def _held() -> int:
    """Bytes of all tensors that Python holds, each storage once; of graphs what they save is not counted."""
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.numel() > 1000]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _peak(shard: Shard | None, mode: Mode = "fresh", blocks: int = 3, products: int = 17) -> int:
    """The most that is held, looked at in every forward pass, when all that a product takes is there.

    Where blocks are gathered one at a time also when one is there, and when its gradients are about to be sent.
    """
    gc.collect()
    gc.freeze()  # of what was imported before there are too many objects to look at
    vocabulary = 500 if mode == "fresh" else 50
    batches = models.data(rows=600, vocab=vocabulary)
    model = models.Net(width=48, vocab=vocabulary, blocks=blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    models.train(model, optimizer, batches, steps=3)
    view = live(optimizer, dict(model.named_parameters()))
    model.zero_grad()
    del optimizer
    seen = [0]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        seen.append(_held())
        return models.loss(model, batch)

    def looking(function: Any) -> Any:
        def looked(*arguments: Any) -> None:
            if function is flush:
                seen.append(_held())
            function(*arguments)
            seen.append(_held())

        return looked

    def enough(report: Any) -> None:
        if mode == "differences":  # of layers there is less
            raise OutOfTime

    bring, flush = Streamed._bring, Sums.flush
    with fixed_step(), patch.object(Streamed, "_bring", looking(bring)), patch.object(Sums, "flush", looking(flush)):
        analyze(
            model, loss, batches, view, weights=models.weights(batches), tolerance=1e-3, max_hvps=products, depths=False,
            mode=mode, shard=shard, on_verdict=enough,
        )  # fmt: skip
    gc.unfreeze()
    assert len(seen) > (100 if mode == "fresh" else 20)
    return max(seen)


def _weighed(rank: int, path: Path, **how: Any) -> None:
    # Of a real model what is sent at once is little. Of this one it would be all, and torch holds it for a moment longer.
    shards.BUCKET = 2**12
    with within(Processes()) as ranks, ranks.together():
        (path / f"{rank}.json").write_text(json.dumps(_peak("all", **how)))


@pytest.mark.parametrize("mode", ["fresh", "differences"])
def test_a_rank_of_four_holds_a_third_of_weights_moments_and_vectors_at_its_peak(mode: Mode, tmp_path: Path) -> None:
    how: Any = {"mode": mode, "blocks": 3 if mode == "fresh" else 12, "products": 17 if mode == "fresh" else 8}
    launch(partial(_weighed, **how), tmp_path, world=4)
    every = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    one = _peak(None, **how)
    # A quarter, and weights, tangents and images as a whole; or all that there is of a block.
    assert 0.2 * one < max(every) < 0.35 * one, (every, one)
