"""What pictures show, as numbers: which values, where, and what each says. Nothing of looks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import nan
from operator import attrgetter

from curvcli.documents import Estimate, Record, Report, Schedule, Track
from curvcli.judge.limits import STABLE_BELOW, UNSTABLE_ABOVE, certified
from curvcli.judge.steepest import alone
from curvcli.render.fit import thin
from curvcli.render.frame import number
from curvcli.render.track_points import Row, axis, part_names, rows
from curvcli.schedules import highest_from, lr_at

Series = tuple[Sequence[float], Sequence[float]]  # places on the axis, and values; NaN where a line breaks
ENDS_AT = -0.5  # left of the layers, each of which stands between two depths
SCHEDULE_POINTS, LOG_POINTS = 600, 1000
# Classes of rho in the map, the verdict's own limits among them.
LIMITS = (0.1, 0.2, 0.4, STABLE_BELOW, UNSTABLE_ABOVE, 2 * UNSTABLE_ABOVE)
LONGEST_NAME = 24
# Fields of a job's record that are drawn as they are.
BESIDE_RHO = (
    "loss", "z", "update_ratio", "gradient_norm", "gradient_quotient", "update_rms", "attention_logit", "attention_entropy",
    "spectral_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A field of the map: the number of the class of its rho, None where it is not certified, and what it says."""

    column: int
    row: int
    kind: int | None
    label: str


@dataclass(frozen=True)
class Heat:
    """The map: a row per part and one for the full model, a column per checkpoint. No value, no cell."""

    parts: list[str]
    steps: list[str]
    cells: list[Cell]
    of: int  # checkpoints that the track has


def newest_columns(found: Heat, most: int) -> Heat:
    """The map of the newest checkpoints, so many at most."""
    left = max(0, len(found.steps) - most)
    kept = [replace(cell, column=cell.column - left) for cell in found.cells if cell.column >= left]
    return replace(found, steps=found.steps[left:], cells=kept)


def report_series(report: Report) -> dict[str, Series]:
    """What is drawn: depth and positive converged lambda of each curve. A log axis has no place for others.

    Sharpness in the optimizer's norm where no parameter has a lambda.
    """

    def pick(items: list[tuple[float, Estimate]]) -> Series:
        kept = [(x, y) for x, e in items if (y := drawn(e)) is not None and y > 0]
        return [x for x, _ in kept], [y for _, y in kept]

    def drawn(estimate: Estimate) -> float | None:
        if alone(report):
            return estimate.steepest.sharpness if estimate.steepest else None
        return estimate.eigenvalue if certified(estimate) else None

    return {
        "embedding, head alone": pick([(ENDS_AT, e) for e in (report.outside,) if e]),
        "layer alone": pick([(e.index + 0.5, e) for e in report.layers]),
        "restricted to depth": pick([(float(e.depth), e) for e in report.cumulative.restricted]),
        "truncated to depth": pick([(float(e.depth), e) for e in report.cumulative.truncated]),
    }


def part_brackets(report: Report) -> list[tuple[float, float, float]]:
    """Place, Ritz value and upper end (the ceiling, or the residual above it) of each bar that is drawn.

    A Ritz value is a lower bound. Sharpness in a norm is one too, and has no upper end.
    """
    if alone(report):
        return []
    found = [(ENDS_AT, e) for e in (report.outside,) if e] + [(e.index + 0.5, e) for e in report.layers]
    return [
        (place, e.eigenvalue, max(e.eigenvalue + e.residual, e.ceiling or 0.0))
        for place, e in found
        if certified(e) and e.eigenvalue is not None and e.residual is not None and e.eigenvalue > 0
    ]


def near_start(report: Report) -> bool:
    """Whether the network is as good as untrained, so that its truncated curve says something of training."""
    return report.checkpoint.step == 0 or report.verdict == "early"


def schedule_series(schedule: Schedule) -> dict[str, Series]:
    """What is drawn, each as steps and values: "depth", and where they are known "lr" and "rho".

    rho follows the learning rate inside a phase, as the prediction does, and jumps where blocks join.
    """
    first, last = schedule.phases[0].step, max([schedule.phases[-1].step, *(schedule.gates or ())])
    lr = schedule.lr_schedule
    # Without a known end, a fifth of the time so far is enough to show the last phase.
    end = lr.total_steps - 1 if lr and lr.total_steps else last + max(1, (last - first) // 5)
    if lr:
        end = max(end, lr.warmup_steps + 1)
    changes = {step for phase in schedule.phases[1:] for step in (phase.step - 1, phase.step)}
    changes.update(schedule.gates or ())
    grid = {first + i * (end - first) // SCHEDULE_POINTS for i in range(SCHEDULE_POINTS + 1)}
    steps = sorted(step for step in {*grid, *changes, *([lr.warmup_steps] if lr else [])} if first <= step <= end)
    # What is behind gates counts by how far they are open.
    depths = [sum(schedule.alphas_at(step)) - len(schedule.locked_at(step)) for step in steps]
    found: dict[str, Series] = {"depth": (steps, depths)}
    if lr is None:
        return found
    rates = [lr_at(lr, step) for step in steps]
    found["lr"] = (steps, rates)
    scale: dict[int, float] = {}
    for index, phase in enumerate(schedule.phases):
        reference = lr_at(lr, phase.step) if index else highest_from(lr, phase.step)
        if phase.predicted_rho is not None and reference > 0:
            scale[index] = phase.predicted_rho / reference
    phases = map(schedule.phase_at, steps)
    known = [(step, rate * scale[n]) for step, rate, n in zip(steps, rates, phases, strict=True) if n in scale]
    if known:
        found["rho"] = ([step for step, _ in known], [rho for _, rho in known])
    return found


def log_series(records: tuple[Record, ...]) -> dict[str, Series]:
    """What is drawn: steps and values of each curve. Curvature that did not converge stands apart.

    A value that is missing is NaN where curves are drawn as lines, so that the line breaks there. A long log is thinned,
    each unbroken run to its first, least, greatest and last values.
    """

    def pick(value: Callable[[Record], float | None], converged: bool | None = None) -> Series:
        chosen = [(r.step, value(r) if converged is None or certified(r) is converged else None) for r in records]
        return _thinned([(step, nan if y is None else y) for step, y in chosen])

    return {
        "rho": pick(lambda r: r.rho, converged=True),
        "rho, not converged": pick(lambda r: r.rho, converged=False),
        "lambda": pick(lambda r: r.eigenvalue, converged=True),
        "threshold": pick(_threshold),
        "lr": pick(lambda r: r.lr),
        "share of time": pick(lambda r: None if r.overhead is None else 100 * r.overhead),
        **{name: pick(attrgetter(name)) for name in BESIDE_RHO},
    }


def _thinned(points: list[tuple[int, float]]) -> Series:
    """Every point of a short line; of a long one those that a reader could tell apart, its breaks kept."""
    if len(points) > 4 * LOG_POINTS:
        kept: list[tuple[int, float]] = []
        for missing, run in groupby(points, key=lambda point: point[1] != point[1]):
            members = list(run)
            share = 1 + LOG_POINTS * len(members) // len(points)
            kept += members[:1] if missing else thin(members, share)
        points = kept
    return [x for x, _ in points], [y for _, y in points]


def unlocks(records: tuple[Record, ...]) -> list[tuple[int, int]]:
    """Where the number of training blocks changed: (first step of the new depth, new depth)."""
    known = [(r.step, r.active_depth) for r in records if r.active_depth is not None]
    return [(step, depth) for (_, before), (step, depth) in pairwise(known) if depth != before]


def track_series(track: Track) -> dict[str, Series]:
    """What is drawn, each as places on the axis and values.

    Lines break (NaN) where there is no value, those of rho and lambda where it is not certified; "rho?" and
    "lambda?" are those that are not to be relied on. "low" and "high" bracket rho on the data behind the shard,
    "surges" are values of rho, and at the places of "failed" nothing could be measured. "lr" and "loss" are of the
    run's log, and where it has none of the checkpoints.
    """
    found = [(row.place, row) for row in rows(track) if row.place is not None]

    def line(value: Callable[[Row], float | None], certified: bool = True) -> Series:
        values = [value(row) if row.certified is certified else None for _, row in found]
        return [place for place, _ in found], [nan if y is None else y for y in values]

    def pick(value: Callable[[Row], float | None], wanted: Callable[[Row], bool] = lambda row: True) -> Series:
        kept = [(place, y) for place, row in found if wanted(row) and (y := value(row)) is not None]
        return [place for place, _ in kept], [y for _, y in kept]

    bracketed = [(place, row) for place, row in found if row.certified and row.low is not None and row.high is not None]
    places = [place for place, _ in bracketed]
    # The log counts steps: it has no place on an axis of checkpoints.
    log = track.log if axis(track) == "step" else []
    rates = [(entry.step, entry.lr) for entry in log if entry.lr is not None]
    losses = [(entry.step, entry.loss) for entry in log if entry.loss is not None]
    return {
        "rho": line(lambda row: row.rho),
        "rho?": pick(lambda row: row.rho, lambda row: not row.certified),
        "low": (places, [row.low for _, row in bracketed if row.low is not None]),
        "high": (places, [row.high for _, row in bracketed if row.high is not None]),
        "surges": pick(lambda row: row.rho, lambda row: row.point.surged),
        "failed": pick(lambda row: 0.0, lambda row: row.report is None),
        "lambda": line(lambda row: row.eigenvalue),
        "lambda?": pick(lambda row: row.eigenvalue, lambda row: not row.certified),
        "threshold": pick(lambda row: row.threshold),
        "z": ([place for place, _ in found], [nan if row.z is None else row.z for _, row in found]),
        "ratio": ([place for place, _ in found], [nan if row.ratio is None else row.ratio for _, row in found]),
        "lr": _unzip(rates) if rates else pick(lambda row: row.lr),
        "loss": _unzip(losses) if losses else pick(lambda row: row.point.training_loss),
    }


def told(row: Row) -> str:
    """A checkpoint's numbers in a line."""
    if row.report is None:
        return f"{row.label}: could not be measured"
    z = "" if row.z is None else f"Z {number(row.z, 3)}, "
    rho = "" if z and row.rho is None else f"rho {number(row.rho, 3)}, lambda {number(row.eigenvalue)}, "
    text = f"{row.label}: {z}{rho}{row.verdict}"
    if row.low is not None and row.high is not None:
        text += f"; between {number(row.low, 3)} and {number(row.high, 3)} on the data behind the shard"
    if not row.certified and not alone(row.report):
        text += f"; {row.report.judged.status}, not to be relied on"
    if row.ratio is not None:
        text += f"; lr {number(row.ratio, 3)} of its critical"
    if row.report.stable_lr is not None:
        text += f"; largest stable lr {row.report.stable_lr.value:.2g}"
    return text + (f"; surge, {number(row.point.surge, 2)} times the median before" if row.point.surged else "")


def heat(track: Track) -> Heat | None:
    """The map of rho; None where no part of any checkpoint has one."""
    names, found = part_names(track), rows(track)
    tables = [{e.name: e for e in row.report.parts} if row.report else {} for row in found]
    if not any(e.rho is not None for table in tables for e in table.values()):
        return None
    lines: list[list[Estimate | None]] = [[table.get(name) for table in tables] for name in names]
    lines.append([row.report.full if row.report else None for row in found])
    parts = [*map(short, names), "full model"]
    cells = [
        Cell(column, index, *_kind(f"{part}, {row.label}", estimate))
        for index, (part, estimates) in enumerate(zip(parts, lines, strict=True))
        for column, (row, estimate) in enumerate(zip(found, estimates, strict=True))
        if estimate is not None and estimate.rho is not None
    ]
    labels = ["-" if row.point.step is None else f"{row.point.step:,}" for row in found]
    return Heat(parts, labels, cells, len(found))


def classes() -> list[str]:
    """What each class of the map holds, in words."""
    between = [f"{a:g} to {b:g}{', the edge' if a == STABLE_BELOW else ''}" for a, b in pairwise(LIMITS)]
    return [f"below {LIMITS[0]:g}", *between, f"above {LIMITS[-1]:g}"]


def short(name: str) -> str:
    """A layer's name where there is little room: its end tells it from the others."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _kind(what: str, estimate: Estimate) -> tuple[int | None, str]:
    label = f"{what}: rho {number(estimate.rho, 3)}"
    if not certified(estimate):
        return None, f"{label}, {estimate.status}"
    return bisect_right(LIMITS, estimate.rho or 0.0), label


def _threshold(record: Record) -> float | None:
    """lambda over rho; nothing where rho is 0, missing, or not to be relied on."""
    if not certified(record) or not record.rho or record.eigenvalue is None:
        return None
    return record.eigenvalue / record.rho


def _unzip(points: list[tuple[int, float]]) -> Series:
    kept = thin(points, LOG_POINTS)
    return [x for x, _ in kept], [y for _, y in kept]
