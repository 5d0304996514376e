"""The picture of a track: rho, lambda against its threshold, and the training loss over steps."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from curvcli.results import Track, TrackPoint

BLUE, ORANGE, RED, GREY = "#1f4e9c", "#c2641a", "#b3261e", "#6b7280"
Curve = tuple[list[float], list[float]]


def course(track: Track) -> dict[str, Curve]:
    """What is drawn, each as steps and values. Only certified values, and on log axes only positive ones."""
    points = list(placed(track))
    sure = [(x, p.report) for x, p in points if p.report and p.report.full.status == "converged"]
    weak = [(x, p.report) for x, p in points if p.report and p.report.full.status != "converged"]

    def pick(pairs: list[tuple[float, float | None]]) -> Curve:
        kept = [(x, y) for x, y in pairs if y is not None and y > 0]
        return [x for x, _ in kept], [y for _, y in kept]

    return {
        "rho": pick([(x, r.full.rho) for x, r in sure]),
        "uncertified rho": pick([(x, r.full.rho) for x, r in weak]),
        "held out": pick([(x, r.generalisation.rho_low) for x, r in sure]),
        "lr over critical lr": pick([(x, r.update.ratio) for x, r in sure]),
        "surge": pick([(x, p.report.full.rho) for x, p in points if p.surged and p.report]),
        "lambda": pick([(x, r.full.eigenvalue) for x, r in sure]),
        "threshold": pick([(x, r.optimizer.threshold) for x, r in sure]),
        "shard loss": pick([(x, r.data.loss) for x, r in sure]),
        "training loss": pick([(float(e.step), e.loss) for e in track.log]),
        "lr": pick([(float(e.step), e.lr) for e in track.log]),
    }


def placed(track: Track) -> list[tuple[float, TrackPoint]]:
    """Points with their place on the axis: the step, or the place in the run where no step is known."""
    known = all(point.step is not None for point in track.points)
    return [(float(p.step if known and p.step is not None else i), p) for i, p in enumerate(track.points)]


def plot_track(track: Track, suffix: str) -> bytes:
    """The picture as the bytes of a file of that format (png, svg or pdf)."""
    data = course(track)
    with_loss = bool(data["training loss"][0] or data["shard loss"][0])
    figure = Figure(figsize=(8, 7.6 if with_loss else 5.4), dpi=150, layout="constrained")
    top, middle, *bottom = figure.subplots(3 if with_loss else 2, 1, sharex=True, height_ratios=[3, 2, 2][: 2 + with_loss])
    _stability(top, data)
    middle.plot(*data["lambda"], "o-", color=BLUE, label="lambda", markersize=4)
    middle.plot(*data["threshold"], "--", color=RED, label="threshold (rho = 1)")
    middle.set_ylabel("lambda")
    if any(data[name][0] for name in ("lambda", "threshold")):
        middle.set_yscale("log")
    if bottom:
        _loss(bottom[0], data)
    newest = track.points[-1].report
    top.set_title(f"{newest.verdict if newest else 'not measured'} at the newest checkpoint", loc="left", fontweight="bold")
    for axes in (top, middle, *bottom):
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    for axes in (top, middle):
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=4)
    last = bottom[0] if bottom else middle
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    last.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    last.set_xlabel("step" if all(p.step is not None for p in track.points) else "checkpoint")
    buffer = io.BytesIO()
    # No date in the file: the same track gives the same picture.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[suffix]
    figure.savefig(buffer, format=suffix, metadata=metadata)
    return buffer.getvalue()


def _stability(axes: Axes, data: dict[str, Curve]) -> None:
    axes.axhline(1.0, color=RED, linestyle="--", linewidth=1.4, zorder=2)
    axes.annotate(
        "edge of stability",
        (1, 1.0),
        xycoords=("axes fraction", "data"),
        xytext=(-2, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=RED,
        fontsize=9,
    )
    axes.plot(*data["rho"], "o-", color=BLUE, label="rho", markersize=5, zorder=4)
    if data["held out"][0]:
        axes.plot(*data["held out"], "v", color=BLUE, alpha=0.45, markersize=5, label="on held-out tokens", zorder=3)
    if data["uncertified rho"][0]:
        axes.plot(*data["uncertified rho"], "o", markerfacecolor="none", color=BLUE, label="rho, not certified")
    if data["lr over critical lr"][0]:
        axes.plot(*data["lr over critical lr"], "s:", color=ORANGE, markersize=4, label="lr over critical lr")
    if data["surge"][0]:
        axes.plot(*data["surge"], "o", markerfacecolor="none", color=RED, markersize=13, label="surge", zorder=5)
    axes.set_yscale("log")
    drawn = [v for name in ("rho", "uncertified rho", "held out", "lr over critical lr") for v in data[name][1]] + [1.0]
    # A held-out value near 0 says "almost nothing"; how near must not squeeze all the rest.
    floor = max(min(drawn), max(drawn) / 1e3)
    axes.set_ylim(floor / 1.6, max(drawn) * 2)
    axes.set_ylabel("rho, lambda over threshold")


def _loss(axes: Axes, data: dict[str, Curve]) -> None:
    if data["training loss"][0]:
        axes.plot(*data["training loss"], color=GREY, linewidth=0.9, label="training loss")
    axes.plot(*data["shard loss"], "o", color=BLUE, markersize=4, label="loss on the shard")
    axes.set_ylabel("loss, nats per token")
    handles, labels = axes.get_legend_handles_labels()
    if data["lr"][0]:
        rate = axes.twinx()
        rate.plot(*data["lr"], color=ORANGE, linewidth=1, alpha=0.8, label="learning rate")
        rate.set_ylabel("learning rate", color=ORANGE)
        rate.set_ylim(0, max(data["lr"][1]) * 1.1)
        rate.spines[["top"]].set_visible(False)
        more, names = rate.get_legend_handles_labels()
        handles, labels = handles + more, labels + names
    axes.legend(handles, labels, frameon=False, fontsize=9, loc="upper right", ncols=3)
