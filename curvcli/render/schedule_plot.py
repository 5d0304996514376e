"""The picture of a schedule: blocks that train, learning rate and predicted rho over steps."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from curvcli.documents import Schedule
from curvcli.schedules import highest_from, lr_at

POINTS, LONGEST = 600, 60
BLUE, ORANGE, RED = "#1f4e9c", "#c2641a", "#b3261e"


def series(schedule: Schedule) -> dict[str, tuple[list[int], list[float]]]:
    """What is drawn, each as steps and values: "depth", and where they are known "lr" and "rho".

    rho follows the learning rate inside a phase, as the prediction does, and jumps where blocks join.
    """
    first, last = schedule.phases[0].step, schedule.phases[-1].step
    lr = schedule.lr_schedule
    # Without a known end, a fifth of the time so far is enough to show the last phase.
    end = lr.total_steps - 1 if lr and lr.total_steps else last + max(1, (last - first) // 5)
    if lr:
        end = max(end, lr.warmup_steps + 1)
    changes = {step for phase in schedule.phases[1:] for step in (phase.step - 1, phase.step)}
    grid = {first + i * (end - first) // POINTS for i in range(POINTS + 1)}
    steps = sorted(step for step in {*grid, *changes, *([lr.warmup_steps] if lr else [])} if first <= step <= end)
    found = {"depth": (steps, [float(schedule.depth - len(schedule.locked_at(step))) for step in steps])}
    if lr is None:
        return found
    rates = [lr_at(lr, step) for step in steps]
    found["lr"] = (steps, rates)
    scale: dict[int, float] = {}
    for number, phase in enumerate(schedule.phases):
        reference = lr_at(lr, phase.step) if number else highest_from(lr, phase.step)
        if phase.predicted_rho is not None and reference > 0:
            scale[number] = phase.predicted_rho / reference
    phases = map(schedule.phase_at, steps)
    known = [(step, rate * scale[n]) for step, rate, n in zip(steps, rates, phases, strict=True) if n in scale]
    if known:
        found["rho"] = ([step for step, _ in known], [rho for _, rho in known])
    return found


def plot(schedule: Schedule, suffix: str) -> bytes:
    """The picture as the bytes of a file of that format (png, svg or pdf)."""
    data = series(schedule)
    heights = {"depth": 2.2, "lr": 1.3, "rho": 1.9}
    figure = Figure(figsize=(8, 1.0 + sum(1.05 * heights[name] for name in data)), dpi=150, layout="constrained")
    panels = figure.subplots(len(data), 1, sharex=True, squeeze=False, height_ratios=[heights[name] for name in data])
    axes: dict[str, Axes] = dict(zip(data, panels[:, 0], strict=True))
    _depth(axes["depth"], schedule, data["depth"])
    if "lr" in data:
        axes["lr"].plot(*data["lr"], color=ORANGE)
        axes["lr"].set_ylabel("learning rate")
        axes["lr"].set_ylim(bottom=0)
    if "rho" in data:
        _rho(axes["rho"], schedule, data["rho"])
    for panel in axes.values():
        for phase in schedule.phases[1:]:
            panel.axvline(phase.step, color="#888888", linewidth=0.7, linestyle=":", zorder=1)
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    bottom = list(axes.values())[-1]
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    bottom.set_xlim(data["depth"][0][0], data["depth"][0][-1])
    figure.align_ylabels()
    buffer = io.BytesIO()
    # No date in the file: the same schedule gives the same picture.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[suffix]
    figure.savefig(buffer, format=suffix, metadata=metadata)
    return buffer.getvalue()


def _depth(axes: Axes, schedule: Schedule, drawn: tuple[list[int], list[float]]) -> None:
    steps, depths = drawn
    axes.step(steps, depths, where="post", color=BLUE, linewidth=1.8)
    axes.fill_between(steps, depths, step="post", color=BLUE, alpha=0.12)
    axes.set_ylim(0, schedule.depth * 1.12)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("blocks that train")
    unlocks = schedule.phases[1:]
    axes.set_title(f"{schedule.mode}, {schedule.depth} blocks, {len(unlocks)} unlocks", loc="left", fontweight="bold")
    # One line of text: labels at the unlocks themselves overlap where a steep decay lets them follow closely.
    text = "   ".join(f"+{len(phase.unlock)} at {phase.step:,}" for phase in unlocks)
    if len(text) > LONGEST:
        text = f"steps {unlocks[0].step:,} to {unlocks[-1].step:,}"
    axes.set_title(text, loc="right", fontsize=9, color="#555555")


def _rho(axes: Axes, schedule: Schedule, drawn: tuple[list[int], list[float]]) -> None:
    axes.plot(*drawn, color=BLUE)
    top = max([*drawn[1], 1.0])
    lines = [(1.0, "edge of stability", RED)]
    if schedule.margin is not None:
        lines.append((schedule.margin, f"margin {schedule.margin:g}", "#555555"))
    for value, label, colour in lines:
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.1)
        axes.annotate(
            label,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3 if value == max(v for v, _, _ in lines) else -3),
            textcoords="offset points",
            ha="right",
            va="bottom" if value == max(v for v, _, _ in lines) else "top",
            color=colour,
            fontsize=8,
        )
    axes.set_ylim(min(0.0, *drawn[1]), 1.2 * max(top, schedule.margin or 0))
    axes.set_ylabel("predicted rho")
