"""Markdown of a track, for an issue or a merge request."""

from __future__ import annotations

from curvcli.documents import Track
from curvcli.documents.columns import POINTS, shown
from curvcli.render.cells import present, written
from curvcli.render.markdown import escape, table
from curvcli.render.track_points import rows, run_verdict


def markdown(track: Track) -> str:
    """The verdict on the run and what to do, findings, and a row a checkpoint."""
    run, found = run_verdict(track), rows(track)
    columns = present(shown(POINTS, "markdown"), [row.measured for row in found])
    lines = [f"## curv: run {run.name if run else 'not measured'}", "", escape(track.run), ""]
    if run:
        lines += [*(f"- {escape(reason)}" for reason in run.reasons), f"- **what to do**: {escape(run.advice)}"]
    lines += [
        f"- **{escape(finding.code)}** ({finding.severity}): {escape(finding.message)}"
        for finding in track.findings
        if not finding.code.startswith("run-")
    ]
    cells = [
        [
            row.verdict
            if column.key == "verdict"
            else escape(written(column, row.measured, missing=""))
            + (
                "?"
                if column.solved and not row.certified and column.get(row.measured) is not None
                else column.after(row.measured)
            )
            for column in columns
        ]
        for row in found
    ]
    lines += ["", *table(columns, cells), ""]
    return "\n".join(lines)
