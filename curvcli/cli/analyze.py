"""`curv analyze` and `curv inspect`: one checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvcli.analysis.launch import apart, joined, leads
from curvcli.cli import estimate as estimates
from curvcli.cli import options
from curvcli.cli.app import app, check_outputs, exit_codes, readers_may_leave
from curvcli.cli.formats import Format, ShortFormat
from curvcli.cli.progress import Told, reporting, told_early
from curvcli.errors import UsageError, plain

if TYPE_CHECKING:
    from rich.text import Text

    from curvcli.documents import Report


@app.command(
    epilog="Exit codes: 0 measured, 2 bad usage or input, 3 the budget was too short for the full model.\n\n"
    "Examples:\n\n"
    "`curv analyze sample_checkpoints/hot`\n\n"
    "`curv analyze ckpt/ --data train.bin --tokens 32768 -o report.json --plot curv.png`\n\n"
    "`curv analyze ckpt/ --format json | jq .full.rho`"
)
@options.measuring()
def analyze(
    checkpoint: options.Checkpoint,
    given: dict[str, Any],
    no_depths: Annotated[
        bool, typer.Option("--no-depths", help="Leave out the curves over depth, up to half of the work.")
    ] = False,
    truncated: Annotated[
        bool,
        typer.Option(
            "--truncated", help="Measure the networks cut short, wherever in training.  [default: near initialisation]"
        ),
    ] = False,
    no_truncated: Annotated[bool, typer.Option("--no-truncated", help="Leave out the networks cut short.")] = False,
    budget: options.Budget = None,
    estimate: options.Estimate = False,
    output: options.Output = None,
    plot: options.Plot = None,
    format: options.FormatOption = Format.table,  # noqa: A002
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a checkpoint's curvature: in full, per layer and over depth, against its edge of stability.

    rho is the top eigenvalue of the preconditioned Hessian over the optimizer's threshold: 1 is the edge. The verdict is
    shown as soon as it is known, layers and depths follow.
    """
    started = time.monotonic()  # before imports, which a budget has in it
    out_of_time = False  # told behind `exit_codes`, which takes an exit for an error
    with exit_codes(), joined():
        settings = {**options.settings(given), "depths": not no_depths, "truncated": _either(truncated, no_truncated)}
        seconds = options.seconds(budget)
        check_outputs(output, plot)
        if estimate:
            estimates.check(format.value, {"--output": output, "--plot": plot, "--budget": budget})
            if leads():
                _estimate(checkpoint, settings, format, quiet, verbose)
            return
        from curvcli.analysis.budget import measure

        with reporting(quiet, verbose) as progress:
            early = Early(progress) if format is Format.table and leads() else None
            report, reason = measure(
                checkpoint, settings, started=started, seconds=seconds, tell=progress,
                on_verdict=early or told_early(progress),
            )  # fmt: skip
        out_of_time = report is None
        if not leads():
            pass
        elif report is None:
            typer.echo(plain(f"curv: {reason}"), err=True)
        else:
            _write(report, output, plot)
            with readers_may_leave():
                print_report(report, format, early.shown if early else None, verbose)
    if out_of_time:
        raise typer.Exit(3)


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
        from curvcli.analysis.inspection import inspect_checkpoint

        found = inspect_checkpoint(checkpoint, data, model)
        if json or format is ShortFormat.json:
            from curvcli.documents import dumps

            typer.echo(dumps(found), nl=False)
        else:
            from curvcli.cli.screen import terminal
            from curvcli.render.facts import show_facts

            show_facts(found, terminal())


class Early:
    """Prints a report's head as soon as it is known; the progress goes on below it."""

    def __init__(self, progress: Told) -> None:
        self.progress = progress
        self.shown: Text | None = None

    def __call__(self, report: Report) -> None:
        """Print the head, once."""
        from curvcli.cli.screen import terminal
        from curvcli.render.headline import head

        if self.shown is None:  # once: where memory ran out since, it is measured again
            with self.progress.aside(), readers_may_leave():  # who want the documents all the same
                terminal().print(head(report))
            self.shown = head(report)


def _either(wanted: bool, unwanted: bool) -> bool | None:
    if wanted and unwanted:
        raise UsageError("--truncated and --no-truncated contradict each other", hint="drop one of them")
    return True if wanted else False if unwanted else None


def _estimate(checkpoint: Path, settings: dict[str, Any], format: Format, quiet: bool, verbose: bool) -> None:  # noqa: A002
    with apart(), reporting(quiet, verbose) as progress:
        progress("importing torch", 0.0)
        from curvcli.analysis.checkpoint import Options
        from curvcli.analysis.estimate import estimate_checkpoint

        found = estimate_checkpoint(checkpoint, Options(**settings), progress)
    estimates.show(found, format.value)


def _write(report: Report, output: Path | None, plot: Path | None) -> None:
    from curvcli.documents import write_whole

    if output:
        write_whole(output, report.to_json().encode())
    if plot:
        from curvcli.render.plot import plot as draw

        write_whole(plot, draw(report, plot.suffix[1:].lower()))


def print_report(report: Report, format: Format, begun: Text | None, verbose: bool) -> None:  # noqa: A002
    """What stdout gets of a report; `begun` is the head that stands there already."""
    if format is Format.table:
        from curvcli.cli.screen import terminal
        from curvcli.render.table import show

        show(report, terminal(), begun=begun, verbose=verbose)
    else:
        from curvcli.render import TEXT

        typer.echo(TEXT[format.value](report), nl=False)
