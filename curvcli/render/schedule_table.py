"""The terminal view of a schedule."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.documents import LrSchedule, Schedule
from curvcli.errors import counted, plain
from curvcli.render.frame import number
from curvcli.render.table import finding_line

ORDERS = {
    "last": "the last ones locked at first",
    "first": "the first ones locked at first",
    "interleaved": "the locked ones interleaved",
}
LOCKED = {"grow": "locked blocks are the identity until they join", "freeze": "locked blocks keep their weights"}


def show(schedule: Schedule, console: Console) -> None:
    """Print what is planned, its phases and findings; readable at 80 columns."""
    console.print(_head(schedule), _phases(schedule), _note(schedule), *map(finding_line, schedule.findings), sep="\n")


def ranges(blocks: Sequence[int]) -> str:
    """Rising block indices as people read them: 0-23, or 0-46/2 for every second one; none is a dash."""
    parts: list[str] = []
    first = 0
    while first < len(blocks):
        stride = blocks[first + 1] - blocks[first] if first + 1 < len(blocks) else 1
        last = first
        while last + 1 < len(blocks) and blocks[last + 1] - blocks[last] == stride:
            last += 1
        if stride > 1 and last - first < 2:
            last = first  # two blocks that happen to lie apart are no pattern
        if last == first:
            parts.append(str(blocks[first]))
        else:
            parts.append(f"{blocks[first]}-{blocks[last]}{f'/{stride}' if stride > 1 else ''}")
        first = last + 1
    return ", ".join(parts) or "-"


def _head(schedule: Schedule) -> Text:
    several = len(schedule.phases) > 1
    how = f"in {len(schedule.phases)} phases, {ORDERS[schedule.order]}" if several else "in one phase: all of them train"
    locked = LOCKED[schedule.mode]
    if schedule.gates:
        how = f"behind residual gates: the first is open at step {schedule.gates[0]:,}, the last at {schedule.gates[-1]:,}"
        locked = "what a block adds is multiplied by step / its gate's step, at most 1"
    text = Text(f"{schedule.mode} {counted(schedule.depth, 'block')} {how}", style="bold")
    text.append(f"\n{locked}; embedding, head and final norm always train", style="not bold")
    if schedule.lr_schedule:
        text.append(f"\n{_rates(schedule.lr_schedule)}", style="not bold")
    if schedule.margin is not None:
        text.append(f"\npredicted rho at most {schedule.margin:g}", style="not bold")
    source = schedule.provenance.report or schedule.provenance.checkpoint
    if source:
        text.append(
            f", from {plain(source)}" if schedule.margin is not None else f"\nfrom {plain(source)}", style="not bold"
        )
    return text.append("\n")


def _rates(lr: LrSchedule) -> str:
    parts = [f"lr {lr.kind}, peak {number(lr.peak, 3)}, warm-up {counted(lr.warmup_steps, 'step')}"]
    if lr.decay_steps is not None:
        parts.append(f"decay {lr.decay_steps:,}")
    if lr.total_steps is not None:
        parts.append(f"total {lr.total_steps:,}")
    if lr.min_ratio:
        parts.append(f"least {number(lr.peak * lr.min_ratio, 3)}")
    return ", ".join(parts)


def _phases(schedule: Schedule) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("active", justify="right", no_wrap=True)
    table.add_column("blocks", overflow="fold")
    table.add_column("unlocks", overflow="fold")
    measured = schedule.margin is not None
    if schedule.lr_schedule:
        table.add_column("lr", justify="right", no_wrap=True)
    if measured:
        table.add_column("predicted rho", justify="right", no_wrap=True)
    for phase in schedule.phases:
        cells = [f"{phase.step:,}", f"{len(phase.active)}/{schedule.depth}", ranges(phase.active), ranges(phase.unlock)]
        if schedule.lr_schedule:
            cells.append(number(phase.lr, 3))
        if measured:
            cells.append(number(phase.predicted_rho, 3))
        table.add_row(*cells)
    return table


def _note(schedule: Schedule) -> Text:
    if schedule.margin is None:
        return Text("")
    return Text("the first phase's rho is at the highest learning rate ahead of it\n", style="dim")
