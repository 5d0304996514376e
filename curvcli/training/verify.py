"""`curv schedule verify`: whether a schedule fits a checkpoint's model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.base import Checkpoint
from curvcli.data.tasks import causal_loss
from curvcli.documents import Finding, Schedule
from curvcli.errors import CurvError
from curvcli.models.blocks import find_blocks
from curvcli.training.naming import with_names
from curvcli.training.warmup import ArchitectureWarmup


def problems(schedule: Schedule, path: Path) -> list[Finding]:
    """Why the schedule does not fit the checkpoint that a path means; empty where it does.

    Raises InputError where the checkpoint cannot be read or its model not be built.
    """
    checkpoint = open_checkpoint(path)
    model = checkpoint.model()
    found = [*phase_problems(schedule), *structure_problems(schedule, checkpoint, model)]
    if found:
        return found
    # Any tokens will do: only gradients and identities are checked, not the loss.
    vocabulary = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)
    ids = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    return lock_problems(schedule, model, lambda: causal_loss(model, ids), step=checkpoint.step or schedule.phases[0].step)


def phase_problems(schedule: Schedule) -> list[Finding]:
    """Blocks that no phase reaches, and phases past the end of the run."""
    found: list[Finding] = []
    last = schedule.phases[-1]
    never = sorted(set(range(schedule.depth)) - set(last.active))
    if never:
        found.append(
            _problem("never-unlocked", f"no phase unlocks block {', '.join(map(str, never))}; add a last one that does")
        )
    total = schedule.lr_schedule.total_steps if schedule.lr_schedule else None
    for phase in schedule.phases:
        if total is not None and phase.step >= total:
            found.append(
                _problem(
                    "past-the-end",
                    f"the phase at step {phase.step} begins after the run's {total} steps; "
                    "make the schedule again with this --total-steps",
                )
            )
    if total is not None and schedule.gates and max(schedule.gates) >= total:
        found.append(
            _problem(
                "past-the-end",
                f"the last gate is open at step {max(schedule.gates)}, after the run's {total} steps; "
                "make the schedule again with this --total-steps",
            )
        )
    return found


def structure_problems(schedule: Schedule, checkpoint: Checkpoint, model: nn.Module) -> list[Finding]:
    """A depth or block paths other than the model's."""
    blocks = find_blocks(model)
    if blocks is None:
        return [_problem("no-blocks", f"{checkpoint.architecture} has no stack of blocks; train it without a schedule")]
    names = [f"{blocks.prefix}.{i}" for i in range(len(blocks.modules))]
    if len(names) != schedule.depth:
        return [
            _problem(
                "other-depth",
                f"the schedule is for {schedule.depth} blocks, and the model has {len(names)} ({blocks.prefix}); "
                f"make the schedule again for depth {len(names)}",
            )
        ]
    pairs = zip(schedule.blocks or names, names, strict=True)
    found = [
        _problem(
            "other-block", f"block {i} is {said} in the schedule and {name} in the model; make it from this model's report"
        )
        for i, (said, name) in enumerate(pairs)
        if said != name
    ]
    if not found and schedule.resting is not None and schedule.resting != with_names(schedule, model).resting:
        found.append(
            _problem("other-resting", "the tensors that rest are others in this model; make the schedule anew with --for")
        )
    return found


def lock_problems(schedule: Schedule, model: nn.Module, loss: Callable[[], Tensor], *, step: int) -> list[Finding]:
    """Blocks that could not learn, and blocks that could not be locked.

    A block that trains at `step` and gets no gradient is dead. Where the schedule grows, the blocks that it
    locks first are made identities, which changes the model, and a forward pass must go through them unchanged; or through
    its gates.

    Args:
        model: with the checkpoint's weights, in depth as the schedule has it.
        loss: a forward pass through `model` to a scalar.
        step: the checkpoint's global step.
    """
    blocks = find_blocks(model)
    assert blocks is not None  # noqa: S101  (structure_problems has said so)
    found: list[Finding] = []
    model.zero_grad()
    loss().backward()
    for index in sorted(frozenset(range(schedule.depth)) - schedule.locked_at(step)):
        matrices = [p for p in blocks.modules[index].parameters() if p.dim() >= 2 and p.requires_grad]
        if matrices and not any(p.grad is not None and bool(p.grad.any()) for p in matrices):
            found.append(
                _problem(
                    "dead-block",
                    f"block {index} trains at step {step} and no gradient reaches it: its matrices are zero; "
                    "initialise it with zero output projections only",
                )
            )
    model.zero_grad()
    if schedule.mode == "grow":
        try:
            # A warm-up needs an optimizer; this one never steps.
            warmup = ArchitectureWarmup(model, torch.optim.SGD(model.parameters(), lr=0.0), schedule)
            warmup.step(schedule.phases[0].step)
            with torch.no_grad():
                loss()
            if schedule.gates:
                warmup.step(max(schedule.gates))  # all open: to let go of them half open warns
            warmup.detach()
        except CurvError as error:
            found.append(_problem("no-identity", str(error)))
    return found


def _problem(code: str, message: str) -> Finding:
    return Finding(code=code, severity="error", message=message)
