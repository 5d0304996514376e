"""The picture of a report: curvature over depth against the threshold."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from curvcli.documents import Report
from curvcli.render.chart import curves
from curvcli.render.frame import number

FORMATS = ("png", "svg", "pdf")


def plot(report: Report, suffix: str) -> bytes:
    """The picture as the bytes of a file of that format (png, svg or pdf)."""
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    data = curves(report)
    for label, colour in (("embedding, head alone", "#8a99b0"), ("layer alone", "#b8c4d6")):
        x, y = data[label]
        if x:
            axes.bar(x, y, width=0.7, color=colour, label=label, zorder=1)
    for label, colour, marker in (("restricted to depth", "#1f4e9c", "o"), ("truncated to depth", "#c2641a", "s")):
        x, y = data[label]
        axes.plot(x, y, marker=marker, color=colour, label=label, zorder=3, markersize=5)
    if not report.layers and report.full.eigenvalue and report.full.eigenvalue > 0:
        axes.plot([0], [report.full.eigenvalue], "o", color="#1f4e9c", label="full model")
    threshold = report.optimizer.threshold
    if threshold is not None:
        axes.axhline(threshold, color="#b3261e", linestyle="--", linewidth=1.4, zorder=2)
        axes.annotate(
            f"edge of stability, rho = 1 (lr {number(report.optimizer.lr, 3)})",
            (1, threshold),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color="#b3261e",
            fontsize=9,
        )
    axes.set_yscale("log")
    drawn = [v for _, values in data.values() for v in values] + ([threshold] if threshold else [])
    if drawn:
        axes.set_ylim(min(drawn) / 2, max(drawn) * 3)
    axes.set_xlabel("depth (blocks from the embedding up)")
    axes.set_ylabel("lambda, top eigenvalue of the\npreconditioned Hessian")
    rho = f", rho {number(report.full.rho, 3)}" if report.full.rho is not None else ""
    step = f", step {report.checkpoint.step:,}" if report.checkpoint.step is not None else ""
    axes.set_title(f"{report.verdict}{rho}{step}", loc="left", fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=3)
    buffer = io.BytesIO()
    # No date in the file: the same report gives the same picture.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[suffix]
    figure.savefig(buffer, format=suffix, metadata=metadata)
    return buffer.getvalue()
