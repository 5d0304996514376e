"""The picture of a job's log: rho, lambda, learning rate and loss over steps."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from curvcli.documents import Log, Record
from curvcli.judge.limits import certified
from curvcli.render.frame import number
from curvcli.render.watch import unlocks

BLUE, ORANGE, RED, GREY = "#1f4e9c", "#c2641a", "#b3261e", "#5b6676"
Series = tuple[list[int], list[float]]


def series(records: tuple[Record, ...]) -> dict[str, Series]:
    """What is drawn: steps and values of each curve. Curvature that did not converge stands apart.

    A value that is missing is NaN where curves are drawn as lines, so that the line breaks there.
    """

    def pick(value: Callable[[Record], float | None], converged: bool | None = None) -> Series:
        chosen = [(r.step, value(r) if converged is None or certified(r) is converged else None) for r in records]
        return [step for step, _ in chosen], [float("nan") if y is None else y for _, y in chosen]

    return {
        "rho": pick(lambda r: r.rho, converged=True),
        "rho, not converged": pick(lambda r: r.rho, converged=False),
        "lambda": pick(lambda r: r.eigenvalue, converged=True),
        "threshold": pick(_threshold),
        "lr": pick(lambda r: r.lr),
        "loss": pick(lambda r: r.loss),
    }


def plot_log(log: Log, suffix: str) -> bytes:
    """The picture as the bytes of a file of that format (png, svg or pdf)."""
    figure = Figure(figsize=(8, 8), dpi=150, layout="constrained")
    rho, sharp, rate, loss = figure.subplots(4, 1, sharex=True, height_ratios=(3, 2, 1, 1.5))
    data = series(log.records)
    rho.plot(*data["rho"], color=BLUE, marker=".", markersize=4)
    rho.plot(*data["rho, not converged"], "x", color=ORANGE, markersize=5)
    rho.axhline(1, color=RED, linestyle="--", linewidth=1.4)
    rho.annotate(
        "edge of stability, rho = 1", (1, 1), xycoords=("axes fraction", "data"), xytext=(-4, 4),
        textcoords="offset points", ha="right", color=RED, fontsize=9,
    )  # fmt: skip
    sharp.plot(*data["lambda"], color=BLUE, marker=".", markersize=4, label="lambda")
    sharp.plot(*data["threshold"], color=RED, linestyle="--", linewidth=1.2, label="threshold (rho = 1)")
    rate.plot(*data["lr"], color=GREY)
    loss.plot(*data["loss"], color=GREY)
    for axes, name in ((rho, "rho"), (sharp, "lambda"), (rate, "learning rate"), (loss, "training loss")):
        _dress(axes, name, log.records)
    if any(y > 0 for y in data["lambda"][1]):
        sharp.set_yscale("log")
    if sharp.get_legend_handles_labels()[1]:
        sharp.legend(frameon=False, fontsize=9, ncols=2)
    for step, depth in unlocks(log.records):
        rho.annotate(
            f"{depth}", (step, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8, color=ORANGE
        )
    loss.set_xlabel(
        "step (vertical lines: unlocks, with the number of blocks that train)" if unlocks(log.records) else "step"
    )
    loss.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(_title(log), x=0.02, ha="left", fontweight="bold", parse_math=False)
    buffer = io.BytesIO()
    # No date in the file: the same log gives the same picture.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[suffix]
    figure.savefig(buffer, format=suffix, metadata=metadata)
    return buffer.getvalue()


def _dress(axes: Axes, name: str, records: tuple[Record, ...]) -> None:
    axes.set_ylabel(name)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for step, _ in unlocks(records):
        axes.axvline(step, color=ORANGE, linewidth=0.8, alpha=0.6, zorder=0)


def _title(log: Log) -> str:
    if not log.records:
        return "no record yet"
    last = log.records[-1]
    value = f"rho {number(last.rho, 3)}" if last.rho is not None else f"no rho ({last.status})"
    return f"step {last.step:,}, {value}"


def _threshold(record: Record) -> float | None:
    """lambda over rho; nothing where rho is 0, missing, or not to be relied on."""
    if not certified(record) or not record.rho or record.eigenvalue is None:
        return None
    return record.eigenvalue / record.rho
