"""The CSV of a table of a page: what the reader sees, numbers at full precision."""

from __future__ import annotations

from html.parser import HTMLParser

from curvcli.render.csv import cell, lines

# What stands around a number and says how far it may be relied on.
_BOUND, _DOUBT = "≤ ", " ?"


def of_table(html: str) -> str:
    """The CSV of a <table> by our own templates: a line of headings, and a line per row.

    A number is the cell's own value, and not its rounded text; a bound keeps its sign and what is not to be relied on its
    question mark, which keeps a spreadsheet from taking either for a number. Missing values are empty, and no text is a
    formula.
    """
    found = _Cells()
    found.feed(html)
    found.close()
    return lines(found.rows)


class _Cells(HTMLParser):
    """The cells of a table, by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[object]] = []
        self._text: list[str] | None = None
        self._value: str | None = None
        self._spanned = 1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A row begins, or a cell."""
        given = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td") and given.get("class") != "bar":  # a bar is a picture of another cell
            self._text = []
            self._value = given.get("data-value")
            self._spanned = int(given.get("colspan") or 1)

    def handle_data(self, data: str) -> None:
        """Text of the cell that is open."""
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        """The cell is whole."""
        if tag not in ("th", "td") or self._text is None:
            return
        text, self._text = " ".join("".join(self._text).split()), None
        if self._value is None:
            written = cell(text)
        else:
            before = _BOUND if text.startswith(_BOUND) else ""
            written = before + self._value + (_DOUBT if text.endswith(_DOUBT) else "") if self._value else ""
        self.rows[-1] += [written, *[""] * (self._spanned - 1)]
