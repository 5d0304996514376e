"""The cells of every table, made of the columns of `documents.columns`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from curvcli.documents import Record, Report
from curvcli.documents.columns import PARTS, POINTS, RECORDS, Column, Measurement, Part, Value, parts, shown
from curvcli.judge.level import alert_of
from curvcli.judge.limits import certified
from curvcli.judge.verdict import verdict_of
from curvcli.render.frame import number
from curvcli.render.style import said
from curvcli.render.track_points import Row

T = TypeVar("T")


def written(column: Column[Any], item: Any, *, digits: int | None = None, missing: str = "-") -> str:
    """A value as people read it, without what is put after it.

    Args:
        digits: significant digits, instead of the column's own.
        missing: what stands for a count that is not known.
    """
    value = column.get(item)
    if column.kind == "word":
        return "" if value is None else str(value)
    if column.kind == "count":
        return missing if value is None else f"{value:,}"
    return column.before(item) + number(None if isinstance(value, str) else value, digits or column.digits)


@dataclass(frozen=True)
class Cell:
    """A field of a page's table: its text, what it is sorted by ("" where there is no value), and its classes."""

    text: str
    value: Value
    classes: str
    word: bool


def part_cells(part: Part, columns: Sequence[Column[Part]]) -> list[Cell]:
    """An estimate's line in a page."""
    return [_cell(column, part, weak=column.key == "status" and not certified(part.estimate)) for column in columns]


def point_cells(row: Row, columns: Sequence[Column[Measurement]]) -> list[Cell]:
    """A checkpoint's line in a page: what has not converged has a question mark."""
    cells = []
    for column in columns:
        doubt = column.solved and row.report is not None and not row.certified
        if column.key == "verdict":
            cells.append(Cell(row.verdict, row.verdict, "" if row.certified else "weak", word=True))
        else:
            cells.append(_cell(column, row.measured, weak=doubt, mark="?" if doubt else ""))
    return cells


def record_columns(records: Sequence[Record]) -> list[Column[Record]]:
    """Columns of a log's table: the record's own, and the verdict and the level that follow from it."""
    own = present(RECORDS, records)
    judged: tuple[Column[Record], ...] = (
        Column("verdict", "verdict", lambda r: None if r.idle else said(verdict_of(r)), kind="word", leaves=None),
        Column("level", "level", lambda r: alert_of(r).level, kind="word", leaves=None),
    )
    return [*own[:1], *judged, *own[1:]]


def record_cells(record: Record, columns: Sequence[Column[Record]]) -> list[Cell]:
    """A record's line in a page: what has not converged has a question mark."""
    cells = []
    for column in columns:
        doubt = column.solved and column.get(record) is not None and not certified(record)
        found = _cell(column, record, weak=doubt, mark="?" if doubt else "")
        cells.append(found if column.leaves is None else replace(found, classes=f"{found.classes} aside".strip()))
    return cells


def summary(report: Report) -> list[tuple[str, str]]:
    """Label and value of the report's numbers that no sentence of its own tells; a question mark says not to rely on one."""
    item, sure = Measurement(report), certified(report.judged)
    return [
        (column.label, written(column, item) + ("" if sure or not column.solved else "?"))
        for column in shown(POINTS, "summary")
        if column.get(item) is not None
    ]


def records(report: Report) -> list[dict[str, Value]]:
    """A record per estimate, by the columns' keys, at full precision."""
    return [{column.key: column.get(part) for column in shown(PARTS, "csv")} for part in parts(report)]


def present(columns: Sequence[Column[T]], items: Sequence[T]) -> list[Column[T]]:
    """Those of the columns that a table of these items has: an optional one only where an item has a value."""
    return [c for c in columns if not c.optional or any(c.get(item) is not None for item in items)]


def _cell(column: Column[Any], item: Any, *, weak: bool, mark: str = "") -> Cell:
    mark = mark or column.after(item).strip()
    value = column.get(item)
    classes = [*["n"][: column.kind != "word"], *["weak"][:weak], *["surged"][: mark == "!"]]
    text = written(column, item, missing="") + (f" {mark}" if mark else "")
    return Cell(text, "" if value is None else value, " ".join(classes), column.kind == "word")
