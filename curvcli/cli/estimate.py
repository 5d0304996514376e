"""What `--estimate` prints, of a checkpoint or a run."""

from __future__ import annotations

from typing import Any

import typer

from curvcli.errors import UsageError


def check(format: str, beside: dict[str, object]) -> None:  # noqa: A002
    """Raises UsageError where a format is none of an estimate's, or an option asks for what it does not make.

    Args:
        beside: options by their flags; None is not given.
    """
    if given := [flag for flag, value in beside.items() if value is not None]:
        raise UsageError(f"--estimate measures nothing and takes no {given[0]}", hint=f"drop {given[0]}, or --estimate")
    # An estimate has no rows of values for CSV or Markdown.
    if format not in ("table", "json"):
        raise UsageError(f"--estimate has no --format {format}", hint="table or json")


def show(found: dict[str, Any], format: str) -> None:  # noqa: A002
    """As a small table, or JSON at full precision."""
    if format == "json":
        from curvcli.documents import dumps

        typer.echo(dumps(found), nl=False)
        return
    from curvcli.cli.screen import terminal
    from curvcli.render.facts import show_facts
    from curvcli.render.frame import number

    if "devices" in found:
        each = {f"{row['devices']} device{'s' * (row['devices'] > 1)}": _of_device(row) for row in found["devices"]}
        show_facts({"checkpoint": found["checkpoint"], "parameters": found["parameters"], **each}, terminal())
        return
    memory = {key: _size(size) for key, size in found["memory_bytes"].items()}
    rounded = {key: number(value, 2) if isinstance(value, float) else value for key, value in found.items()}
    facts = {key.replace("_", " "): value for key, value in rounded.items() if key != "memory_bytes"}
    show_facts({**facts, "memory": memory}, terminal())


def _of_device(row: dict[str, int]) -> dict[str, str]:
    held = {"slices held": "slices", "gathered for an exact product": "gathered", "peak beside the graph": "peak"}
    moved = {"received a product": "moved", "of the full model": "moved_full"}
    block = {
        "one block gathered at a time": "block",
        "its peak": "peak_by_block",
        "and with a basis elsewhere": "least_by_block",
    }
    more = {"received so": "moved_by_block", "of the full model so": "moved_full_by_block"}
    return {key: _size(row[name]) if row[name] else "0" for key, name in {**held, **moved, **block, **more}.items()}


def _size(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.3g} {name}"
