"""`curv compare`: two checkpoints side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvcli.cli import options
from curvcli.cli.app import app, check_outputs, exit_codes
from curvcli.cli.formats import Format

if TYPE_CHECKING:
    from curvcli.documents import Comparison


@app.command(
    epilog="Examples:\n\n"
    "`curv compare before.json after.json`\n\n"
    "`curv compare run/checkpoint-1000 run/checkpoint-2000 --data train.bin --format markdown`"
)
@options.measuring()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Report or checkpoint, the earlier one.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Report or checkpoint, the later one.")],
    given: dict[str, Any],
    output: options.Output = None,
    format: options.FormatOption = Format.table,  # noqa: A002
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what changed between two checkpoints, layer by layer, as ratios of the top eigenvalue.

    Checkpoints are measured on the same tokens.
    """
    with exit_codes():
        check_outputs(output, None)
        from curvcli.analysis.compare import compare as compared
        from curvcli.cli.progress import reporting
        from curvcli.documents import write_whole

        quick = first.suffix == second.suffix == ".json"  # no bar where nothing is measured
        with reporting(quiet or quick, verbose) as progress:
            found = compared(first, second, progress=progress, **options.settings(given))
        if output:
            write_whole(output, found.to_json().encode())
        _print(found, format)


def _print(found: Comparison, format: Format) -> None:  # noqa: A002
    from curvcli.render.compare import show, to_csv, to_markdown

    if format is Format.table:
        from curvcli.cli.screen import terminal

        show(found, terminal())
    elif format is Format.json:
        typer.echo(found.to_json(), nl=False)
    else:
        typer.echo({Format.csv: to_csv, Format.markdown: to_markdown}[format](found), nl=False)
