"""The terminal view of `curv doctor`: a line for each thing that was looked at, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.errors import plain
from curvcli.render.style import COLOURS

# Without colour the word says it, too.
_MARKS = {"ok": ("ok", "stable"), "info": ("-", "info"), "warning": ("!", "edge"), "error": ("no", "unstable")}


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print what `curvcli.analysis.doctor` found, as its JSON has it."""
    for title in ("machine", "extras", "checkpoint"):
        if found[title]:
            console.print(Text(title, style="bold"))
            console.print(_table(found[title]))
            console.print()
    if not found["able"]:
        console.print(Text("It cannot be measured as it is: see the lines marked no.", style=COLOURS["unstable"]))
    if found["commands"]:
        console.print(Text("next:"))
        for command in found["commands"]:
            console.print(Text(f"  {plain(command)}"), soft_wrap=True)  # to be copied whole


def _table(checks: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        mark, meaning = _MARKS[check["status"]]
        text = Text(plain(check["found"]))
        if check["remedy"]:
            text.append(f"; {plain(check['remedy'])}", style="bold")
        table.add_row(Text(mark, style=COLOURS[meaning]), Text(plain(check["what"])), text)
    return table
