"""Writes docs/man/curv.1, the manual page: of the same verbs, options and examples that `--help` prints.

Run it when options have changed: python docs/write_man.py. The wheel installs it, so that `man curv` works.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from typer.main import get_command

from curvcli.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "man" / "curv.1"
CODES = {
    "0": "Done, or a gate passed.",
    "1": "A gate's rule is broken, or a schedule does not fit.",
    "2": "It could not run: usage, input, or a bug. One line on stderr says what, where and what to do.",
    "3": "A gate is unresolved, or a time budget was too short.",
    "130": "Interrupted with Ctrl-C.",
}
VARIABLES = {
    "NO_COLOR": "Takes all colour away.",
    "COLUMNS": "Width where there is no terminal.",
    "XDG_CACHE_HOME": "Where reports are kept.",
    "CURV_CACHE_SIZE": "Most that the cache may take, as 500M or 2G.",
    "CURV_TRACEBACK": "Shows the traceback of an internal error.",
}


def page() -> str:
    """The text of the manual page, in man(7)'s macros."""
    command = get_command(app)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    lines = [
        r".\" Written by docs/write_man.py",
        f'.TH CURV 1 "" "curv {version}" "User Commands"',
        ".SH NAME",
        f"curv \\- {_plain(str(command.help)).rstrip('.')}",
        ".SH SYNOPSIS",
        ".B curv",
        ".I COMMAND",
        "[OPTIONS] [ARGUMENTS]",
        ".SH COMMANDS",
    ]
    for words, verb in _verbs(command, ()):
        lines += _command(words, verb)
    for title, entries in (("EXIT STATUS", CODES), ("ENVIRONMENT", VARIABLES)):
        lines.append(f".SH {title}")
        for name, said in entries.items():
            lines += [".TP", f".B {_plain(name)}", _plain(said)]
    lines += [
        ".SH FILES",
        ".TP",
        ".I curv.toml",
        "Data, sequence length and rules of a run, beside or above its checkpoints.",
    ]
    return "\n".join(lines) + "\n"


def _verbs(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, verb in command.commands.items():
        yield (*words, name), verb
        if hasattr(verb, "commands"):
            yield from _verbs(verb, (*words, name))


def _command(words: tuple[str, ...], verb: Any) -> Iterator[str]:
    arguments = [p for p in verb.params if p.opts and not p.opts[0].startswith("-")]
    shown = " ".join(p.metavar or p.name.upper() for p in arguments)
    yield f".SS curv {' '.join(words)} [OPTIONS] {_plain(shown)}".rstrip()
    yield from _paragraphs(verb.help or "")
    for parameter in verb.params:
        if getattr(parameter, "hidden", False):
            continue
        names = ", ".join(f"\\fB{_plain(name)}\\fR" for name in parameter.opts if name.startswith("-"))
        value = "" if getattr(parameter, "is_flag", False) else f"\\fI{_plain(parameter.metavar or _choices(parameter))}\\fR"
        yield ".TP"
        yield f"{names} {value}".strip()
        yield _plain(parameter.help or "")
    yield from _paragraphs(verb.epilog or "")


def _choices(parameter: Any) -> str:
    """What stands for the value of an option without a placeholder: one of several words."""
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)  # typer since it has no click
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(choice.value) for choice in kind)
    return "|".join(getattr(getattr(parameter, "type", None), "choices", ())) or str(parameter.name).upper()


def _paragraphs(text: str) -> Iterator[str]:
    for part in filter(None, text.split("\n\n")):
        yield ".PP"
        example = re.fullmatch(r"`(.*)`", " ".join(part.split()))
        yield from [".nf", f"    {_plain(example[1])}", ".fi"] if example else [_plain(part)]


def _plain(text: str) -> str:
    """One line in which roff finds nothing to obey, and dashes stay what one can copy."""
    line = " ".join(text.replace("`", "").split()).replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{line}" if line.startswith((".", "'")) else line


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
