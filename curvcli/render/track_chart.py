"""Geometry of a track's page: curves over steps, and the map of layers and checkpoints. Nothing of their looks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, log10

from curvcli.documents import Estimate, Track
from curvcli.judge.limits import STABLE_BELOW, UNSTABLE_ABOVE, certified
from curvcli.render.chart import Mark, linear_ticks, log_ticks, tick_label
from curvcli.render.fit import LOG_ABOVE
from curvcli.render.frame import number
from curvcli.render.track_points import Row, Series, part_names, rows, series

WIDTH, LEFT, RIGHT, TOP, FOOT = 720, 72.0, 690.0, 12.0, 28.0
# Classes of rho in the map; the verdict's own limits are among them.
LIMITS = (0.1, 0.2, 0.4, STABLE_BELOW, UNSTABLE_ABOVE, 2 * UNSTABLE_ABOVE)
_BETWEEN = [f"{low:g} to {high:g}{', the edge' * (low == STABLE_BELOW)}" for low, high in pairwise(LIMITS)]
CLASSES = (f"below {LIMITS[0]:g}", *_BETWEEN, f"above {LIMITS[-1]:g}")
LONGEST_NAME = 24


@dataclass(frozen=True)
class Dot(Mark):
    """A point of a curve; `kind` is sure, doubtful (not converged), own (the run's), surge or failed."""

    kind: str


@dataclass(frozen=True)
class Panel:
    """One picture over steps, in its own pixels, y downwards; the canvas lies within `left`, `top`, `right`, `bottom`.

    `lines` are (kind, points of an SVG polyline), `bars` are brackets as (x, upper y, lower y), `edge` is where the
    value is 1 where that is a limit, `surges` are the x of surges, `unit` is pixels from one point to the next.
    """

    title: str
    height: int
    bottom: float
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    lines: list[tuple[str, str]]
    dots: list[Dot]
    bars: list[tuple[float, float, float]]
    edge: float | None
    surges: list[float]
    unit: float
    width: int = WIDTH
    left: float = LEFT
    right: float = RIGHT
    top: float = TOP


@dataclass(frozen=True)
class Cell:
    """A field of the map. `kind` is the class of rho, "h0" to "h6", or "weak" where it is not certified."""

    x: float
    kind: str
    label: str


@dataclass(frozen=True)
class Heat:
    """The map: a row (upper edge, cells) per part and one for the full model, a column per checkpoint.

    There is no cell where there is no value.
    """

    height: int
    left: float
    bottom: float
    cell_width: float
    cell_height: float
    rows: list[tuple[float, list[Cell]]]
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    width: int = WIDTH


@dataclass(frozen=True)
class _Scale:
    """From a value to a height on the canvas."""

    low: float
    high: float
    logarithmic: bool
    bottom: float

    def down(self, value: float) -> float:
        """Pixels from the top; a value below the axis lies on its foot."""
        if self.logarithmic:
            share = (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low)) if value > 0 else 0.0
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - TOP) * max(0.0, share)

    def ticks(self) -> list[Mark]:
        most = 3 if self.bottom < 150 else 5
        exponents = (log10(self.low), log10(self.high)) if self.logarithmic else (0.0, 0.0)
        values = log_ticks(*exponents) if self.logarithmic else linear_ticks(self.low, self.high, most)
        return [Mark(LEFT, self.down(value), tick_label(value)) for value in values]


@dataclass(frozen=True)
class _Plan:
    """What a panel shows: names of series, and how each is drawn. `logarithmic` is None where rho decides."""

    title: str
    height: int
    lines: Mapping[str, str]
    dots: Mapping[str, str] = field(default_factory=dict)
    logarithmic: bool | None = False
    brackets: bool = False
    edge: bool = False


_PLANS = (
    _Plan(
        "rho", 240, {"rho": "one"}, {"surges": "surge", "rho": "sure", "rho?": "doubtful", "failed": "failed"},
        logarithmic=None, brackets=True, edge=True,
    ),
    _Plan(
        "lambda and its threshold", 220, {"threshold": "limit", "lambda": "one"}, {"lambda": "sure", "lambda?": "doubtful"},
        logarithmic=True,
    ),
    _Plan("learning rate over the critical one of the next update", 140, {"ratio": "one"}, {"ratio": "sure"}, edge=True),
    _Plan("learning rate", 130, {"lr": "two"}),
    _Plan("training loss", 150, {"loss": "two"}),
)  # fmt: skip


def panels(track: Track) -> list[Panel]:
    """Curves over steps: rho, lambda, the next update, learning rate, training loss; one without any value is left out."""
    data, found = series(track), rows(track)
    labels = {row.place: _label(row) for row in found if row.place is not None}
    places = [place for xs, _ in data.values() for place in xs]
    drawn = [_panel(plan, data, labels, (min(places), max(places)), len(found)) for plan in _PLANS]
    return [panel for panel in drawn if panel]


def heat(track: Track) -> Heat | None:
    """The map of rho; None where no part of any checkpoint has one."""
    names = part_names(track)
    found = rows(track)
    tables = [{e.name: e for e in row.report.parts} if row.report else {} for row in found]
    if not any(e.rho is not None for table in tables for e in table.values()):
        return None
    left, right = 170.0, float(RIGHT)
    cell_width = (right - left) / len(found)
    cell_height = 18.0 if len(names) < 30 else max(8.0, 540.0 / len(names))
    lines: list[tuple[str, list[Estimate | None]]] = [(name, [table.get(name) for table in tables]) for name in names]
    lines.append(("full model", [row.report.full if row.report else None for row in found]))
    drawn, marks = [], []
    every = ceil(15 / cell_height)
    for index, (name, estimates) in enumerate(lines):
        full = index == len(names)
        y = TOP + index * cell_height + (6.0 if full else 0.0)
        cells = [
            Cell(left + column * cell_width, *_kind(f"{_short(name)}, {row.label}", estimate))
            for column, (row, estimate) in enumerate(zip(found, estimates, strict=True))
            if estimate is not None and estimate.rho is not None
        ]
        drawn.append((y, cells))
        if full or (index % every == 0 and index <= len(names) - every):
            marks.append(Mark(left - 8, y + cell_height / 2 + 4, _short(name)))
    bottom = TOP + len(lines) * cell_height + 6.0
    stride = ceil(len(found) / 8)
    ticks = [
        Mark(left + (column + 0.5) * cell_width, bottom + 18, "-" if row.point.step is None else f"{row.point.step:,}")
        for column, row in enumerate(found)
        if column % stride == 0
    ]
    return Heat(round(bottom + 46), left, bottom, cell_width, cell_height, drawn, ticks, marks)


def _panel(plan: _Plan, data: dict[str, Series], labels: dict[int, str], ends: tuple[int, int], points: int) -> Panel | None:
    own = [y for name in {*plan.lines, *plan.dots} - {"failed"} for y in data[name][1] if y == y]
    if not own:
        return None
    first, last = ends

    def across(x: float) -> float:
        inset = 10.0
        return LEFT + inset + (RIGHT - LEFT - 2 * inset) * ((x - first) / (last - first) if last > first else 0.5)

    bottom = plan.height - FOOT
    brackets = list(zip(*data["low"], data["high"][1], strict=True)) if plan.brackets else []
    scale = _scale(plan, own, [y for _, low, high in brackets for y in (low, high)], bottom)
    x_ticks = [
        Mark(across(x), bottom + 18, f"{x:,.0f}") for x in linear_ticks(first, last, 10) if x == int(x)
    ] if last > first else [Mark(across(first), bottom + 18, f"{first:,}")]  # fmt: skip
    dots = [
        Dot(across(x), bottom - 6 if kind == "failed" else scale.down(y), labels.get(x, ""), kind)
        for name, kind in plan.dots.items()
        for x, y in zip(*data[name], strict=True)
        if y == y
    ]
    for name, kind in plan.lines.items():
        if kind == "two" and len(data[name][0]) <= points:  # of checkpoints: a log's line has no room for dots
            dots += [Dot(across(x), scale.down(y), f"{x:,}: {number(y)}", "own") for x, y in zip(*data[name], strict=True)]
    return Panel(
        plan.title, plan.height, bottom, x_ticks, scale.ticks(),
        lines=[
            (kind, " ".join(f"{across(x):.1f},{scale.down(y):.1f}" for x, y in run))
            for name, kind in plan.lines.items() for run in _runs(data[name])
        ],
        dots=dots,
        bars=[(across(x), scale.down(high), scale.down(low)) for x, low, high in brackets],
        edge=scale.down(1.0) if plan.edge and scale.low <= 1 <= scale.high else None,
        surges=[across(x) for x in data["surges"][0]],
        unit=(RIGHT - LEFT) / points,
    )  # fmt: skip


def _scale(plan: _Plan, own: list[float], brackets: list[float], bottom: float) -> _Scale:
    """The axis that holds the values; the edge too, where rho is drawn. A bracket may leave it at its foot."""
    if plan.brackets:
        own = [*own, 1.0]
    positive = [y for y in own if y > 0]
    logarithmic = max([*own, *brackets]) > LOG_ABOVE if plan.logarithmic is None else plan.logarithmic
    if logarithmic and positive:
        least = max(min([*positive, *(y for y in brackets if y > 0)]), min(positive) / 10)
        return _Scale(least / 1.5, max([*own, *brackets]) * 1.5, True, bottom)
    low, high = min([0.0, *own]), max([*own, *brackets])
    if plan.title == "training loss":  # whose zero is far away and says nothing
        low, high = min(own), max(own)
    room = 0.08 * (high - low) or abs(high) or 1.0
    return _Scale(low - (room if low else 0.0), high + room, False, bottom)


def _runs(line: Series) -> list[list[tuple[int, float]]]:
    """The unbroken stretches of a line; one point alone is no line."""
    runs: list[list[tuple[int, float]]] = [[]]
    for x, y in zip(*line, strict=True):
        if y == y:
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _label(row: Row) -> str:
    if row.report is None:
        return f"{row.label}: could not be measured"
    text = f"{row.label}: rho {number(row.rho, 3)}, lambda {number(row.eigenvalue)}, {row.verdict}"
    if row.low is not None and row.high is not None:
        text += f"; between {number(row.low, 3)} and {number(row.high, 3)} on the data behind the shard"
    if not row.certified:
        text += f"; {row.report.full.status}, not to be relied on"
    if row.ratio is not None:
        text += f"; lr {number(row.ratio, 3)} of its critical"
    return text + (f"; surge, {number(row.point.surge, 2)} times the median before" if row.point.surged else "")


def _kind(what: str, estimate: Estimate) -> tuple[str, str]:
    label = f"{what}: rho {number(estimate.rho, 3)}"
    if not certified(estimate):
        return "weak", f"{label}, {estimate.status}"
    return f"h{bisect_right(LIMITS, estimate.rho or 0.0)}", label


def _short(name: str) -> str:
    """A layer's name where there is little room: its end tells it from the others."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
