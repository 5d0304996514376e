"""Markdown of a gate, for a merge request or a job's summary."""

from __future__ import annotations

from curvcli.documents import Gate
from curvcli.errors import counted
from curvcli.render.frame import number
from curvcli.render.markdown import escape
from curvcli.render.style import said


def markdown(gate: Gate) -> str:
    """Outcome, a row a rule, and the report's warnings."""
    subject = gate.subject
    step = "" if subject.step is None else f", step {subject.step:,}"
    stable = "" if subject.stable_lr is None else f", largest stable lr {subject.stable_lr:.2g}"
    tokens = "" if subject.tokens is None else f", {counted(subject.tokens, 'token')}"
    lines = [
        f"### curv gate: {gate.outcome}",
        "",
        f"measured: {escape(subject.checkpoint or subject.path)}{step}{tokens}, verdict {said(subject.verdict)}{stable}",
        *([f"compared with {escape(gate.baseline)}"] if gate.baseline is not None else []),
        "",
        "| rule | limit | value | outcome | why |",
        "|---|--:|--:|---|---|",
    ]
    for outcome in gate.outcomes:
        cells = (outcome.rule, number(outcome.limit), number(outcome.value), outcome.outcome, escape(outcome.message))
        lines.append(f"| {' | '.join(cells)} |")
    if gate.findings:
        lines += ["", *(f"- {escape(finding.code)}: {escape(finding.message)}" for finding in gate.findings)]
    return "\n".join([*lines, ""])
