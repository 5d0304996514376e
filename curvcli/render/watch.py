"""The terminal view of a running job: where it stands, the curve of rho over steps, and the last records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, log10

import plotext
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from curvcli.documents import Log, Record
from curvcli.errors import counted, plain
from curvcli.judge.limits import STABLE_BELOW, UNSTABLE_ABOVE, certified
from curvcli.judge.verdict import standing, verdict_of
from curvcli.render.beside import companions_line, cost_line, idle_line, level_line
from curvcli.render.fit import LOG_ABOVE, Points, fitting, round_log_ticks, round_ticks, thin
from curvcli.render.frame import number
from curvcli.render.largest_lr import record_lines
from curvcli.render.series import unlocks
from curvcli.render.style import COLOURS, said

# Columns of the table, and the order in which a narrow terminal loses them.
TITLES = ("step", "loss", "lr", "lambda", "rho", "Z", "residual", "update", "depth", "HVPs", "seconds", "status")
LEAST_NEEDED = ("residual", "HVPs", "seconds", "update", "lambda", "lr", "depth", "loss")
_ASCII = str.maketrans("┌┐└┘─│├┤┬┴┼", "++++-|+++++")


@dataclass(frozen=True)
class Curve:
    """What is drawn of rho over steps, or of Z where no record has a rho.

    `runs` are unbroken stretches of converged values; `doubtful` values are not converged and not to be
    relied on; at the steps in `missing` there was no value. On a logarithmic axis `below` counts the values
    that have no place on it.
    """

    runs: list[Points]
    doubtful: Points
    missing: list[int]
    unlocks: list[tuple[int, int]]  # step, depth from there on
    logarithmic: bool
    below: int


def curve(records: tuple[Record, ...]) -> Curve:
    """The curve of a log."""
    by_z = shows_z(records)
    points = [(r, r.z if by_z else r.rho) for r in records]
    values = [value for _, value in points if value is not None]
    logarithmic = bool(values) and max(values) > LOG_ABOVE
    runs: list[Points] = [[]]
    doubtful: Points = []
    missing: list[int] = []
    below = 0
    for record, value in points:
        if value is None:
            missing.append(record.step)
            runs.append([])
        elif logarithmic and value <= 0:
            below += 1
            runs.append([])
        elif not (certified(record) or by_z):
            doubtful.append((record.step, value))
            runs.append([])
        else:
            runs[-1].append((record.step, value))
    return Curve([run for run in runs if run], doubtful, missing, unlocks(records), logarithmic, below)


def shows_z(records: tuple[Record, ...]) -> bool:
    """Whether Z is what there is to show: some record has one, and none a rho."""
    return any(r.z is not None for r in records) and all(r.rho is None for r in records)


def screen(log: Log, console: Console, *, tail: int, height: int | None = None) -> RenderableType:
    """One frame.

    Args:
        console: what it is for: its width, and whether its encoding has the characters of the curve.
        tail: records in the table, at most.
        height: lines that the frame keeps within; None where it may be as long as it likes.
    """
    head, width = header(log), console.width
    if not log.records:
        return head
    rows, lines = tail, 14
    if height is not None:
        # Below the head a blank line, the curve, the table's titles and its rows; the last line stays free.
        free = height - len(head.wrap(console, width)) - 3
        rows = max(1, min(tail, free - 10 if free > 13 else free))
        lines = min(20, free - min(rows, len(log.records)))
    parts: list[RenderableType] = [head, Text("")]
    if lines >= 6 and width >= 30:
        parts.append(draw(log.records, width, lines, (console.encoding or "").lower().startswith("utf")))
    return Group(*parts, table(log.records[-rows:], width))


def header(log: Log) -> Text:
    """Which file, how fresh, where rho stands, and what is wrong with the log."""
    text = Text(f"{plain(str(log.path))}\n", style="")
    text.stylize("bold")
    if not log.records:
        text.append(
            "no record yet"
            if log.exists
            else "waiting for it: there is no such file yet, which a tracker in the job writes",
            style="yellow",
        )
        _troubles(text, log)
        return text
    last = log.records[-1]
    text.append(f"step {last.step:,}, {counted(len(log.records), 'record')}", style="")
    if log.age is None:
        text.append(", the file is gone", style="yellow")
    else:
        text.append(f", last written {_ago(log.age)} ago")
        if log.gap is not None:
            text.append(f", usually every {_ago(log.gap)}")
        if log.stalled and not last.idle:  # a job whose schedule has ended writes no more
            text.append(" (looks stalled)", style="bold red")
    stands = standing(log.records)
    verdict = verdict_of(stands)
    text.append("\n\n")
    text.append(f" {said(verdict).upper()} ", style=f"bold reverse {COLOURS[verdict]}")
    if stands.rho is not None:
        _rho(text, stands)
    elif stands.z is not None:
        text.append(f"  Z {number(stands.z, 3)}", style="bold")
        text.append("  (edge 1; a lower bound, and below the edge it proves nothing)", style="dim")
    else:
        reason = f": {plain(stands.message)}" if stands.message else ""
        text.append(f"  no rho, {stands.outcome}{reason}", style="yellow")
        known = [r for r in log.records if r.rho is not None and certified(r)]
        if known:
            text.append(f"\n the last one was {number(known[-1].rho, 3)} at step {known[-1].step:,}")
    if line := idle_line(last, stands):
        text.append(f"\n {line}")
    _beside(text, last)
    _troubles(text, log)
    return text


def _rho(text: Text, last: Record) -> None:
    text.append(f"  rho {number(last.rho, 3)}", style="bold")
    text.append(f"  (edge 1, stable below {STABLE_BELOW:g}, unstable above {UNSTABLE_ABOVE:g})", style="dim")
    if not certified(last):
        text.append(f"  {last.status}: not to be relied on", style="yellow")
    if last.z is not None:
        text.append(f"\n the parameters without a rho: Z {number(last.z, 3)} (edge 1; below it it proves nothing)")
    if last.early:
        text.append("\n the optimizer is young: rho says nothing yet", style="yellow")
    text.append("".join(f"\n {line}" for line in record_lines(last)))


def _beside(text: Text, record: Record) -> None:
    if level := level_line(record):
        text.append(f"\n {level}", style="bold red" if level.startswith("ERROR") else "yellow")
    for line in filter(None, (companions_line(record), cost_line(record))):
        text.append(f"\n {line}", style="dim")


def _troubles(text: Text, log: Log) -> None:
    if log.damaged:
        lines = "line" if log.damaged == 1 else "lines"
        text.append(f"\n{log.damaged:,} damaged {lines}, the last: {plain(log.damage or '')}", style="yellow")
    notes = []
    if log.superseded:
        notes.append(f"{counted(log.superseded, 'record')} superseded after a resume")
    if log.replaced:
        notes.append(f"the file was replaced {log.replaced} {'time' if log.replaced == 1 else 'times'}, read anew")
    if log.half:
        notes.append("the last line is half written")
    if notes:
        text.append("\n" + "; ".join(notes), style="dim")


def draw(records: tuple[Record, ...], width: int, lines: int, utf8: bool = True) -> Text:
    """The curve in characters, `lines` high with its caption."""
    data = curve(records)
    values = [y for run in data.runs for _, y in run] + [y for _, y in data.doubtful]
    place = log10 if data.logarithmic else float
    low, high, ticks = _axis(values, data.logarithmic, lines - 4)
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plotsize(width, lines - 1)
    for step, _ in data.unlocks:
        plotext.vline(step, COLOURS["unlock"])
    plotext.hline(place(1.0), COLOURS["limit"])
    for run in data.runs:
        shown = thin(run, 2 * width)
        x, y = [step for step, _ in shown], [place(value) for _, value in shown]
        plotext.plot(x, y, marker="braille" if utf8 else "*", color=COLOURS["measured"])
    if data.doubtful:
        shown = thin(data.doubtful, width)
        plotext.scatter([s for s, _ in shown], [place(v) for _, v in shown], marker="?", color=COLOURS["doubtful"])
    if data.missing:
        plotext.scatter(data.missing, [place(low)] * len(data.missing), marker="x", color=COLOURS["failed"])
    first, last = records[0].step, max(records[-1].step, records[0].step + 1)
    plotext.xlim(first, last)
    plotext.ylim(place(low), place(high))
    plotext.yticks([place(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    marks = _marks(first, last, width)
    plotext.xticks(marks, [f"{mark:,}" for mark in marks])
    picture = plotext.build().rstrip("\n")
    caption = Text(f"{'Z' if shows_z(records) else 'rho'} over steps, edge 1", style="dim")
    if data.unlocks:
        step, depth = data.unlocks[-1]
        caption.append(f"; {counted(len(data.unlocks), 'unlock')}, to depth {depth} at {step:,}")
    if data.doubtful:
        caption.append("; ? not converged")
    if data.missing:
        caption.append("; x no value")
    if data.below:
        caption.append(f"; {data.below} not above 0, off the log axis")
    caption.truncate(width, overflow="ellipsis" if utf8 else "crop")
    return Text.assemble(caption, "\n", Text.from_ansi(picture if utf8 else picture.translate(_ASCII)))


def _axis(values: list[float], logarithmic: bool, lines: int) -> tuple[float, float, list[float]]:
    """Lower end, upper end and ticks of a canvas that is so many lines high; the edge is always on the axis, and a tick."""
    most = max(2, lines // 2)
    if logarithmic:
        least, greatest = min(floor(log10(min(v, 1.0))) for v in values), ceil(log10(max(values)))
        low, high = 10.0**least, 10.0**greatest
        return low, high, _with_edge(round_log_ticks(low, high, most), low, high, lines, log10)
    high = max([UNSTABLE_ABOVE, *values]) * 1.05
    low = min([0.0, *values])
    return low, high, _with_edge(round_ticks(low, high, most), low, high, lines, float)


def _with_edge(
    ticks: list[float], low: float, high: float, lines: int, place: Callable[[float], float]
) -> list[float]:  # fmt: skip
    """The ticks with one at the edge, without those that would stand on its line of the terminal or on the next."""
    room = 2 * (place(high) - place(low)) / max(1, lines)
    return sorted({1.0, *(tick for tick in ticks if abs(place(tick) - place(1.0)) >= room)})


def _marks(first: int, last: int, width: int) -> list[int]:
    """Round steps, so many that their labels stand apart; the two ends where fewer than two round ones lie between."""
    longest = len(f"{last:,}") + 4
    marks = [round(step) for step in round_ticks(first, last, max(2, min(6, width // longest)), least=1)]
    return marks if len(marks) > 1 else [first, last]


def table(records: tuple[Record, ...], width: int) -> Table:
    """The records that are given, in the columns that fit."""
    cells = [_row(record) for record in records]
    absent = {"lambda", "rho", "residual"} if shows_z(records) else {"Z"} if all(r.z is None for r in records) else set()
    titles = fitting(cells, width, [title for title in TITLES if title not in absent], LEAST_NEEDED)
    drawn = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1), collapse_padding=True)
    for title in titles:
        drawn.add_column(title, justify="left" if title == "status" else "right", no_wrap=True)
    for row, record in zip(cells, records, strict=True):
        verdict = verdict_of(record)
        styles = {"rho": COLOURS[verdict], "status": "" if certified(record) else COLOURS["doubtful"]}
        drawn.add_row(*(Text(row[title], style=styles.get(title, "")) for title in titles))
    return drawn


def _row(record: Record) -> dict[str, str]:
    return {
        "step": f"{record.step:,}",
        "loss": number(record.loss),
        "lr": number(record.lr, 3),
        "lambda": number(record.eigenvalue),
        "rho": number(record.rho, 3),
        "Z": number(record.z, 3),
        "residual": number(record.residual, 2),
        "update": number(record.update_ratio, 3),
        "depth": "-" if record.active_depth is None else str(record.active_depth),
        "HVPs": str(record.hvps),
        "seconds": f"{record.seconds:.1f}",
        "status": record.outcome,
    }


def _ago(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
