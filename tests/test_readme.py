"""What README shows is what the tool has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from curvcli.cli import app

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
SHOWN = re.findall(r"^(?:\$ )?(curv .*)$", README, re.MULTILINE)
COMMANDS = sorted({line.split("#")[0].split("|")[0].strip() for line in SHOWN})


def test_commands_were_found() -> None:
    assert len(COMMANDS) >= 5
    assert "<!-- test line -->" in README


@pytest.mark.parametrize("line", COMMANDS)
def test_shown_commands_exist(line: str) -> None:
    _, verb, *arguments = shlex.split(line)
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {a for a in arguments if a.startswith("-")} <= known


@pytest.mark.parametrize("verb", ["analyze", "compare", "gate", "inspect", "report", "schedule", "schema", "track", "watch"])
def test_help_has_examples(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert f"curv {verb} " in result.stdout
