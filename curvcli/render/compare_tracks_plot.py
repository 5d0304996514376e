"""The picture of two runs: rho, lambda, learning rate and loss over the steps of both."""

from __future__ import annotations

from math import nan

from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from curvcli.documents import TrackComparison
from curvcli.errors import plain
from curvcli.render.compare_tracks import LETTERS, PAIRS, ranking, sides_of
from curvcli.render.fit import LOG_ABOVE, spans_decades
from curvcli.render.frame import number
from curvcli.render.picture import WIDE, Picture, readable_log, round_steps
from curvcli.render.series import Series, short
from curvcli.render.style import light

# Field of `StepSide`, what it is called, height in inches; one that no step has is left out.
PANELS = (
    ("rho", "rho", 2.6),
    ("z", "Z", 1.6),
    ("eigenvalue", "lambda", 2.0),
    ("update_ratio", "lr over\ncritical lr", 1.2),
    ("lr", "learning\nrate", 1.0),
    ("training_loss", "training\nloss", 1.2),
    ("shard_loss", "loss on\nthe shard", 1.2),
)
TO_AN_EDGE = ("rho", "z", "update_ratio")  # whose edge is 1
LOOKS = (("first", "o"), ("second", "s"))
_DIGITS = {pair.key: pair.digits for pair in PAIRS}


def picture(found: TrackComparison, *, width: float = WIDE) -> Picture:
    """Both runs on common axes, told apart by colour and by the shape of their marks."""
    shown = [panel for panel in PANELS if any(y for side in (0, 1) for y in _points(found, panel[0], side)[1])]
    shown = shown or [PANELS[0]]
    if any(panel[0] == "training_loss" for panel in shown):
        shown = [panel for panel in shown if panel[0] != "shard_loss"]
    return Picture(lambda drawn: _draw(drawn, found, shown), [p[2] for p in shown], ranking(found), width=width)


def _line(found: TrackComparison, field: str, side: int) -> Series:
    """Steps and values of one of the two, NaN where its checkpoint has none: there its line breaks.

    It joins its own checkpoints, whatever steps the other has.
    """
    every = [(step.step, run) for step in found.steps if (run := sides_of(step)[side]) is not None]
    return [at for at, _ in every], [nan if (y := getattr(run, field)) is None else y for _, run in every]


def _points(found: TrackComparison, field: str, side: int) -> Series:
    """The same without the steps that have no value."""
    known = [(at, y) for at, y in zip(*_line(found, field, side), strict=True) if y == y]
    return [at for at, _ in known], [y for _, y in known]


def _draw(drawn: Picture, found: TrackComparison, shown: list[tuple[str, str, float]]) -> None:
    size = 5.0 if len(found.steps) <= 60 else 2.5
    for axes, (field, label, _) in zip(drawn.axes, shown, strict=True):
        axes.set_ylabel(label)
        axes.grid(axis="y")
        series = [_points(found, field, side) for side in (0, 1)]
        _scale(axes, field, [y for _, ys in series for y in ys])
        names = [
            f"{letter}: {plain(short(run.path))}" for letter, run in zip(LETTERS, (found.first, found.second), strict=True)
        ]
        for place, ((colour, marker), letter, (x, y)) in enumerate(zip(LOOKS, LETTERS, series, strict=True)):
            if not x:
                continue
            if field == "rho":
                _bracket(axes, found, place, colour, size)
            axes.plot(*_line(found, field, place), color=light(colour), linewidth=1.3)
            (dots,) = axes.plot(
                x, y, linestyle="", marker=marker, color=light(colour), markersize=size, zorder=3, label=names[place],
                markerfacecolor=light("page" if place else colour),
            )  # fmt: skip
            drawn.label(dots, [_says(letter, field, at, value) for at, value in zip(x, y, strict=True)])
        if field in TO_AN_EDGE and (field == "rho" or axes.get_ylim()[1] > 1):
            axes.axhline(1, color=light("limit"), linestyle="--", linewidth=1.4, zorder=1, label="edge of stability")
        if field == "rho" and found.since is not None and found.further:
            axes.axvline(found.since, color=light("soft"), linewidth=1, linestyle=":", zorder=0.5)
            letter = LETTERS[0 if found.further == "first" else 1]
            axes.set_title(
                f"dotted: {letter} is lower from step {found.since:,} on", loc="right", fontsize=9, color=light("soft")
            )
    bottom = drawn.axes[-1]
    bottom.set_xlabel("step")
    round_steps(bottom.xaxis, narrow=drawn.narrow)
    bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    drawn.legend(3)


def _says(letter: str, field: str, at: float, value: float) -> str:
    name = next(label for key, label, _ in PANELS if key == field).replace("\n", " ")
    return f"{letter}, step {at:,}: {name} {number(value, _DIGITS[field])}"


def _scale(axes: Axes, field: str, values: list[float]) -> None:
    """A logarithmic axis where values span decades, or rho goes far past its edge; else one on which 0 and the edge lie."""
    if field == "rho":
        values = [*values, 1.0]
    above = [value for value in values if value > 0]
    log = field == "eigenvalue" or spans_decades(values) or (field == "rho" and max(values) > LOG_ABOVE)
    if log and above:
        axes.set_yscale("log")
        axes.set_ylim(min(above) / 1.5, max(above) * 1.5)
        readable_log(axes.yaxis)
    elif field in TO_AN_EDGE:
        top = max(values, default=1.0)
        axes.set_ylim(min([0.0, *values]), 1.12 * top if top > 0 else 1.0)


def _bracket(axes: Axes, found: TrackComparison, side: int, colour: str, size: float) -> None:
    """The ends that a run is ranked by, at the steps that are ranked; one that leaves the axis ends at its foot."""
    ranked = [(step.step, sides_of(step)[side]) for step in found.steps if step.ranked]
    ends = [(at, run.low, run.high) for at, run in ranked if run and run.low is not None and run.high is not None]
    if ends:
        at, low, high = zip(*ends, strict=True)
        foot = axes.get_ylim()[0]
        axes.vlines(at, [max(x, foot) for x in low], high, color=light(colour), alpha=0.35, linewidth=1.2 * size, zorder=1.5)
