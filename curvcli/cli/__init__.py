"""The command line: a verb parses, calls and renders. Heavy modules are imported inside the verbs.

Exit codes: 0 done or passed, 1 a gate's rule broken or a schedule that does not fit, 2 could not run (usage, input,
or a bug), 3 a gate unresolved, 130 interrupted.
"""

from __future__ import annotations

from curvcli.cli import analyze, gate, report, schedule, track, watch  # noqa: F401  (each registers its verbs)
from curvcli.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of `curv`."""
    app(prog_name="curv")
