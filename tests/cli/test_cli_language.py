"""Help speaks one language: whole phrases, one placeholder for one kind of value, one name for one thing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from curvcli.cli import app

# What stands for a value in help; a type's own name, as <path>, says less.
PLACEHOLDERS = {
    "N", "X", "FILE", "PATH", "NAME", "HOW", "B1,B2", "NETWORK", "LOSS", "MODE", "FORMAT", "ORDER", "TIME", "SIZE", "<bool>",
}  # fmt: skip
GATE = "gate"  # has rules, whose help says what the number is of


def commands() -> Iterator[tuple[str, Any]]:
    """Every verb by its words."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        yield name, command
        for inner, below in getattr(command, "commands", {}).items():
            yield f"{name} {inner}", below


VERBS = dict(commands())


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_h_is_help(verb: str) -> None:
    short, long = (CliRunner().invoke(app, [*verb.split(), word]) for word in ("-h", "--help"))
    assert (short.exit_code, long.exit_code) == (0, 0)
    assert short.stdout == long.stdout
    assert "Usage: " in short.stdout


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != GATE])
def test_placeholders_are_of_one_set(verb: str) -> None:
    text = CliRunner().invoke(app, [*verb.split(), "-h"], env={"COLUMNS": "120", "NO_COLOR": "1"}).stdout
    (usage,) = re.findall(r"Usage: .*", text)
    assert usage.partition("[OPTIONS]")[2].strip() == usage.partition("[OPTIONS]")[2].strip().upper()
    found = re.findall(r"│ (--[a-z-]+) +(?:-[a-z] +)?(\S+)", text)
    assert found
    assert {placeholder for _, placeholder in found} <= PLACEHOLDERS


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != GATE])
def test_help_of_an_option_is_a_phrase_that_stands_alone(verb: str) -> None:
    for parameter in VERBS[verb].params:
        if getattr(parameter, "hidden", False) or parameter.name in ("help", "install_completion", "show_completion"):
            continue
        said = (parameter.help or "").partition("  [default")[0]
        assert said[:1].isupper() or said.startswith("curvature.jsonl"), (parameter.name, said)
        assert said.endswith("."), (parameter.name, said)
        assert not said.startswith(("Of ", "As ", "With ")), (parameter.name, said)
        assert len(said.split()) > 2, (parameter.name, said)


def test_one_option_has_one_help_and_placeholder_in_every_verb() -> None:
    found: dict[str, set[tuple[str, str]]] = {}
    # --output and --plot of these say what they write there, --lr and --tokens of a plan mean another thing.
    own = {
        ("watch", "--interval"),
        ("track", "--interval"),
        ("init", "--output"),
        ("report", "--output"),
        ("watch", "--plot"),
        ("schedule", "--lr"),
        ("schedule", "--data"),
        ("schedule", "--tokens"),
    }
    for verb, command in VERBS.items():
        for parameter in command.params:
            for flag in parameter.opts:
                if flag.startswith("--") and flag != "--format" and verb != GATE and (verb, flag) not in own:
                    found.setdefault(flag, set()).add((parameter.help or "", parameter.metavar or ""))
    assert {flag: said for flag, said in found.items() if len(said) > 1} == {}


def test_every_verb_with_output_for_programs_has_format() -> None:
    printing = {"analyze", "inspect", "demo", "doctor", "gate", "track", "compare", "explain", "schedule"}
    assert {verb for verb, command in VERBS.items() if any("--format" in p.opts for p in command.params)} == printing


def test_inspect_gives_json_by_the_option_that_the_others_have(samples: Path) -> None:
    first, old = (
        CliRunner().invoke(app, ["inspect", str(samples / "calm"), *words]) for words in (["--format", "json"], ["--json"])
    )
    assert first.exit_code == old.exit_code == 0
    assert json.loads(first.stdout) == json.loads(old.stdout)
    assert json.loads(first.stdout)["parameters"] == 123_424
    assert "--json" not in CliRunner().invoke(app, ["inspect", "-h"]).stdout
