"""Geometry of a line chart on a logarithmic axis: numbers for a template to draw, nothing of its looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, log10

Curve = tuple[list[float], list[float]]


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


def log_chart(data: Mapping[str, Curve], edge: float | None, last: int) -> Chart | None:
    """A chart of positive values over 0 to `last`; None where there is nothing to draw."""
    values = [y for _, ys in data.values() for y in ys] + ([edge] if edge is not None else [])
    if not any(ys for _, ys in data.values()):
        return None
    width, height = 720, 360
    left, top, right, bottom = 64.0, 16.0, 704.0, 312.0
    low, high = log10(min(values) / 1.5), log10(max(values) * 1.5)

    def across(x: float) -> float:
        return left + (right - left) * (x + 0.5) / (last + 1)

    def down(y: float) -> float:
        return bottom - (bottom - top) * (log10(y) - low) / (high - low)

    powers = range(floor(low), ceil(high) + 1)
    # A narrow range has too few powers of ten to read values by.
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [f * 10.0**p for p in powers for f in factors if low <= log10(f * 10.0**p) <= high]
    every = max(1, ceil((last + 1) / 16))
    return Chart(
        width, height, left, top, right, bottom,
        x_ticks=[Mark(across(x), bottom, str(x)) for x in range(0, last + 1, every)],
        y_ticks=[Mark(left, down(y), f"{y:,g}" if 1e-3 <= y < 1e6 else f"{y:.0e}") for y in ticks],
        curves={
            name: [Mark(across(x), down(y), f"{name}, depth {x:g}: {y:,.4g}") for x, y in zip(xs, ys, strict=True)]
            for name, (xs, ys) in data.items()
        },
        edge=down(edge) if edge is not None else None,
        unit=(right - left) / (last + 1),
    )  # fmt: skip
