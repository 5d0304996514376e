"""The picture of a schedule: blocks that train, learning rate and predicted rho over steps."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from curvcli.documents import Schedule
from curvcli.errors import counted
from curvcli.render.picture import WIDE, Picture, round_steps
from curvcli.render.series import Series, schedule_series
from curvcli.render.style import light

LONGEST = 60
HEIGHTS = {"depth": 2.2, "lr": 1.3, "rho": 1.9}


def plot(schedule: Schedule, suffix: str) -> bytes:
    """The picture as the bytes of a file of that format (png, svg or pdf)."""
    return picture(schedule).save(suffix)


def picture(schedule: Schedule, *, width: float = WIDE) -> Picture:
    """Blocks that train, the learning rate and the predicted rho, where they are known, over steps."""
    data = schedule_series(schedule)
    how = "residual gates" if schedule.gates else counted(len(schedule.phases) - 1, "unlock")
    heading = f"{schedule.mode}, {counted(schedule.depth, 'block')}, {how}"
    heights = [HEIGHTS[name] for name in data]
    return Picture(lambda drawn: _draw(drawn, schedule, data), heights, heading, width=width)


def _draw(drawn: Picture, schedule: Schedule, data: dict[str, Series]) -> None:
    axes = dict(zip(data, drawn.axes, strict=True))
    _depth(axes["depth"], schedule, data["depth"], LONGEST // (2 if drawn.narrow else 1))
    if "lr" in data:
        axes["lr"].plot(*data["lr"], color=light("logged"))
        axes["lr"].set_ylabel("learning\nrate")
        axes["lr"].set_ylim(bottom=0)
    if "rho" in data:
        _rho(axes["rho"], schedule, data["rho"])
    for panel in drawn.axes:
        for phase in schedule.phases[1:]:
            panel.axvline(phase.step, color=light("soft"), linewidth=0.7, linestyle=":", zorder=1)
        panel.grid(axis="y")
    bottom = drawn.axes[-1]
    bottom.set_xlabel("step (dotted lines: blocks join)" if len(schedule.phases) > 1 else "step")
    round_steps(bottom.xaxis, narrow=drawn.narrow)
    bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    bottom.set_xlim(data["depth"][0][0], data["depth"][0][-1])
    if "rho" in data:
        drawn.legend(3)


def _depth(axes: Axes, schedule: Schedule, drawn: Series, longest: int) -> None:
    steps, depths = drawn
    if schedule.gates:
        axes.plot(steps, depths, color=light("measured"), linewidth=1.8)
        axes.fill_between(steps, depths, color=light("measured"), alpha=0.12)
    else:
        axes.step(steps, depths, where="post", color=light("measured"), linewidth=1.8)
        axes.fill_between(steps, depths, step="post", color=light("measured"), alpha=0.12)
    axes.set_ylim(0, schedule.depth * 1.12)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("sum of alphas" if schedule.gates else "blocks that train")
    unlocks = schedule.phases[1:]
    # One line of text: labels at the unlocks themselves overlap where a steep decay lets them follow closely. At the left,
    # since at the right, where the unlocks are, each would stand over another's line.
    text = ", ".join(f"{len(phase.unlock)} at {phase.step:,}" for phase in unlocks)
    if len(text) > longest:
        text = f"steps {unlocks[0].step:,} to {unlocks[-1].step:,}"
    if unlocks:
        axes.set_title(f"blocks join: {text}", loc="left", fontsize=9, color=light("soft"))


def _rho(axes: Axes, schedule: Schedule, drawn: Series) -> None:
    axes.plot(*drawn, color=light("measured"), label="predicted rho")
    axes.axhline(1, color=light("limit"), linestyle="--", linewidth=1.1, label="edge of stability, rho = 1")
    if schedule.margin is not None:
        label = f"margin {schedule.margin:g}"
        axes.axhline(schedule.margin, color=light("soft"), linestyle="--", linewidth=1.1, label=label)
    axes.set_ylim(min(0.0, *drawn[1]), 1.2 * max([*drawn[1], 1.0, schedule.margin or 0.0]))
    axes.set_ylabel("predicted rho")
