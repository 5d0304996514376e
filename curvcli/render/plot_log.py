"""The picture of a job's log over steps: rho, lambda, learning rate, loss, the numbers beside them, levels and cost."""

from __future__ import annotations

from math import nan
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from curvcli.documents import Log, Record
from curvcli.judge.level import alert_of
from curvcli.judge.verdict import standing
from curvcli.render.beside import level_line
from curvcli.render.fit import LOG_ABOVE, spans_decades
from curvcli.render.frame import number
from curvcli.render.picture import EDGE, WIDE, Picture, readable_log, round_steps
from curvcli.render.series import Series, log_series, unlocks
from curvcli.render.style import light

# Series, what its panel is called, height in inches; one without a value is left out.
PANELS = (
    ("rho", "rho", 2.8),
    ("z", "Z", 1.8),
    ("lambda", "lambda", 2.0),
    ("update_ratio", "lr over\ncritical lr", 1.1),
    ("lr", "learning\nrate", 1.1),
    ("loss", "training\nloss", 1.5),
    ("gradient_norm", "gradient\nnorm", 1.1),
    ("gradient_quotient", "g'Hg/g'g", 1.1),
    ("update_rms", "update\nRMS", 1.0),
    ("attention_logit", "attention\nlogit", 1.0),
    ("attention_entropy", "attention\nentropy", 1.0),
    ("spectral_norm", "spectral\nnorm", 1.0),
    ("share of time", "share of\ntime, %", 0.9),
)
ALWAYS = ("rho", "lr", "loss")
LEVELS = ("INFO", "WARN", "ERROR")
LEVEL_HEIGHT = 0.7
TO_AN_EDGE = ("rho", "z", "update_ratio")  # whose edge is 1
# Of the steps' span, that two labels of unlocks stand apart at least, on a wide picture and on a narrow one.
APART = (0.04, 0.07)


def plot_log(log: Log, suffix: str) -> bytes:
    """The picture as the bytes of a file of that format (png, svg or pdf)."""
    return picture(log).save(suffix)


def picture(log: Log, *, width: float = WIDE) -> Picture:
    """Everything that the records have, over steps; unlocks as vertical lines. A panel without a value is left out."""
    data = log_series(log.records)
    z_alone = _has(data["z"]) and not (_has(data["rho"]) or _has(data["rho, not converged"]))
    always = {*ALWAYS} - ({"rho"} if z_alone else set())
    shown = [(name, label, high) for name, label, high in PANELS if name in always or _has(data[name])]
    heights = [high for _, _, high in shown]
    raised = [r for r in log.records if alert_of(r).level != "INFO"]
    if raised:
        heights.insert(1, LEVEL_HEIGHT)
    names = [(name, label) for name, label, _ in shown]
    return Picture(lambda drawn: _draw(drawn, log, data, names, raised), heights, _heading(log), width=width)


def _has(series: Series) -> bool:
    return any(y == y for y in series[1])


def _draw(drawn: Picture, log: Log, data: dict[str, Series], names: list[tuple[str, str]], raised: list[Record]) -> None:
    joined = unlocks(log.records)
    panels = list(drawn.axes)
    if raised:
        _levels(drawn, panels.pop(1), raised)
    below: list[str] = []
    for axes, (name, label) in zip(panels, names, strict=True):
        axes.set_ylabel(label)
        axes.grid(axis="y")
        left = _scale(axes, name, data)
        below += [f"{left} of {' '.join(label.split())}"] if left else []
        if name == "rho":
            _rho(axes, data)
        else:
            colour = "measured" if name in ("lambda", "z", "update_ratio") else "soft"
            marks: dict[str, Any] = {"marker": ".", "markersize": 4} if name in ("lambda", "z") else {}
            axes.plot(*data[name], color=light(colour), **marks)
        if name == "lambda":
            axes.plot(*data["threshold"], color=light("limit"), linestyle="--", linewidth=1.2)
        if name in TO_AN_EDGE and (name != "update_ratio" or axes.get_ylim()[1] > 1):
            axes.axhline(1, color=light("limit"), linestyle="--", linewidth=1.4, label=EDGE if name == "rho" else None)
    for axes in drawn.axes:
        for step, _ in joined:
            axes.axvline(step, color=light("unlock"), linewidth=0.8, alpha=0.6, zorder=0)
    for step, depth in _apart(joined, log.records, APART[drawn.narrow]):
        drawn.axes[0].annotate(
            f"{depth}", (step, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8,
            color=light("unlock"),
        )  # fmt: skip
    bottom = drawn.axes[-1]
    notes = ["vertical lines: unlocks, with the number of blocks that train"] if joined else []
    notes += [f"off the axis, as not above 0: {', '.join(below)}"] if below else []
    # Of a narrow picture a line of text holds half as much.
    lines = [line for note in notes for line in (note.split(", with ") if drawn.narrow else [note])]
    bottom.set_xlabel("\n".join(["step", *lines]))
    round_steps(bottom.xaxis, narrow=drawn.narrow)
    bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    drawn.legend(3)


def _rho(axes: Axes, data: dict[str, Series]) -> None:
    axes.plot(*data["rho"], color=light("measured"), marker=".", markersize=4, label="measured")
    if _has(data["rho, not converged"]):
        axes.plot(*data["rho, not converged"], "x", color=light("truncated"), markersize=5, label="not converged")


def _scale(axes: Axes, name: str, data: dict[str, Series]) -> int:
    """A logarithmic axis where values span decades, or rho goes far past its edge.

    Returns:
        How many values have no place on it.
    """
    with_it = {"rho": ("rho", "rho, not converged"), "lambda": ("lambda", "threshold")}.get(name, (name,))
    values = [y for key in with_it for y in data[key][1] if y == y]
    above = [y for y in values if y > 0] + ([1.0] if name in ("rho", "z") else [])
    far = name in ("rho", "z") and max(values, default=0.0) > LOG_ABOVE
    if above and (name == "lambda" or far or spans_decades(values)):
        axes.set_yscale("log")
        axes.set_ylim(min(above) / 1.4, max(above) * 1.4)
        readable_log(axes.yaxis)
        left = len(values) - sum(y > 0 for y in values)
        if left:  # a line to one of them would run off the panel
            for key in with_it:
                data[key] = (data[key][0], [y if y > 0 else nan for y in data[key][1]])
        return left
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6 if name == "rho" else 4, steps=[1, 2, 5, 10]))
    return 0


def _levels(drawn: Picture, axes: Axes, raised: list[Record]) -> None:
    """Records at WARN and ERROR, told apart by height and shape too."""
    for level, colour, marker in (("WARN", "ink", "^"), ("ERROR", "unstable", "X")):
        at = [record for record in raised if alert_of(record).level == level]
        if at:
            (dots,) = axes.plot(
                [record.step for record in at], [LEVELS.index(level)] * len(at), linestyle="", marker=marker, markersize=6,
                color=light(colour), clip_on=False, zorder=3,
            )  # fmt: skip
            drawn.label(dots, [f"step {record.step:,}: {level_line(record)}" for record in at])
    axes.set_ylabel("level")
    axes.set_ylim(-0.2, 2.3)
    axes.set_yticks([1, 2], LEVELS[1:])
    axes.grid(axis="y")


def _apart(joined: list[tuple[int, int]], records: tuple[Record, ...], least: float) -> list[tuple[int, int]]:
    """The unlocks that are labelled, the newest always: so far apart that no label runs into another."""
    span = max(1, records[-1].step - records[0].step) if records else 1
    kept = joined[-1:]
    for before in reversed(joined[:-1]):
        if kept[-1][0] - before[0] >= least * span:
            kept.append(before)
    return kept[::-1]


def _heading(log: Log) -> str:
    if not log.records:
        return "no record yet"
    last = standing(log.records)
    value = f"rho {number(last.rho, 3)}" if last.rho is not None else f"no rho ({last.status})"
    value = f"Z {number(last.z, 3)}" if last.rho is None and last.z is not None else value
    return f"step {last.step:,}, {value}"
