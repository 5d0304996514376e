"""CSV: the table of all estimates at full precision."""

from __future__ import annotations

from curvcli.documents import Report
from curvcli.errors import plain
from curvcli.render.frame import frame

# What spreadsheets take for the beginning of a formula, in both widths.
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def csv(report: Report) -> str:
    """One line per estimate; empty where there is no value."""
    table = frame(report)
    for column in table.select_dtypes(["object", "string"]):
        table[column] = table[column].map(cell)
    return table.to_csv(index=False, lineterminator="\n")


def cell(value: object) -> object:
    """A cell of a CSV file: text on one line that no spreadsheet runs, anything else as it is."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
