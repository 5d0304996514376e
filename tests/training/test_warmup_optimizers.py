"""Architecture warm-up and the tracker with optimizers whose state or step is of another form than Adam's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import galore
import pytest
import torch
from torch import Tensor, nn
from warmup_job import GROW, TOTAL, batch, block_of, build, weights

from curvcli.training import ArchitectureWarmup, CurvatureTracker

pytestmark = pytest.mark.slow


def adam_mini(model: nn.Module) -> torch.optim.Optimizer:
    module = pytest.importorskip("adam_mini")
    return module.Adam_mini(model.named_parameters(), lr=1e-2, weight_decay=0.1, dim=16, n_heads=2, verbose=False)


def projected(ours: bool) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda m: galore.make(galore.groups(list(m.named_parameters()), "std", rank=4), ours, lr=1e-2, weight_decay=0.1)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Adam-mini": adam_mini,
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters(), weight_decay=0.1),
    "GaLore, ours": projected(True),
    "GaLore": projected(False),
}


def causal(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_locked_stays_still_then_learns_and_rho_is_known_throughout(kind: str) -> None:
    model = build()
    optimizer = OPTIMIZERS[kind](model)
    warmup = ArchitectureWarmup(model, optimizer, GROW)
    tracker = CurvatureTracker(model, optimizer, causal, probe=[batch(99)], max_hvps=60)
    warmup.step(0)  # which makes what a locked block adds 0
    start, records = weights(model), {}
    for step in range(TOTAL):
        warmup.step(step)
        causal(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (3, TOTAL - 1):
            records[step] = tracker.step(step)
        if step == 3:
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, start[name]) is (block_of(name) in (2, 3)), name
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, start[name]), name
    for record in records.values():
        assert (record.status, record.message) == ("converged", None)
        assert record.rho > 0
