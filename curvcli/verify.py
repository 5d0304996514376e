"""`curv schedule verify`: whether a schedule fits a checkpoint's model."""

from __future__ import annotations

from pathlib import Path

from curvcli.inputs import open_checkpoint
from curvcli.inputs.base import Checkpoint
from curvcli.inputs.blocks import find_blocks
from curvcli.results import Finding, Schedule


def problems(schedule: Schedule, path: Path) -> list[Finding]:
    """Why the schedule does not fit the checkpoint that a path means; empty where it does.

    Raises InputError where the checkpoint cannot be read or its model not be built.
    """
    checkpoint = open_checkpoint(path)
    return [*phase_problems(schedule), *structure_problems(schedule, checkpoint)]


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
    return found


def structure_problems(schedule: Schedule, checkpoint: Checkpoint) -> list[Finding]:
    """A depth or block paths other than the model's."""
    blocks = find_blocks(checkpoint.model())
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
    return [
        _problem(
            "other-block", f"block {i} is {said} in the schedule and {name} in the model; make it from this model's report"
        )
        for i, (said, name) in enumerate(pairs)
        if said != name
    ]


def _problem(code: str, message: str) -> Finding:
    return Finding(code=code, severity="error", message=message)
