"""`curv compare`: two checkpoints, or two runs, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvcli.cli import options
from curvcli.cli.app import app, check_outputs, exit_codes
from curvcli.cli.formats import Format

if TYPE_CHECKING:
    from curvcli.documents import Comparison, TrackComparison


@app.command(
    epilog="Examples:\n\n"
    "`curv compare before.json after.json`\n\n"
    "`curv compare run/checkpoint-1000 run/checkpoint-2000 --data train.bin --format markdown`\n\n"
    "`curv compare calm/track.json hot/track.json --plot both.png`"
)
@options.measuring(ranks=False)
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Report or checkpoint, the earlier one; or a track.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Report or checkpoint, the later one; or the other track.")],
    given: dict[str, Any],
    output: options.Output = None,
    plot: options.Plot = None,
    format: options.FormatOption = Format.table,  # noqa: A002
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what changed between two checkpoints, layer by layer, as ratios of the top eigenvalue.

    Checkpoints are measured on the same tokens. Of two tracks it shows both runs step by step, and which is further below
    its edge since when.
    """
    with exit_codes():
        check_outputs(output, plot)
        from curvcli.analysis.compare import compare as compared
        from curvcli.cli.progress import reporting
        from curvcli.documents import write_whole

        quick = first.suffix == second.suffix == ".json"  # no bar where nothing is measured
        with reporting(quiet or quick, verbose) as progress:
            found = compared(first, second, progress=progress, **options.settings(given))
        if output:
            write_whole(output, found.to_json().encode())
        if plot:
            found.plot(plot)
        _print(found, format, verbose)


def _print(found: Comparison | TrackComparison, format: Format, verbose: bool) -> None:  # noqa: A002
    from curvcli.documents import Comparison
    from curvcli.render import compare, compare_tracks

    if format is Format.json:
        typer.echo(found.to_json(), nl=False)
    elif format is Format.table:
        from curvcli.cli.screen import terminal

        if isinstance(found, Comparison):
            compare.show(found, terminal())
        else:
            compare_tracks.show(found, terminal(), verbose=verbose)
    elif isinstance(found, Comparison):
        typer.echo({Format.csv: compare.to_csv, Format.markdown: compare.to_markdown}[format](found), nl=False)
    else:
        both = {Format.csv: compare_tracks.to_csv, Format.markdown: compare_tracks.to_markdown}
        typer.echo(both[format](found), nl=False)
