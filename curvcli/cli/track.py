"""`curv track` and `curv compare`: a run over its checkpoints, and two checkpoints side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvcli.cli import options
from curvcli.cli.app import app, check_outputs, exit_codes, starts_as_json
from curvcli.cli.formats import Format, TrackFormat
from curvcli.errors import InputError, UsageError, plain

if TYPE_CHECKING:
    from curvcli.documents import Comparison, Report, Track


@app.command(
    epilog="Examples:\n\n"
    "`curv track sample_checkpoints/hot --plot hot.png`\n\n"
    "`curv track 'out/ckpt*.pt' --data train.bin -o track.json && curv gate track.json --max-surge 2`"
)
@options.measuring()
def track(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or a pattern in quotes.")],
    given: dict[str, Any],
    last: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the newest N checkpoints.")] = None,
    surge: Annotated[
        float, typer.Option(metavar="X", min=1.01, max=1e9, help="rho over the median before it that is marked.")
    ] = 2.0,
    window: Annotated[int, typer.Option(metavar="N", min=2, help="Certified points that the median is over.")] = 5,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure all, and keep nothing.")] = False,
    output: options.Output = None,
    plot: options.Plot = None,
    format: Annotated[  # noqa: A002
        TrackFormat, typer.Option(metavar="FORMAT", help="What stdout gets: table, json, csv.")
    ] = TrackFormat.table,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure all checkpoints of a run in step order, and mark where curvature surges.

    Reports are kept by content: a second call pays only for what is new, and an interrupted one goes on.
    """
    with exit_codes():
        settings = options.settings(given)
        check_outputs(output, plot)
        from curvcli.cli.progress import reporting

        with reporting(quiet, verbose) as progress:
            progress("importing torch", 0.0)
            from curvcli.analysis.cache import FileCache, NoCache
            from curvcli.analysis.checkpoint import Options
            from curvcli.analysis.track import track_run

            how = Options(**settings, depths=False)
            store = NoCache() if no_cache else FileCache()
            found = track_run(run, how, store, last=last, window=window, surge_limit=surge, progress=progress)
        if isinstance(store, FileCache) and store.complaint:
            typer.echo(plain(f"curv: {store.complaint}"), err=True)
        from curvcli.documents import write_whole

        if output:
            write_whole(output, found.to_json().encode())
        if plot:
            from curvcli.render.track_plot import plot_track

            write_whole(plot, plot_track(found, plot.suffix[1:].lower()))
        _print_track(found, format)


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
    """Show what changed between two checkpoints, layer by layer, as ratios of lambda.

    Checkpoints are measured on the same tokens, the second from the eigenvector of the first.
    """
    with exit_codes():
        check_outputs(output, None)
        a, b = _reports(first, second, given, quiet, verbose)
        from curvcli.documents import write_whole
        from curvcli.judge.compare import compare as compared

        found = compared(a, b, names=(str(first), str(second)))
        if output:
            write_whole(output, found.to_json().encode())
        _print_comparison(found, format)


def _reports(first: Path, second: Path, given: dict[str, Any], quiet: bool, verbose: bool) -> tuple[Report, Report]:
    from curvcli.cli.progress import reporting
    from curvcli.documents import load_report

    documents = [_is_report(path) for path in (first, second)]
    if all(documents):
        if flags := options.changed(given):
            raise UsageError(f"{flags[0]} is for checkpoints, and both are reports", hint=f"drop {flags[0]}")
        return load_report(first), load_report(second)
    settings = options.settings(given)
    with reporting(quiet, verbose) as progress:
        progress("importing torch", 0.0)
        from curvcli.analysis.checkpoint import Options, open_for_analysis

        start, reports = None, []
        for i, (path, is_report) in enumerate(zip((first, second), documents, strict=True)):
            if is_report:
                reports.append(load_report(path))
                continue

            def within(stage: str, done: float, place: int = i, name: str = path.name) -> None:
                progress(f"{name}: {stage}", (place + done) / 2)

            within("reading", 0.0)
            analysis = open_for_analysis(path, Options(**settings, depths=False)).measure(within, start)
            start = analysis.directions
            reports.append(analysis.report)
    return reports[0], reports[1]


def _is_report(path: Path) -> bool:
    """Whether this is a document, by its content or its name. Raises InputError where it is another than a report."""
    from curvcli.documents import schema_of

    if path.is_dir() or not (path.suffix == ".json" or starts_as_json(path)):
        return False
    if (schema := schema_of(path)) == "curv.track/1":
        raise InputError(
            f"{path} is a track of many checkpoints, and two single ones are compared",
            hint="name checkpoints or reports; against another track, curv gate TRACK --baseline TRACK --max-regression 10",
        )
    if schema != "curv.report/1":
        raise InputError(f"{path} is {schema or 'no document of curv'}, no report", hint="give reports or checkpoints")
    return True


def _print_track(found: Track, format: TrackFormat) -> None:  # noqa: A002
    if format is TrackFormat.table:
        from rich.console import Console

        from curvcli.render.track_table import show

        show(found, Console())
    elif format is TrackFormat.csv:
        from curvcli.render.track_table import to_csv

        typer.echo(to_csv(found), nl=False)
    else:
        typer.echo(found.to_json(), nl=False)


def _print_comparison(found: Comparison, format: Format) -> None:  # noqa: A002
    from curvcli.render.compare import show, to_csv, to_markdown

    if format is Format.table:
        from rich.console import Console

        show(found, Console())
    elif format is Format.json:
        typer.echo(found.to_json(), nl=False)
    else:
        typer.echo({Format.csv: to_csv, Format.markdown: to_markdown}[format](found), nl=False)
