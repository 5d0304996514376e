"""`curv analyze` and `curv inspect`: one checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvcli.cli import options
from curvcli.cli.app import app, check_outputs, exit_codes
from curvcli.cli.formats import Format, ShortFormat

if TYPE_CHECKING:
    from curvcli.documents import Report


@app.command(
    epilog="Examples:\n\n"
    "`curv analyze sample_checkpoints/hot`\n\n"
    "`curv analyze ckpt/ --data train.bin --tokens 32768 -o report.json --plot curv.png`\n\n"
    "`curv analyze ckpt/ --format json | jq .full.rho`"
)
@options.measuring()
def analyze(
    checkpoint: options.Checkpoint,
    given: dict[str, Any],
    no_depths: Annotated[
        bool, typer.Option("--no-depths", help="Leave out the two curves over depth, about half of the work.")
    ] = False,
    output: options.Output = None,
    plot: options.Plot = None,
    format: options.FormatOption = Format.table,  # noqa: A002
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a checkpoint's curvature: in full, per layer and over depth, against its edge of stability.

    rho is the top eigenvalue of the preconditioned Hessian over the optimizer's threshold: 1 is the edge.
    """
    with exit_codes():
        settings = options.settings(given)
        check_outputs(output, plot)
        from curvcli.cli.progress import reporting

        with reporting(quiet, verbose) as progress:
            progress("importing torch", 0.0)
            from curvcli.analysis.checkpoint import Options, analyze_checkpoint

            report = analyze_checkpoint(checkpoint, Options(**settings, depths=not no_depths), progress)
        from curvcli.documents import write_whole

        if output:
            write_whole(output, report.to_json().encode())
        if plot:
            from curvcli.render.plot import plot as draw

            write_whole(plot, draw(report, plot.suffix[1:].lower()))
        _print(report, format)


@app.command(epilog="Example:\n\n`curv inspect sample_checkpoints/hot`")
def inspect(
    checkpoint: options.Checkpoint,
    data: options.Data = None,
    model: options.Network = None,
    format: options.ShortFormatOption = ShortFormat.table,  # noqa: A002
    json: Annotated[bool, typer.Option("--json", hidden=True)] = False,  # as it was called before --format
) -> None:
    """Show what `curv analyze` would read: of files their headers, and nothing is computed."""
    with exit_codes():
        from curvcli.analysis.checkpoint import inspect_checkpoint

        found = inspect_checkpoint(checkpoint, data, model)
        if json or format is ShortFormat.json:
            from curvcli.documents import dumps

            typer.echo(dumps(found), nl=False)
        else:
            from curvcli.render.facts import show_facts

            show_facts(found)


def _print(report: Report, format: Format) -> None:  # noqa: A002
    if format is Format.table:
        from rich.console import Console

        from curvcli.render.table import show

        show(report, Console())
    else:
        from curvcli.render import TEXT

        typer.echo(TEXT[format.value](report), nl=False)
