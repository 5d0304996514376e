"""A schedule that names the blocks and the resting parameters of one model, for jobs that obey it without curv."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from curvcli.checkpoints import open_checkpoint
from curvcli.documents import Resting, Schedule
from curvcli.errors import UsageError
from curvcli.files.names import unwrapped
from curvcli.models.blocks import find_blocks
from curvcli.training.locks import find_locks


def with_names(schedule: Schedule, model: nn.Module) -> Schedule:
    """The schedule with `blocks` and, where it grows by zero outputs, `resting`: what is done to this model, by name.

    Names are those of `named_parameters()` without the parts of torch.compile's and DistributedDataParallel's wrappers.

    Raises:
        UsageError: the model has another depth.
        UnsupportedError: no output projection is known in its blocks.
    """
    blocks = find_blocks(model)
    depth = len(blocks.modules) if blocks else 0
    if blocks is None or depth != schedule.depth:
        raise UsageError(
            f"the schedule is for depth {schedule.depth}, the model has {depth} blocks",
            hint=f"make one with curv schedule --depth {depth}" if depth else "train it without a schedule",
        )
    resting = None
    if schedule.lock == "zero-output":
        # By identity, since a lock knows its parameters by their names within the block.
        names = {id(parameter): unwrapped(name) for name, parameter in model.named_parameters()}
        resting = [
            Resting(name=names[id(parameter)], block=lock.index, value=value)
            for lock in find_locks(blocks)
            for _, parameter, value in lock.resting
        ]
    paths = [f"{blocks.prefix}.{i}" for i in range(depth)]
    return Schedule.model_validate({**dict(schedule), "blocks": paths, "resting": resting})


def with_names_of(schedule: Schedule, checkpoint: Path) -> Schedule:
    """The same for the model of a checkpoint. Raises InputError where that cannot be built."""
    return with_names(schedule, open_checkpoint(checkpoint).model())
