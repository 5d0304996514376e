"""Geometry of a line chart on a logarithmic axis: numbers for a template to draw, nothing of its looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, log10

from curvcli.documents import Estimate, Report
from curvcli.judge.limits import certified

Curve = tuple[list[float], list[float]]
ENDS_AT = -0.5  # left of the layers, each of which stands between two depths


@dataclass(frozen=True)
class Mark:
    """A point in the picture's own coordinates, and what it says when pointed at."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Pixels of a `width` by `height` picture, y downwards; the canvas lies within `left`, `top`, `right`, `bottom`."""

    width: int
    height: int
    left: float
    top: float
    right: float
    bottom: float
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    curves: dict[str, list[Mark]]
    edge: float | None
    unit: float  # pixels from one depth to the next

    def path(self, name: str) -> str:
        """The curve as the points of an SVG polyline."""
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.curves[name])


def curves(report: Report) -> dict[str, tuple[list[float], list[float]]]:
    """What is drawn: depth and positive converged lambda of each curve. A log axis has no place for others."""

    def pick(items: list[tuple[float, Estimate]]) -> tuple[list[float], list[float]]:
        kept = [(x, e.eigenvalue) for x, e in items if certified(e) and e.eigenvalue and e.eigenvalue > 0]
        return [x for x, _ in kept], [y for _, y in kept]

    return {
        "embedding, head alone": pick([(ENDS_AT, e) for e in (report.outside,) if e]),
        "layer alone": pick([(e.index + 0.5, e) for e in report.layers]),
        "restricted to depth": pick([(float(e.depth), e) for e in report.cumulative.restricted]),
        "truncated to depth": pick([(float(e.depth), e) for e in report.cumulative.truncated]),
    }


def log_chart(data: Mapping[str, Curve], edge: float | None, last: int) -> Chart | None:
    """A chart of positive values over -1 to `last`; None where there is nothing to draw."""
    values = [y for _, ys in data.values() for y in ys] + ([edge] if edge is not None else [])
    if not any(ys for _, ys in data.values()):
        return None
    width, height = 720, 360
    left, top, right, bottom = 64.0, 16.0, 704.0, 312.0
    low, high = log10(min(values) / 1.5), log10(max(values) * 1.5)

    def across(x: float) -> float:
        return left + (right - left) * (x + 1) / (last + 1.5)

    def down(y: float) -> float:
        return bottom - (bottom - top) * (log10(y) - low) / (high - low)

    every = max(1, ceil((last + 1) / 16))
    return Chart(
        width, height, left, top, right, bottom,
        x_ticks=[Mark(across(x), bottom, str(x)) for x in range(0, last + 1, every)],
        y_ticks=[Mark(left, down(y), tick_label(y)) for y in log_ticks(low, high)],
        curves={
            name: [
                Mark(across(x), down(y), f"{name}{'' if x == ENDS_AT else f', depth {x:g}'}: {y:,.4g}")
                for x, y in zip(xs, ys, strict=True)
            ]
            for name, (xs, ys) in data.items()
        },
        edge=down(edge) if edge is not None else None,
        unit=(right - left) / (last + 1.5),
    )  # fmt: skip


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between two powers of ten (exponents), few enough to read."""
    powers = range(max(floor(low), -307), min(ceil(high), 308) + 1)  # what a float holds
    # A narrow range has too few powers of ten to read values by.
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    return [f * 10.0**p for p in powers for f in factors if low <= log10(f * 10.0**p) <= high]


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values between two others, at most `most` of them, at steps of 1, 2 or 5 times a power of ten."""
    unit = 10.0 ** floor(log10((high - low) / most))
    step = next(s for f in (1, 2, 5, 10, 20) if (high - low) / (s := f * unit) < most)
    return [n * step for n in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """A round value as people read it."""
    return f"{value:,.6g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.0e}"
