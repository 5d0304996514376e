"""The picture of a job's log: rho, lambda, learning rate and loss over steps."""

from __future__ import annotations

from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from curvcli.documents import Log
from curvcli.render.frame import number
from curvcli.render.picture import EDGE, WIDE, Picture, readable_log
from curvcli.render.series import log_series, unlocks
from curvcli.render.style import light


def plot_log(log: Log, suffix: str) -> bytes:
    """The picture as the bytes of a file of that format (png, svg or pdf)."""
    return picture(log).save(suffix)


def picture(log: Log, *, width: float = WIDE) -> Picture:
    """rho, lambda with its threshold, learning rate and loss over steps, unlocks as vertical lines."""
    return Picture(lambda drawn: _draw(drawn, log), [2.8, 2.0, 1.1, 1.5], _heading(log), width=width)


def _draw(drawn: Picture, log: Log) -> None:
    rho, sharp, rate, loss = drawn.axes
    data, joined = log_series(log.records), unlocks(log.records)
    rho.plot(*data["rho"], color=light("measured"), marker=".", markersize=4, label="measured")
    if any(y == y for y in data["rho, not converged"][1]):
        rho.plot(*data["rho, not converged"], "x", color=light("truncated"), markersize=5, label="not converged")
    rho.axhline(1, color=light("limit"), linestyle="--", linewidth=1.4, label=EDGE)
    sharp.plot(*data["lambda"], color=light("measured"), marker=".", markersize=4)
    sharp.plot(*data["threshold"], color=light("limit"), linestyle="--", linewidth=1.2)
    rate.plot(*data["lr"], color=light("soft"))
    loss.plot(*data["loss"], color=light("soft"))
    if any(y > 0 for y in data["lambda"][1]):
        sharp.set_yscale("log")
        readable_log(sharp.yaxis)
    for axes, name in zip(drawn.axes, ("rho", "lambda", "learning\nrate", "training\nloss"), strict=True):
        axes.set_ylabel(name)
        axes.grid(axis="y")
        for step, _ in joined:
            axes.axvline(step, color=light("unlock"), linewidth=0.8, alpha=0.6, zorder=0)
    for step, depth in joined:
        rho.annotate(
            f"{depth}", (step, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8,
            color=light("unlock"),
        )  # fmt: skip
    loss.set_xlabel("step (vertical lines: unlocks, with the number of blocks that train)" if joined else "step")
    loss.xaxis.set_major_locator(MaxNLocator(nbins=4 if drawn.narrow else 8, integer=True))
    loss.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    drawn.legend(3)


def _heading(log: Log) -> str:
    if not log.records:
        return "no record yet"
    last = log.records[-1]
    value = f"rho {number(last.rho, 3)}" if last.rho is not None else f"no rho ({last.status})"
    return f"step {last.step:,}, {value}"
