"""CSV: the table of all estimates at full precision."""

from __future__ import annotations

from curvcli.report.frame import frame
from curvcli.results import Report


def csv(report: Report) -> str:
    """One line per estimate; empty where there is no value."""
    return frame(report).to_csv(index=False, lineterminator="\n")
