"""Writes the rules of the gate into action.yml: its inputs, their variables, and the flags that they become.

Run it when a rule has changed: python docs/write_action.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from curvcli.documents.columns import GateRule, rules

ACTION = Path(__file__).resolve().parent.parent / "action.yml"


def _input(rule: GateRule) -> str:
    flag = rule.kind == "flag"
    text = f"true: {rule.help[0].lower()}{rule.help[1:]}" if flag else rule.help
    text = json.dumps(text) if re.search(r"^\W|: | #", text) else text  # what YAML would take for its own
    return f'  {rule.name}:\n    description: {text}\n    default: "{"false" if flag else ""}"\n'


def _variable(rule: GateRule) -> str:
    return f"        {_name(rule)}: ${{{{ inputs.{rule.name} }}}}\n"


def _argument(rule: GateRule) -> str:
    if rule.kind == "flag":
        return f'        if [ "${_name(rule)}" = true ]; then arguments+=(--{rule.name}); fi\n'
    return f'        add --{rule.name} "${_name(rule)}"\n'


def _name(rule: GateRule) -> str:
    return f"CURV_{rule.field.upper()}"


_PARTS: dict[str, Callable[[GateRule], str]] = {"inputs": _input, "variables": _variable, "arguments": _argument}


def action(text: str) -> str:
    """The text of action.yml with the rules as they are now, between its comments that say so."""
    for part, write in _PARTS.items():
        pattern = re.compile(rf"(^ *# {part} of the rules: .*\n)(?:.*\n)*?( *# end of the {part}\n)", re.MULTILINE)
        made = "".join(map(write, rules()))
        text, found = pattern.subn(lambda match, made=made: f"{match[1]}{made}{match[2]}", text)
        if found != 1:
            raise ValueError(f"{ACTION.name} has {found} places for the {part} of the rules, and not one")
    return text


if __name__ == "__main__":
    ACTION.write_text(action(ACTION.read_text(encoding="utf-8")), encoding="utf-8")
