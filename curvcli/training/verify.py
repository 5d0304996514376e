"""Whether a schedule's locks hold on a model: identities where locked, alive where they train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from curvcli.errors import CurvError
from curvcli.inputs.blocks import find_blocks
from curvcli.results import Finding, Schedule
from curvcli.training.warmup import ArchitectureWarmup


def lock_problems(schedule: Schedule, model: nn.Module, loss: Callable[[], Tensor], *, step: int) -> list[Finding]:
    """What would go wrong with this schedule on this model; empty where nothing does.

    First the blocks that train at `step` are looked at with the weights as they are: one that gets no
    gradient is dead. Then, for a schedule that grows, the blocks it locks first are made identities, which
    changes the model, and a forward pass must go through them unchanged.

    Args:
        loss: a forward pass through `model` to a scalar.
        step: the global step whose locks the weights should have.
    """
    blocks = find_blocks(model)
    if blocks is None or len(blocks.modules) != schedule.depth:
        depth = len(blocks.modules) if blocks else 0
        return [_error("depth", f"the schedule is for {schedule.depth} blocks, the model has {depth}")]
    found: list[Finding] = []
    model.zero_grad()
    loss().backward()
    for index in sorted(frozenset(range(schedule.depth)) - schedule.locked_at(step)):
        matrices = {n: p for n, p in blocks.modules[index].named_parameters() if p.dim() >= 2 and p.requires_grad}
        if matrices and not any(p.grad is not None and bool(p.grad.any()) for p in matrices.values()):
            found.append(
                _error("dead-block", f"block {index} trains at step {step} and gets no gradient: its weights are zero")
            )
    model.zero_grad()
    if schedule.mode == "grow":
        try:
            start = schedule.phases[0].step
            warmup = ArchitectureWarmup(model, torch.optim.SGD(model.parameters(), lr=0.0), schedule)
            warmup.step(start)
            with torch.no_grad():
                loss()
            warmup.detach()
        except CurvError as error:
            found.append(_error("no-identity", str(error)))
    return found


def _error(code: str, message: str) -> Finding:
    return Finding(code=code, severity="error", message=message)
