"""`curv doctor`: what this machine and a checkpoint allow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curvcli.cli import options
from curvcli.cli.app import app, exit_codes
from curvcli.cli.formats import ShortFormat


@app.command(
    epilog="Exit codes: 0 it can be measured, 2 it cannot, or bad usage.\n\n"
    "Examples:\n\n"
    "`curv doctor`\n\n"
    "`curv doctor ckpt/ --data train.bin`"
)
def doctor(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CHECKPOINT", help="Checkpoint, run directory or URL.  [default: the machine alone]"),
    ] = None,
    data: options.Data = None,
    model: options.Network = None,
    format: options.ShortFormatOption = ShortFormat.table,  # noqa: A002
) -> None:
    """Say what this machine and a checkpoint allow, what is missing, and the command to run next.

    Of files the headers are read; nothing is measured.
    """
    # Told behind `exit_codes`, which takes an exit for an error.
    able = True
    with exit_codes():
        from curvcli.analysis.doctor import examine

        found = examine(checkpoint, data, model).plain()
        able = found["able"]
        if format is ShortFormat.json:
            from curvcli.documents import dumps

            typer.echo(dumps(found), nl=False)
        else:
            from curvcli.cli.screen import terminal
            from curvcli.render.doctor import show

            show(found, terminal())
    if not able:
        raise typer.Exit(2)
