"""Which blocks train when: orders, groups, phases, and the schedule from depth alone. Pure functions, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from curvcli.documents import Finding, LockRule, LrSchedule, Phase, Schedule, ScheduleProvenance, Versions
from curvcli.errors import UsageError, counted
from curvcli.schedules.lr import lr_at

GROUPS, INTERVAL, WARMUP = 4, 500, 2000
PlannedOrder = Literal["last", "interleaved"]


def grow(
    depth: int,
    *,
    warmup_steps: int = WARMUP,
    total_steps: int | None = None,
    start: int | None = None,
    groups: int | None = None,
    interval: int = INTERVAL,
    order: PlannedOrder = "last",
    lr: LrSchedule | None = None,
) -> Schedule:
    """Default of arXiv 2606.16768: half the depth until warm-up ends, then a group every `interval` steps.

    Args:
        depth: blocks of the model.
        warmup_steps: step at which the first group joins.
        total_steps: steps of the run, where known; every group has to join before.
        start: blocks that train from step 0; half of them by default.
        groups: how many groups the others join in; 4 by default, fewer where fewer blocks are locked.
        order: which blocks are locked at the start (see `joining`).
        lr: only written into the document; nothing is predicted from it.

    Raises:
        UsageError: the numbers leave nothing to lock, nothing to train, or no room for the groups.
    """
    start = depth // 2 if start is None else start
    if start < 1:
        raise UsageError(
            f"{start} of {depth} blocks would train at the start", hint="at least 1 must: pass --start, or a larger --depth"
        )
    if start >= depth:
        raise UsageError(
            f"all {depth} blocks would train from the start, so there is nothing to schedule",
            hint=f"pass a --start of 1 to {depth - 1}" if depth > 1 else "a model of one block has no architecture warm-up",
        )
    if warmup_steps < 1:
        raise UsageError("the first group would join at step 0, with the others", hint="pass --warmup-steps of 1 or more")
    active, queue = joining(depth, start, order)
    parts = split(queue, groups)
    steps = [0, *(warmup_steps + i * interval for i in range(len(parts)))]
    within(steps, total_steps)
    return Schedule(
        mode="grow",
        depth=depth,
        order=order,
        blocks=None,
        lock="zero-output",
        rule=LockRule(),
        margin=None,
        lr_schedule=lr,
        phases=phases(active, parts, steps=steps, interval=interval, lr=lr),
        findings=[_unmeasured("nothing says that it fits this model; pass --from report.json to plan from its curvature")],
        provenance=ScheduleProvenance(report=None, report_sha256=None, checkpoint=None, versions=Versions.installed()),
    )


def gated(
    depth: int, *, open_at: int | None = None, total_steps: int | None = None, lr: LrSchedule | None = None
) -> Schedule:
    """Residual gates that open in proportion to depth, after arXiv 2603.05369: all blocks train from the start.

    Args:
        depth: blocks of the model.
        open_at: step at which the last gate is open; default where `grow`'s last group joins by default.
        total_steps: steps of the run, where known; every gate has to be open before.
        lr: only written into the document.

    Raises:
        UsageError: `open_at` leaves no step to a gate, or lies past the end of the run.
    """
    open_at = WARMUP + (GROUPS - 1) * INTERVAL if open_at is None else open_at
    # By whole steps the first gates would be at step 0, which is no gate.
    if open_at < depth:
        raise UsageError(
            f"{depth} gates cannot open one after the other by step {open_at}", hint=f"pass --gate-steps of at least {depth}"
        )
    if total_steps is not None and open_at >= total_steps:
        raise UsageError(
            f"the last gate would be open at step {open_at}, and the run ends at {total_steps}",
            hint="pass a smaller --gate-steps",
        )
    return Schedule(
        mode="grow",
        depth=depth,
        order="last",
        blocks=None,
        lock="residual-gate",
        gates=[open_at * (index + 1) // depth for index in range(depth)],
        margin=None,
        lr_schedule=lr,
        phases=phases(range(depth), [], steps=[0], interval=0, lr=lr),
        findings=[_unmeasured("nothing says that gates help this model")],
        provenance=ScheduleProvenance(report=None, report_sha256=None, checkpoint=None, versions=Versions.installed()),
    )


def joining(depth: int, start: int, order: PlannedOrder) -> tuple[list[int], list[int]]:
    """The `start` blocks that train at first, and the others in the order in which they join.

    last: the last ones are locked and join bottom up; interleaved: those that train are spread evenly (every second one at
    half the depth), the others join bottom up. Locking the first ones made training worse at every learning rate tried
    (benchmarks/README.md): schedules that do are read and obeyed, and not made.
    """
    if order == "last":
        return list(range(start)), list(range(start, depth))
    active = [i * depth // start for i in range(start)]
    return active, [block for block in range(depth) if block not in set(active)]


def split(queue: Sequence[int], groups: int | None) -> list[list[int]]:
    """The queue in consecutive groups whose sizes differ by at most one. Raises UsageError where one would be empty."""
    if not queue:
        return []
    count = min(GROUPS, len(queue)) if groups is None else groups
    if count > len(queue):
        raise UsageError(
            f"{counted(len(queue), 'locked block')} cannot make {counted(count, 'group')}",
            hint=f"pass --groups of at most {len(queue)}",
        )
    cuts = [i * len(queue) // count for i in range(count + 1)]  # whole numbers: no rounding loses or doubles a block
    return [list(queue[a:b]) for a, b in pairwise(cuts)]


def within(steps: Sequence[int], total_steps: int | None) -> None:
    """Raises UsageError where a step lies past the end of the run."""
    if total_steps is not None and steps[-1] >= total_steps:
        raise UsageError(
            f"the last group would join at step {steps[-1]}, and the run ends at {total_steps}",
            hint="pass a smaller --interval, fewer --groups or a shorter --warmup-steps",
        )


def phases(
    active: Sequence[int],
    parts: Sequence[Sequence[int]],
    *,
    steps: Sequence[int],
    interval: int,
    lr: LrSchedule | None,
    rho: Callable[[int, int], float] | None = None,
) -> list[Phase]:
    """The phases in which `parts` join `active`, at `steps` (the first phase's step before them).

    Args:
        interval: how long after its step the last phase may begin in adaptive mode; others end with the next one's.
        rho: prediction for a number of active blocks at a step.
    """
    found: list[Phase] = []
    now = sorted(active)
    for number, (step, part) in enumerate(zip(steps, [[], *parts], strict=True)):
        # Interleaved blocks join between those that train.
        now = sorted({*now, *part})
        following = steps[number + 1] if number + 1 < len(steps) else step + interval
        found.append(
            Phase(
                step=step,
                # In adaptive mode each may wait until the next would join; the first has nothing to wait for.
                latest=following if number else step,
                active=now,
                unlock=sorted(part),
                lr=lr_at(lr, step) if lr else None,
                predicted_rho=rho(len(now), step) if rho else None,
            )
        )
    return found


def _unmeasured(what: str) -> Finding:
    message = f"planned from depth alone: nothing was measured, and {what}"
    return Finding(code="not-measured", severity="info", message=message)
