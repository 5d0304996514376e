"""Markdown, for an issue or a merge request."""

from __future__ import annotations

import re

from curvcli.documents import Report
from curvcli.errors import plain
from curvcli.render.frame import frame, number

# Punctuation that Markdown, its tables, HTML or a forge gives a meaning to within a line.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&!#@$])")


def markdown(report: Report) -> str:
    """Verdict, findings and the table of estimates."""
    import pandas as pd

    step = report.checkpoint.step
    lines = [
        f"## curv: {report.verdict}",
        "",
        f"{escape(report.checkpoint.path)}, step {'unknown' if step is None else step}, {escape(report.optimizer.name)}, "
        f"lr {number(report.optimizer.lr)}, preconditioner {report.optimizer.preconditioner}, {report.data.tokens:,} tokens",
        "",
        *(f"- **{escape(finding.code)}** ({finding.severity}): {escape(finding.message)}" for finding in report.findings),
        "",
        "| part | name | parameters | lambda | rho | residual | most negative | status |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in frame(report).astype(object).to_dict("records"):
        values = [None if pd.isna(row[key]) else row[key] for key in ("eigenvalue", "rho", "residual", "most_negative")]
        parameters = "" if pd.isna(row["parameters"]) else f"{row['parameters']:,}"
        cells = " | ".join(number(value) for value in values[:3])
        # A Ritz value is an upper bound of the smallest eigenvalue, and no more than that before it has converged.
        bound = "≤ " if row["most_negative_status"] == "unconverged" else ""
        cells += f" | {bound}{number(values[3])}"
        lines.append(f"| {row['part']} | {escape(row['name'])} | {parameters} | {cells} | {row['status']} |")
    cost = report.cost
    lines += ["", f"{cost.hvps} Hessian-vector products, {cost.seconds:.1f} s on {escape(cost.device)}", ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text from a file as plain words on one line, in a table too."""
    return _SPECIAL.sub(r"\\\1", " ".join(plain(text).split()))
