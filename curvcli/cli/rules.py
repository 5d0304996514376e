"""The flags of the gate's rules, one for each rule that a number has."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from curvcli.documents.columns import LimitKind, rules

_TYPES: dict[LimitKind, type] = {"limit": float, "percent": float, "count": int, "flag": bool}


def rule_options(panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each rule where it has the parameter `rules`, which takes their values as a dict.

    Args:
        panel: of the help, that they stand in.
    """
    known = rules()
    flags = [
        Parameter(
            rule.field,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _TYPES[rule.kind] | None,
                # Named, as a switch would get a --no- of its own.
                typer.Option(f"--{rule.name}", metavar=rule.metavar, help=rule.help, rich_help_panel=panel),
            ],
        )
        for rule in known
    ]

    def give(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[Parameter] = []
        for parameter in signature(command).parameters.values():
            own = parameter.replace(annotation=hints[parameter.name], kind=Parameter.KEYWORD_ONLY)
            parameters += flags if parameter.name == "rules" else [own]

        @wraps(command)
        def with_rules(**values: Any) -> None:
            command(rules={rule.field: values.pop(rule.field) for rule in known}, **values)

        # typer looks at these two attributes, not at the wrapped function.
        with_rules.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        with_rules.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_rules

    return give
