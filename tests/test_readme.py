"""What README shows is what the tool has."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from types import ModuleType

import pytest
from places import ROOT
from real import curv
from typer.main import get_command

import curvcli
from curvcli.cli import app

README = (ROOT / "README.md").read_text()
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


VERBS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb: str) -> None:
    done = curv(verb, "--help")
    assert done.returncode == 0
    assert f"curv {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_readme_shows_every_verb(verb: str) -> None:
    assert any(line.split()[1] == verb for line in COMMANDS), f"README.md says nothing of curv {verb}"


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_cli", ROOT / "docs" / "write_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bag(text: str) -> list[str]:
    """The words alone: another version of typer or rich may set frames and line breaks elsewhere."""
    kept = re.sub(r"[^\w\s.,:;`'\"<>()\[\]{}|/=+*-]|\s\|\s", " ", text)
    return sorted(kept.split())


def test_the_page_of_help_texts_is_up_to_date(writer: ModuleType) -> None:
    page = writer.PAGE.read_text(encoding="utf-8")
    assert ["schedule", "verify"] in writer.verbs()
    for verb in [[], *writer.verbs()]:
        title = " ".join(["curv", *verb])
        section = re.search(rf"^## {title}\n\n```\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
        assert section, f"docs/reference/cli.md has no {title}: run python docs/write_cli.py"
        # One as the script has it, from a process; the others by the same entry point in this one.
        said = curv(*verb, "--help", NO_COLOR="1").stdout if verb else writer.help_of()
        assert bag(section[1]) == bag(said), f"{title} has changed: run python docs/write_cli.py"
    assert page.count("\n## ") == len(writer.verbs()) + 1


def test_the_version_is_that_of_the_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert curvcli.__version__ == project["version"]


def test_every_finding_is_in_the_reference() -> None:
    """Of those whose code is written out where they are made."""
    told, codes = (ROOT / "docs" / "reference" / "findings.md").read_text(), set()
    for file in (ROOT / "curvcli").rglob("*.py"):
        codes |= set(re.findall(r'\bcode="([a-z0-9-]+)"', file.read_text()))
    assert len(codes) > 50
    assert not [code for code in sorted(codes) if not re.search(rf"(?<![\w-]){code}(?![\w-])", told)]
