"""The picture of a report: curvature over depth against the threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from curvcli.documents import Report
from curvcli.judge.steepest import alone
from curvcli.render.frame import number
from curvcli.render.picture import FORMATS, WIDE, Picture, foot, readable_log
from curvcli.render.series import ENDS_AT, near_start, part_brackets, report_series
from curvcli.render.style import light, said

__all__ = ["FORMATS", "picture", "plot"]

BARS = ("embedding, head alone", "layer alone")


def plot(report: Report, suffix: str) -> bytes:
    """The picture as the bytes of a file of that format (png, svg or pdf)."""
    return picture(report).save(suffix)


def picture(report: Report, *, width: float = WIDE) -> Picture:
    """Each part alone as a bar with its bracket, the two cumulative curves, and the threshold."""
    rho = f", rho {number(report.judged.rho, 3)}" if report.judged.rho is not None else ""
    step = f", step {report.checkpoint.step:,}" if report.checkpoint.step is not None else ""
    return Picture(lambda drawn: _draw(drawn, report), [3.9], f"{said(report.verdict)}{rho}{step}", width=width)


def _draw(drawn: Picture, report: Report) -> None:
    (axes,) = drawn.axes
    data, threshold = report_series(report), report.optimizer.threshold
    values = [y for _, ys in data.values() for y in ys] + ([threshold] if threshold else [])
    if not report.layers and report.full.eigenvalue and report.full.eigenvalue > 0:
        values.append(report.full.eigenvalue)
        axes.plot([0], [report.full.eigenvalue], "o", color=light("measured"), label="full model")
    axes.set_yscale("log")
    brackets = part_brackets(report)
    low = foot(min(values, default=1.0))
    high = max([*values, *(end for _, _, end in brackets)], default=1.0) * 1.5
    axes.set_ylim(low, high)
    for name, colour in zip(BARS, ("ends", "layer"), strict=True):
        x, y = data[name]
        if x:
            bars = axes.bar(
                x, [value - low for value in y], bottom=low, width=0.7, color=light(colour), label=name, zorder=1
            )
            for bar, label in zip(bars, _labels(name, x, y), strict=True):
                drawn.label(bar, [label])
    if any(data[name][0] for name in BARS):
        axes.set_title(f"bars begin at {low:g}", loc="right", fontsize=9, color=light("soft"))
    if brackets:
        x, lows, highs = zip(*brackets, strict=True)
        axes.vlines(x, lows, highs, color=light("ink"), linewidth=1.4, zorder=2.5, label="bracket of a bar")
        axes.plot(x, highs, linestyle="", marker="_", markersize=5, color=light("ink"), zorder=2.5)
    # Of a trained network the cut one is another network: its curve is there for who asks, and does not lead the eye.
    faint = not near_start(report)
    for name, colour, marker, muted in (
        ("truncated to depth", "truncated", "s", faint), ("restricted to depth", "restricted", "o", False),
    ):  # fmt: skip
        x, y = data[name]
        if x:
            size = (5 if len(x) <= 40 else 3) - (2 if muted else 0)
            looks: dict[str, Any] = {"linestyle": ":", "linewidth": 1, "alpha": 0.7} if muted else {}
            label = f"{name}: means little once trained" if muted else name
            (curve,) = axes.plot(
                x, y, marker=marker, color=light(colour), label=label, zorder=3, markersize=size, **looks
            )  # fmt: skip
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
