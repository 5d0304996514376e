"""The picture of a report: curvature over depth against the threshold."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from curvcli.documents import Report
from curvcli.judge.steepest import alone
from curvcli.render.frame import number
from curvcli.render.picture import FORMATS, Picture, readable_log
from curvcli.render.series import ENDS_AT, report_series
from curvcli.render.style import light, said

__all__ = ["FORMATS", "picture", "plot"]


def plot(report: Report, suffix: str) -> bytes:
    """The picture as the bytes of a file of that format (png, svg or pdf)."""
    return picture(report).save(suffix)


def picture(report: Report) -> Picture:
    """Each part alone as a bar, the two cumulative curves, and the threshold."""
    rho = f", rho {number(report.judged.rho, 3)}" if report.judged.rho is not None else ""
    step = f", step {report.checkpoint.step:,}" if report.checkpoint.step is not None else ""
    return Picture(lambda drawn: _draw(drawn, report), [3.9], f"{said(report.verdict)}{rho}{step}")


def _draw(drawn: Picture, report: Report) -> None:
    (axes,) = drawn.axes
    data, threshold = report_series(report), report.optimizer.threshold
    values = [y for _, ys in data.values() for y in ys] + ([threshold] if threshold else [])
    if not report.layers and report.full.eigenvalue and report.full.eigenvalue > 0:
        values.append(report.full.eigenvalue)
        axes.plot([0], [report.full.eigenvalue], "o", color=light("measured"), label="full model")
    axes.set_yscale("log")
    low, high = min(values, default=1.0) / 1.5, max(values, default=1.0) * 1.5
    axes.set_ylim(low, high)
    for name, colour in (("embedding, head alone", "ends"), ("layer alone", "layer")):
        x, y = data[name]
        if x:
            bars = axes.bar(
                x, [value - low for value in y], bottom=low, width=0.7, color=light(colour), label=name, zorder=1
            )
            for bar, label in zip(bars, _labels(name, x, y), strict=True):
                drawn.label(bar, [label])
    for name, colour, marker in (("truncated to depth", "truncated", "s"), ("restricted to depth", "restricted", "o")):
        x, y = data[name]
        if x:
            size = 5 if len(x) <= 40 else 3
            (curve,) = axes.plot(x, y, marker=marker, color=light(colour), label=name, zorder=3, markersize=size)
            drawn.label(curve, _labels(name, x, y))
    if threshold is not None:
        label = f"edge of stability, rho = 1 (lr {number(report.optimizer.lr, 3)})"
        axes.axhline(threshold, color=light("limit"), linestyle="--", linewidth=1.4, zorder=2, label=label)
    axes.set_xlim(-0.95, max(report.checkpoint.layers, 1) + 0.5)
    axes.set_xlabel("depth (blocks from the embedding up)")
    what = (
        "S, sharpness in the norm\nof the optimizer's step"
        if alone(report)
        else "lambda, top eigenvalue of the\npreconditioned Hessian"
    )
    axes.set_ylabel(what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    readable_log(axes.yaxis)
    axes.grid(axis="y")
    drawn.legend(3)


def _labels(name: str, places: Sequence[float], values: Sequence[float]) -> list[str]:
    return [
        f"{name}{'' if x == ENDS_AT else f', depth {x:g}'}: {y:,.4g}" for x, y in zip(places, values, strict=True)
    ]  # fmt: skip
