"""The picture of a comparison: how many times rho and lambda of each part have grown, with a bracket."""

from __future__ import annotations

from math import ceil

from curvcli.documents import Change, Comparison
from curvcli.errors import plain
from curvcli.render.frame import number
from curvcli.render.picture import WIDE, Picture, readable_log
from curvcli.render.series import short
from curvcli.render.style import light

ROW, CLOSE = 0.2, 0.085  # inches a part, and the least where there are many


def picture(found: Comparison, *, width: float = WIDE) -> Picture:
    """A line a part, on a logarithmic axis on which 1 is no change. A part without a ratio is named and has no mark."""
    row = ROW if len(found.changes) < 30 else max(CLOSE, 6 / len(found.changes))
    heading = "the second over the first, part by part"
    return Picture(lambda drawn: _draw(drawn, found, row), [0.6 + row * len(found.changes)], heading, width=width)


def growth(change: Change) -> tuple[float, float, float] | None:
    """How many times rho has grown, and the ends of its bracket; lambda where no rho is known; None without a ratio.

    The learning rates are known: the bracket is that of lambda, moved by them.
    """
    if not change.ratio:
        return None
    value = change.rho_ratio or change.ratio
    by_lr = value / change.ratio
    return value, (change.low or change.ratio) * by_lr, (change.high or change.ratio) * by_lr


def _draw(drawn: Picture, found: Comparison, row: float) -> None:
    (axes,) = drawn.axes
    axes.set_xscale("log")
    known = [(place, change, grown) for place, change in enumerate(found.changes) if (grown := growth(change))]
    moved = [(place, change.ratio or 1.0) for place, change, _ in known if change.rho_ratio]
    places = [place for place, _, _ in known]
    every = [1.0, *(end for _, _, grown in known for end in grown), *(ratio for _, ratio in moved)]
    axes.set_xlim(min(every) / 1.3, max(every) * 1.3)
    axes.hlines(
        places, [low for _, _, (_, low, _) in known], [high for _, _, (_, _, high) in known], color=light("bracket"),
        linewidth=4, zorder=1.5, label="bracket, by residuals and ceilings",
    )  # fmt: skip
    size = 5 if row >= ROW else 3
    if moved:
        axes.plot(
            [ratio for _, ratio in moved], [place for place, _ in moved], "s", color=light("soft"),
            markerfacecolor=light("page"), markersize=size, label="lambda",
        )  # fmt: skip
    (dots,) = axes.plot(
        [value for _, _, (value, _, _) in known], places, "o", color=light("measured"), markersize=size,
        label="rho" if moved else "lambda",
    )  # fmt: skip
    drawn.label(dots, [_label(change, grown) for _, change, grown in known])
    axes.axvline(1, color=light("soft"), linestyle="--", linewidth=1.2, zorder=1)
    named = range(0, len(found.changes), ceil(0.16 / row))
    axes.set_yticks(named, [plain(short(found.changes[place].name)) for place in named])
    axes.set_ylim(len(found.changes) - 0.5, -0.5)
    axes.set_xlabel("B over A (dashed: no change)")
    axes.set_ylabel("part")
    readable_log(axes.xaxis)
    axes.grid(axis="x")
    drawn.legend(3)


def _label(change: Change, grown: tuple[float, float, float]) -> str:
    value, low, high = (number(x, 3) for x in grown)
    return f"{change.name}: {'rho' if change.rho_ratio else 'lambda'} {value} times, {low} to {high}"
