"""The learning rate over steps: the lambdas of transformers.get_scheduler, without importing it.

`step` is the 0-based global step whose update uses the learning rate. The oracle is transformers 5.23
(tests/schedules/test_lr.py compares every step); its source is transformers/optimization.py.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left, bisect_right
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from curvcli.documents import LrSchedule
from curvcli.errors import InputError, UsageError
from curvcli.files.parse import read_limited


def lr_at(schedule: LrSchedule, step: int) -> float:
    """Learning rate of the update at a global step.

    Raises UsageError before the first point of a schedule from a file.
    """
    if schedule.points is not None:
        last = bisect_right(schedule.points, step, key=lambda point: point[0])
        if not last:
            raise UsageError(
                f"no learning rate is known at step {step}: the file's first is at {schedule.points[0][0]}",
                hint=f"add a line for step {step} or one before it",
            )
        return schedule.points[last - 1][1]
    return schedule.peak * _factor(schedule, step)


def _factor(schedule: LrSchedule, step: int) -> float:
    """Learning rate over peak, as the lambda of that kind computes it."""
    warmup, least, total = schedule.warmup_steps, schedule.min_ratio, schedule.total_steps or 0
    if step < warmup:
        rise = step / warmup
        # Only wsd begins its warm-up at its least rate.
        return rise * (1 - least) + least if schedule.kind == "wsd" else rise
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "inverse-sqrt":
        # transformers' time scale where there is no warm-up to take it from.
        scale = warmup or 10_000
        return 1 / math.sqrt((step - warmup + scale) / scale)
    if schedule.kind == "wsd":
        decay = schedule.decay_steps or 0
        if step < total - decay:
            return 1.0
        if step >= total:
            return least
        # Of no decay steps nothing comes here: the two tests before are of one and the same step.
        return _half_cosine((step - (total - decay)) / decay) * (1 - least) + least
    if schedule.kind == "linear":
        return max(0.0, (total - step) / (total - warmup)) * (1 - least) + least
    return _half_cosine((step - warmup) / (total - warmup)) * (1 - least) + least


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def settles(schedule: LrSchedule, limit: float, start: int) -> int | None:
    """First step, from `start` and the end of warm-up on, after which the learning rate stays at most `limit`.

    None where there is none before the schedule's end; one without an end goes on as it ends.
    """
    start = max(start, schedule.warmup_steps)
    if schedule.points is not None:
        points = [p for p in schedule.points if schedule.total_steps is None or p[0] < schedule.total_steps]
        over = [i for i, (_, lr) in enumerate(points) if lr > limit]
        if over and over[-1] + 1 == len(points):
            return None
        step = max(start, points[over[-1] + 1][0]) if over else start
        return step if schedule.total_steps is None or step < schedule.total_steps else None
    # Past warm-up every formula falls or stays, so bisection finds the crossing.
    steps = range(start, schedule.total_steps or start + 1)
    index = bisect_left(steps, -limit, key=lambda step: -lr_at(schedule, step))
    return steps[index] if index < len(steps) else None


def highest_from(schedule: LrSchedule, start: int) -> float:
    """Largest learning rate at `start` or after it."""
    if schedule.points is not None:
        end = math.inf if schedule.total_steps is None else schedule.total_steps
        return max([lr_at(schedule, start), *(lr for step, lr in schedule.points if start <= step < end)])
    # Every formula is highest where its warm-up ends, and falls or stays from there on.
    return lr_at(schedule, max(start, schedule.warmup_steps))


def lr_schedule(
    kind: str,
    *,
    peak: float | None,
    warmup_steps: int | None = None,
    total_steps: int | None = None,
    min_ratio: float | None = None,
    decay_steps: int | None = None,
) -> LrSchedule:
    """A learning rate schedule from what a user gives: a kind, or the path of a file with columns step and lr.

    Of a file, `peak` is its largest rate, and `warmup_steps` by default the step that first reaches it.
    Raises UsageError where the values contradict each other, InputError where the file is no such table.
    """
    given: dict[str, Any] = {"kind": kind, "peak": peak, "warmup_steps": warmup_steps, "total_steps": total_steps}
    if kind.lower().endswith(".csv"):
        if peak is not None:
            raise UsageError(f"both --lr and {kind} give learning rates", hint="drop --lr")
        points = read_points(Path(kind))
        top = max(lr for _, lr in points)
        first = next(step for step, lr in points if lr == top)
        given |= {"kind": "csv", "peak": top, "points": points}
        given["warmup_steps"] = first if warmup_steps is None else warmup_steps
    elif kind not in KINDS:
        raise UsageError(
            f"{kind!r} is no learning rate schedule", hint=f"one of: {', '.join(KINDS)}, or a file ending in .csv"
        )
    elif peak is None:
        raise UsageError(f"the {kind} schedule has no learning rate", hint="pass the peak with --lr")
    given["warmup_steps"] = given["warmup_steps"] or 0
    if min_ratio is not None:
        given["min_ratio"] = min_ratio
    if decay_steps is not None:
        given["decay_steps"] = decay_steps
    try:
        return LrSchedule(**given)
    except ValidationError as error:
        first_error = error.errors()[0]
        where = ".".join(str(part) for part in first_error["loc"])
        # The validators' own words, without what pydantic puts before them.
        reason = str(first_error.get("ctx", {}).get("error", first_error["msg"]))
        raise UsageError(
            f"no such learning rate schedule: {f'{where}: ' if where else ''}{reason}",
            hint="see --lr-schedule, --lr, --warmup-steps, --total-steps, --decay-steps and --min-lr-ratio in --help",
        ) from error


_MOST = 2**24  # bytes of a table of learning rates: half a million lines
KINDS = ("constant", "linear", "cosine", "wsd", "inverse-sqrt")


def read_points(path: Path) -> list[tuple[int, float]]:
    """(step, lr) of a table with these columns; others are ignored. Raises InputError, which names the line."""
    fix = "write a header step,lr and then one line for each change, steps rising"
    points: list[tuple[int, float]] = []
    try:
        # Line ends are csv's to read, as within quotes; a space after the comma is what people type.
        table = csv.DictReader(StringIO(read_limited(path, _MOST).decode(), newline=""), skipinitialspace=True)
        if not {"step", "lr"} <= set(table.fieldnames or ()):
            raise InputError(f"{path} line 1 has no columns step and lr", hint=fix)
        for row in table:
            where = f"{path} line {table.line_num}"
            try:
                step, lr = int(row["step"]), float(row["lr"])
            except (TypeError, ValueError):
                raise InputError(f"{where} is no step and lr: {row['step']!r:.40}, {row['lr']!r:.40}", hint=fix) from None
            if step < 0 or not 0 <= lr < math.inf:
                raise InputError(f"{where} has step {step}, lr {lr}", hint="both must be finite and not negative")
            if points and step <= points[-1][0]:
                raise InputError(f"{where}: step {step} does not come after {points[-1][0]}", hint=fix)
            points.append((step, lr))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}", hint=fix) from error
    if not any(lr > 0 for _, lr in points):
        raise InputError(f"{path} holds no positive learning rate", hint=fix)
    return points
