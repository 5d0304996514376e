"""Numbers as people read them."""

from __future__ import annotations

from math import floor, log10


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits with thousands separators, as 1,143 or 0.0321 or 2.1e+07; a dash for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = floor(log10(abs(value)))
    if not -4 <= size < 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"
