"""Every estimate of a report as one table, and numbers as people read them."""

from __future__ import annotations

from math import floor, log10
from typing import TYPE_CHECKING, Any

from curvcli.documents import Estimate, Report

if TYPE_CHECKING:
    import pandas as pd


def frame(report: Report) -> pd.DataFrame:
    """`records` as a table: columns part, index, name, parameters, and an Estimate's."""
    import pandas as pd  # here, because numbers are shown by verbs that need no table

    return pd.DataFrame(records(report)).astype({"index": "Int64", "parameters": "Int64", "hvps": "Int64"})


def records(report: Report) -> list[dict[str, Any]]:
    """A record per estimate: part (full, ends, layer, restricted, truncated), index, name, parameters, and its fields."""

    def row(part: str, index: int | None, name: str, parameters: int | None, estimate: Estimate) -> dict[str, Any]:
        values = {key: getattr(estimate, key) for key in Estimate.model_fields}
        return {"part": part, "index": index, "name": name, "parameters": parameters, **values}

    rows = [row("full", None, "full model", report.checkpoint.parameters, report.full)]
    rows += [row("ends", None, e.name, e.parameters, e) for e in (report.outside,) if e]
    rows += [row("layer", e.index, e.name, e.parameters, e) for e in report.layers]
    rows += [row("restricted", e.depth, f"depth {e.depth}", None, e) for e in report.cumulative.restricted]
    return rows + [row("truncated", e.depth, f"depth {e.depth}", None, e) for e in report.cumulative.truncated]


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
