"""Markdown, for an issue or a merge request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from curvcli.documents import Report
from curvcli.documents.columns import PARTS, Column, Part, parts, shown
from curvcli.errors import counted, plain
from curvcli.render.cells import summary, written
from curvcli.render.frame import number
from curvcli.render.largest_lr import action, told
from curvcli.render.style import said

# Punctuation that Markdown, its tables, HTML or a forge gives a meaning to within a line.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&!#@$])")


def markdown(report: Report) -> str:
    """Verdict, findings and the table of estimates."""
    columns = shown(PARTS, "markdown")
    step = report.checkpoint.step
    lines = [
        f"## curv: {said(report.verdict)}",
        "",
        f"{escape(report.checkpoint.path)}, step {'unknown' if step is None else step}, {escape(report.optimizer.name)}, "
        f"lr {number(report.optimizer.lr)}, preconditioner {report.optimizer.preconditioner}, "
        f"{counted(report.data.tokens, 'token')}",
        "",
        *(f"- **{escape(finding.code)}** ({finding.severity}): {escape(finding.message)}" for finding in report.findings),
        *[f"- {escape(label)}: {escape(value)}" for label, value in summary(report)],
        *[f"- {escape(line)}" for line in [*told(report), f"what to do: {action(report)}"]],
        "",
        *table(columns, [[_cell(column, part) for column in columns] for part in parts(report)]),
    ]
    cost = report.cost
    lines += ["", f"{cost.hvps} Hessian-vector products, {cost.seconds:.1f} s on {escape(cost.device)}", ""]
    return "\n".join(lines)


def table(columns: Sequence[Column[Any]], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, numbers to the right."""
    return [
        f"| {' | '.join(column.label for column in columns)} |",
        f"|{'|'.join('---' if column.kind == 'word' else '--:' for column in columns)}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _cell(column: Column[Part], part: Part) -> str:
    return escape(written(column, part, digits=4, missing=""))


def escape(text: str) -> str:
    """Text from a file as plain words on one line, in a table too."""
    return _SPECIAL.sub(r"\\\1", " ".join(plain(text).split()))
