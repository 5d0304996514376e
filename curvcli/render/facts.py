"""The terminal view of `curv inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.errors import plain


def show_facts(facts: Mapping[str, Any], console: Console | None = None) -> None:
    """Print nested facts as two columns."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    _rows(table, facts, "")
    (console or Console()).print(table)


def _rows(table: Table, facts: Mapping[str, Any], indent: str) -> None:
    for key, value in facts.items():
        parts = [value] if isinstance(value, Mapping) and value else value if isinstance(value, list) else []
        if parts and all(isinstance(part, Mapping) for part in parts):
            table.add_row(Text(f"{indent}{plain(key)}"), "")
            for part in parts:
                _rows(table, part, f"{indent}  ")
        else:
            table.add_row(Text(f"{indent}{plain(key)}"), Text(plain(_shown(value))))


def _shown(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(v) for v in value)
    return str(value)
