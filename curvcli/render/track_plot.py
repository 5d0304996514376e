"""The pictures of a track: curves over steps, and the map of rho by layer and checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter
from matplotlib.transforms import AffineDeltaTransform

from curvcli.documents import Track
from curvcli.errors import plain
from curvcli.render.fit import LOG_ABOVE
from curvcli.render.frame import number
from curvcli.render.picture import EDGE, WIDE, Picture, readable_log, round_steps
from curvcli.render.series import Heat, Series, classes, newest_columns, told, track_series
from curvcli.render.style import light, said
from curvcli.render.track_points import axis, newest, rows, run_verdict

LONGEST = 60  # characters of the list of surges
MOST_NARROW = 40  # columns of a narrow map
# Name, series that it shows, height in inches. A panel without a value is left out.
PANELS = (
    ("rho", ("rho", "rho?", "failed"), 2.6),
    ("Z", ("z",), 1.6),
    ("lambda", ("lambda", "lambda?"), 2.0),
    ("lr over\ncritical lr", ("ratio",), 1.2),
    ("learning\nrate", ("lr",), 1.0),
    ("training\nloss", ("loss",), 1.2),
)
# Panels of a ratio to an edge at 1 that no bracket belongs to, and the series that each shows.
RATIOS = {"Z": "z", "lr over\ncritical lr": "ratio"}


def plot_track(track: Track, suffix: str) -> bytes:
    """The picture over steps as the bytes of a file of that format (png, svg or pdf)."""
    return steps(track).save(suffix)


def steps(track: Track, *, width: float = WIDE) -> Picture:
    """rho, lambda, the next update, learning rate and training loss over steps."""
    data = track_series(track)
    shown = [p for p in PANELS if any(y == y for name in p[1] for y in data[name][1])] or list(PANELS[:1])
    names, heights = [p[0] for p in shown], [p[2] for p in shown]
    return Picture(lambda drawn: _steps(drawn, track, data, names), heights, _heading(track), width=width)


def _steps(drawn: Picture, track: Track, data: dict[str, Series], names: Sequence[str]) -> None:
    labels: dict[float, str] = {row.place: told(row) for row in rows(track) if row.place is not None}
    size = 5.0 if len(track.points) <= 60 else 2.5
    surges = data["surges"][0]
    for axes, name in zip(drawn.axes, names, strict=True):
        axes.set_ylabel(name)
        axes.grid(axis="y")
        for place in surges:
            axes.axvline(place, color=light("surge"), linewidth=0.8, alpha=0.6, zorder=0)
        if name == "rho":
            _rho(drawn, axes, data, labels, size)
        elif name == "lambda":
            _lambda(drawn, axes, data, labels, size)
        elif name in RATIOS:
            _ratio(drawn, axes, data[RATIOS[name]], labels, size)
        else:
            _logged(drawn, axes, data["lr" if name.endswith("rate") else "loss"], len(track.points), size)
    bottom = drawn.axes[-1]
    bottom.set_xlabel(axis(track))
    round_steps(bottom.xaxis, narrow=drawn.narrow)
    bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    drawn.axes[0].set_title(
        _surges(surges, LONGEST // (2 if drawn.narrow else 1)), loc="right", fontsize=9, color=light("surge")
    )
    drawn.legend(3)


def _rho(drawn: Picture, axes: Axes, data: dict[str, Series], labels: dict[float, str], size: float) -> None:
    places, low = data["low"]
    high = data["high"][1]
    own = [y for name in ("rho", "rho?") for y in data[name][1] if y == y] + [1.0]
    values = [*own, *low, *high]
    # A bracket may reach far below what it is of: then it leaves the picture at its foot.
    if max(values) > LOG_ABOVE:
        axes.set_yscale("log")
        least = max(min(y for y in values if y > 0), min(y for y in own if y > 0) / 10)
        axes.set_ylim(least / 1.5, max(values) * 1.5)
        readable_log(axes.yaxis)
    else:
        top = 1.08 * max(values)
        axes.set_ylim(min([0.0, *own, max(min([0.0, *values]), -top / 4)]), top)
    foot = axes.get_ylim()[0]
    if places:
        drawn_low, drawn_high = ([max(y, foot) for y in ends] for ends in (low, high))
        axes.vlines(
            places, drawn_low, drawn_high, color=light("bracket"), linewidth=1.2 * size,
            label="rho on the data behind the shard", zorder=1.5,
        )  # fmt: skip
    if data["surges"][0]:
        _dots(drawn, axes, data["surges"], labels, marker="^", color=light("surge"), markersize=2.2 * size, label="surge")
    _line(drawn, axes, data["rho"], labels, size, label="measured")
    _doubtful(drawn, axes, data["rho?"], labels, size)
    if data["failed"][0]:
        failed = (data["failed"][0], [foot] * len(data["failed"][0]))
        _dots(
            drawn, axes, failed, labels, marker="x", color=light("limit"), markersize=size + 1, clip_on=False,
            label="could not be measured",
        )  # fmt: skip
    axes.axhline(1, color=light("limit"), linestyle="--", linewidth=1.4, label=EDGE, zorder=1)


def _lambda(drawn: Picture, axes: Axes, data: dict[str, Series], labels: dict[float, str], size: float) -> None:
    values = [y for name in ("lambda", "lambda?", "threshold") for y in data[name][1] if y > 0]
    if values:
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
        readable_log(axes.yaxis)
    axes.plot(*data["threshold"], color=light("limit"), linestyle="--", linewidth=1.4)
    _line(drawn, axes, data["lambda"], labels, size)
    _doubtful(drawn, axes, data["lambda?"], labels, size)


def _ratio(drawn: Picture, axes: Axes, line: Series, labels: dict[float, str], size: float) -> None:
    top = 1.15 * max([y for y in line[1] if y == y])
    axes.set_ylim(min([0.0, *(y for y in line[1] if y == y)]), top if top > 0 else 1.0)
    if top > 1:
        axes.axhline(1, color=light("limit"), linestyle="--", linewidth=1.2)
    _line(drawn, axes, line, labels, size)


def _logged(drawn: Picture, axes: Axes, line: Series, points: int, size: float) -> None:
    """What the run itself wrote. A log has no room for dots; checkpoints have."""
    axes.plot(*line, color=light("logged"), linewidth=1.2, label="the run's own")
    if len(line[0]) <= points:
        labels = {x: f"{x:,}: {number(y)}" for x, y in zip(*line, strict=True)}
        _dots(drawn, axes, line, labels, marker="o", color=light("logged"), markersize=size)


def _line(
    drawn: Picture, axes: Axes, line: Series, labels: dict[float, str], size: float, label: str | None = None
) -> None:  # fmt: skip
    axes.plot(*line, color=light("measured"))
    _dots(drawn, axes, line, labels, marker="o", color=light("measured"), markersize=size, label=label)


def _doubtful(drawn: Picture, axes: Axes, line: Series, labels: dict[float, str], size: float) -> None:
    _dots(
        drawn, axes, line, labels, marker="o", color=light("measured"), markersize=size, label="not converged",
        markerfacecolor=light("page"),
    )  # fmt: skip


def _dots(drawn: Picture, axes: Axes, line: Series, labels: dict[float, str], **looks: Any) -> None:
    """A mark for each value, with what it says; one below the axis lies on its foot."""
    foot = axes.get_ylim()[0]
    known = [(x, max(y, foot)) for x, y in zip(*line, strict=True) if y == y]
    if known:
        (dots,) = axes.plot(*zip(*known, strict=True), linestyle="", zorder=3, **looks)
        drawn.label(dots, [labels[x] for x, _ in known])


def heat_map(found: Heat, *, width: float = WIDE) -> Picture:
    """A column per checkpoint, a row per part and one for the full model; a narrow one has the newest checkpoints."""
    if width < WIDE:
        found = newest_columns(found, MOST_NARROW)
    height = 0.19 if len(found.parts) < 30 else max(0.085, 5.6 / len(found.parts))
    heights = [height * (len(found.parts) + 0.5) + 0.5]
    return Picture(lambda drawn: _heat(drawn, found, height), heights, "rho of each part", width=width)


def _heat(drawn: Picture, found: Heat, height: float) -> None:
    (axes,) = drawn.axes
    last = len(found.parts) - 1
    at = [index + (0.35 if index == last else 0.0) for index in range(last + 1)]  # the full model stands apart
    square = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    keys: list[Artist] = []
    scale = AffineDeltaTransform(axes.transData)  # type: ignore[arg-type]  # which is affine on plain axes
    names = [*classes(), "not converged"]
    for kind in [*range(len(names) - 1), None]:
        cells = [cell for cell in found.cells if cell.kind == kind]
        looks: dict[str, Any] = {"facecolor": light("page" if kind is None else f"rho{kind}"), "linewidth": 0}
        if kind is None:
            looks["hatch"] = "//////"
        keys.append(Patch(**looks))
        if cells:
            marks = PolyCollection(
                [square], offsets=[(cell.column, at[cell.row]) for cell in cells],
                offset_transform=axes.transData, transform=scale, clip_on=False, **looks,
            )  # fmt: skip
            axes.add_collection(marks, autolim=False)
            drawn.label(marks, [cell.label for cell in cells])
    axes.set_xlim(-0.5, len(found.steps) - 0.5)
    axes.set_ylim(at[-1] + 0.5, -0.5)
    every, stride = ceil(0.16 / height), ceil(len(found.steps) / (4 if drawn.narrow else 8))
    named = [index for index in range(last) if index % every == 0 and index <= last - every] + [last]
    axes.set_yticks([at[index] for index in named], [plain(found.parts[index]) for index in named])
    columns = range(len(found.steps) - 1, -1, -stride)  # the newest always has its label
    axes.set_xticks(columns, [found.steps[column] for column in columns])
    says = ["checkpoints, by step, a column each;"]
    if found.of > len(found.steps):
        says.append(f"the newest {len(found.steps)} of {found.of};")
    axes.set_xlabel(("\n" if drawn.narrow else " ").join([*says, "blank: no value"]))
    axes.set_ylabel("part")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    drawn.legend_of(keys, names, 4)


def _heading(track: Track) -> str:
    last = newest(track)
    if last is None or last.report is None:
        return "nothing was measured"
    rho = f", rho {number(last.report.judged.rho, 3)}" if last.report.judged.rho is not None else ""
    if last.report.steepest is not None and last.report.steepest.z is not None:
        rho += f", Z {number(last.report.steepest.z, 3)}"
    step = f", step {last.step:,}" if last.step is not None else ""
    run = run_verdict(track)
    where = f" since step {run.step:,}" if run and run.step is not None else ""
    return f"{f'run {run.name}{where}; ' if run else ''}newest {said(last.report.verdict)}{rho}{step}"


def _surges(places: Sequence[float], longest: int) -> str:
    """One line of text: labels at the surges themselves overlap where they follow closely."""
    if not places:
        return ""
    text = f"{'surge' if len(places) == 1 else 'surges'} at {', '.join(f'{place:,}' for place in places)}"
    return text if len(text) <= longest else f"{len(places)} surges, {places[0]:,} to {places[-1]:,}"
