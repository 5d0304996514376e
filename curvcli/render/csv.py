"""CSV, RFC 4180: values at full precision, empty where there is none."""

from __future__ import annotations

import csv as standard
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO

from curvcli.documents import Report
from curvcli.errors import plain
from curvcli.render.cells import records

# What spreadsheets take for the beginning of a formula, in both widths.
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def csv(report: Report) -> str:
    """One line per estimate."""
    found = records(report)
    return write(list(found[0]), found, ending="\n")


def write(columns: Sequence[str], rows: Iterable[Mapping[str, object]], *, ending: str = "\r\n") -> str:
    """A head and a line per row; a row that lacks a column has an empty cell there.

    Args:
        ending: of a line. Those of a report have always ended in a line feed alone, and who reads them may go by it.
    """
    text = StringIO()
    writer = standard.DictWriter(text, columns, lineterminator=ending)
    writer.writerow({column: cell(column) for column in columns})
    writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def lines(rows: Iterable[Sequence[object]]) -> str:
    """A line per row of values, which end in a line feed."""
    text = StringIO()
    standard.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def cell(value: object) -> object:
    """A cell of a CSV file: text on one line that no spreadsheet runs, anything else as it is."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
