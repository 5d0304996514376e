"""Workflow commands of GitHub Actions: an annotation for every rule that was not passed.

A runner takes a line that starts with "::" for a command, and so for a forged one where text from a file could
begin a line of its own. Escaping is that of the runner's own toolkit (actions/toolkit, core/src/command.ts).
"""

from __future__ import annotations

from curvcli.documents import Gate
from curvcli.errors import counted, plain


def github(gate: Gate) -> str:
    """One line an annotation, and a last line for the log that holds nothing from a file."""
    lines = []
    for outcome in gate.outcomes:
        if outcome.outcome == "passed":
            continue
        unresolved = {"report": "warning", "fail": "error", "pass": "notice"}[gate.unresolved]
        level = "error" if outcome.outcome == "broken" else unresolved
        title = escape_property(f"curv gate: {outcome.rule} {outcome.outcome}")
        lines.append(f"::{level} title={title}::{escape_data(plain(f'{gate.subject.path}: {outcome.message}'))}")
    lines.append(f"curv gate: {gate.outcome}, {counted(len(gate.outcomes), 'rule')}, exit code {gate.exit_code}")
    return "\n".join(lines) + "\n"


def escape_data(text: str) -> str:
    """The message of a command. Percent first, as it begins the other escapes."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """The value of a command's property."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")
