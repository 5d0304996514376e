"""The picture of a track: rho, lambda, the next update, learning rate and training loss over steps."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from curvcli.documents import Track
from curvcli.render.fit import LOG_ABOVE
from curvcli.render.frame import number
from curvcli.render.track_points import Series, axis, newest, series

BLUE, ORANGE, RED, GREY = "#1f4e9c", "#c2641a", "#b3261e", "#5b6676"
LONGEST = 60  # characters of the list of surges


def plot_track(track: Track, suffix: str) -> bytes:
    """The picture as the bytes of a file of that format (png, svg or pdf)."""
    data = series(track)
    figure = Figure(figsize=(8, 9.5), dpi=150, layout="constrained")
    rho, sharp, update, rate, loss = figure.subplots(5, 1, sharex=True, height_ratios=(3, 2.2, 1.3, 1, 1.3))
    mark = 5.0 if len(track.points) <= 60 else 2.5
    _rho(rho, data, mark)
    sharp.plot(*data["lambda"], color=BLUE, marker="o", markersize=mark, label="lambda")
    sharp.plot(*data["lambda?"], "o", color=BLUE, markersize=mark, markerfacecolor="white")
    sharp.plot(*data["threshold"], color=RED, linestyle="--", linewidth=1.4, label="threshold (rho = 1)")
    drawn = [y for name in ("lambda", "lambda?", "threshold") for y in data[name][1] if y > 0]
    if drawn:
        sharp.set_yscale("log")
        # Room above the curves for the legend.
        sharp.set_ylim(min(drawn) / 1.5, max(drawn) * (max(drawn) / min(drawn)) ** 0.25 * 1.5)
    sharp.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    update.plot(*data["ratio"], color=BLUE, marker="o", markersize=mark)
    ratios = [y for y in data["ratio"][1] if y == y]
    if ratios:
        top = max(ratios)
        update.set_ylim(0, 1.15 * top)
        if 1.15 * top > 1:
            update.axhline(1, color=RED, linestyle="--", linewidth=1.2)
    else:
        update.annotate("no checkpoint has one", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=GREY)
    style = "" if track.log else "o"
    rate.plot(*data["lr"], color=ORANGE, marker=style, markersize=mark)
    rate.set_ylim(0, 1.15 * max(data["lr"][1], default=0.0) or 1.0)
    loss.plot(*data["loss"], color=GREY, marker=style, markersize=mark, linewidth=1)
    names = ("rho", "lambda", "lr over\ncritical lr", "learning\nrate", "training\nloss")
    for axes, name in zip((rho, sharp, update, rate, loss), names, strict=True):
        axes.set_ylabel(name)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for place in data["surges"][0]:
            # Below the legends, so that no line runs through a word.
            axes.axvline(place, ymax=0.86 if axes in (rho, sharp) else 1, color=ORANGE, linewidth=0.8, alpha=0.6, zorder=0)
    loss.set_xlabel(axis(track))
    loss.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    loss.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    rho.set_title(_title(track), loc="left", fontweight="bold")
    rho.set_title(_surges(data["surges"][0]), loc="right", fontsize=9, color=ORANGE)
    figure.align_ylabels()
    buffer = io.BytesIO()
    # No date in the file: the same track gives the same picture.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[suffix]
    figure.savefig(buffer, format=suffix, metadata=metadata)
    return buffer.getvalue()


def _rho(axes: Axes, data: dict[str, Series], mark: float) -> None:
    places, low = data["low"]
    high = data["high"][1]
    values = [y for name in ("rho", "rho?", "low", "high") for y in data[name][1] if y == y]
    logarithmic = max(values, default=0.0) > LOG_ABOVE
    if logarithmic:
        axes.set_yscale("log")
    if places:
        axes.vlines(places, low, high, color=BLUE, alpha=0.35, linewidth=0.8 * mark, label="with held-out data", zorder=2)
    axes.plot(*data["rho"], color=BLUE, marker="o", markersize=mark, label="rho", zorder=3)
    if data["rho?"][0]:
        axes.plot(
            *data["rho?"], "o", color=BLUE, markersize=mark, markerfacecolor="white", label="not converged", zorder=3
        )  # fmt: skip
    if data["surges"][0]:
        axes.plot(*data["surges"], "^", color=ORANGE, markersize=2 * mark, label="surge", zorder=2.5)
    if data["failed"][0]:
        # At the foot, whatever the axis is.
        axes.plot(
            data["failed"][0], [0.03] * len(data["failed"][0]), "x", color=RED, markersize=mark + 1,
            transform=axes.get_xaxis_transform(), label="not measured",
        )  # fmt: skip
    axes.axhline(1, color=RED, linestyle="--", linewidth=1.4, label="edge of stability", zorder=1)
    own = [y for name in ("rho", "rho?") for y in data[name][1] if y == y] + [1.0]
    # A bracket may reach far below what it is of: then it leaves the picture at its foot.
    if logarithmic:
        least = max(min(y for y in [*own, *values] if y > 0), min(y for y in own if y > 0) / 10)
        axes.set_ylim(least / 1.5, max(values) * (max(values) / least) ** 0.25 * 1.3)
    else:
        top = 1.35 * max([1.0, *values])
        axes.set_ylim(min([0.0, *own, max(min([0.0, *values]), -top / 4)]), top)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=6, columnspacing=1.2, handletextpad=0.4)


def _title(track: Track) -> str:
    last = newest(track)
    if last is None or last.report is None:
        return "nothing was measured"
    rho = f", rho {number(last.report.full.rho, 3)}" if last.report.full.rho is not None else ""
    step = f", step {last.step:,}" if last.step is not None else ""
    return f"{last.report.verdict}{rho}{step}"


def _surges(places: Sequence[int]) -> str:
    """One line of text: labels at the surges themselves overlap where they follow closely."""
    if not places:
        return ""
    text = f"{'surge' if len(places) == 1 else 'surges'} at {', '.join(f'{place:,}' for place in places)}"
    return text if len(text) <= LONGEST else f"{len(places)} surges, {places[0]:,} to {places[-1]:,}"
