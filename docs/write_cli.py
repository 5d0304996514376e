"""Writes docs/reference/cli.md: the help of every verb as the tool itself prints it, at 80 columns and without colour.

Run it when options have changed, in an environment where this copy of curv is installed: python docs/write_cli.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.main import get_command

from curvcli.cli import app

PAGE = Path(__file__).with_name("reference") / "cli.md"
HEAD = """# The command line

What `curv VERB --help` prints, word for word. `python docs/write_cli.py` writes this page; a test holds it against the
tool. Exit codes, colours, narrow terminals and completion: [terminal](terminal.md).
"""
# What would give help another width or colour than a reader's.
_DROP = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH", "TYPER_USE_RICH")


def verbs() -> list[list[str]]:
    """Every command as its words, in the order in which `curv --help` has them."""
    found = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        found.append([name])
        found += [[name, inner] for inner in getattr(command, "commands", {})]
    return found


def help_of(*words: str) -> str:
    """What `curv WORDS --help` prints."""
    environment = {name: value for name, value in os.environ.items() if name not in _DROP}
    curv = [sys.executable, "-c", "from curvcli.cli import main; main()"]
    done = subprocess.run(  # noqa: S603
        [*curv, *words, "--help"],
        env={**environment, "COLUMNS": "80", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")


def page() -> str:
    """The text of docs/reference/cli.md."""
    parts = [HEAD]
    for words in [[], *verbs()]:
        parts.append(f"## {' '.join(['curv', *words])}\n\n```\n{help_of(*words)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
