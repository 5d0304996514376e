"""`curv init`: a first curv.toml for a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curvcli.cli import options
from curvcli.cli.app import app, check_outputs, exit_codes


@app.command(
    epilog="Examples:\n\n`curv init run/`\n\n`curv init run/ --data 'shards/train_*.bin'`\n\n"
    "Then `curv doctor run/` says whether all is there."
)
def init(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory or checkpoint.")],
    data: options.Data = None,
    model: options.Network = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE",
            help="Write the configuration here.  [default: curv.toml in the working directory or, elsewhere, in RUN]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:  # fmt: skip
    """Write a curv.toml for a run: its data and sequence length, as far as files tell, and rules for `curv gate`.

    What is in no file stands in it as a comment, with what to do.
    """
    with exit_codes():
        from curvcli.analysis.init import initial

        found = initial(run, data=data, model=model, output=output, force=force)
        # Only now is it known where the file goes.
        check_outputs(found.place, None)
        from curvcli.documents import write_whole
        from curvcli.errors import plain

        write_whole(found.place, found.text.encode())
        typer.echo(plain(f"wrote {found.place}"))
        for note in found.notes:
            typer.echo(plain(f"curv: {note}"), err=True)
