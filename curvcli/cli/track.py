"""`curv track`: a run over its checkpoints."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvcli.analysis.launch import apart, joined, leads
from curvcli.cli import estimate as estimates
from curvcli.cli import following, options
from curvcli.cli import notify as notifier
from curvcli.cli.app import app, check_outputs, exit_codes, readers_may_leave
from curvcli.cli.formats import Format
from curvcli.cli.progress import reporting
from curvcli.errors import OutOfTime, plain

if TYPE_CHECKING:
    from curvcli.documents import Track


@app.command(
    epilog="Exit codes: 0 measured, 2 bad usage or input, 3 the budget was too short for any checkpoint.\n\n"
    "Examples:\n\n"
    "`curv track sample_checkpoints/hot --plot hot.png`\n\n"
    "`curv track 'out/ckpt*.pt' --data train.bin -o track.json && curv gate track.json --max-surge 2`\n\n"
    "`curv track run/ --watch -o track.json --notify 'mail -s curv me@example.org'`"
)
@options.measuring()
def track(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, pattern in quotes, or URL.")],
    given: dict[str, Any],
    last: Annotated[int | None, typer.Option(metavar="N", min=1, help="Measure only the newest N checkpoints.")] = None,
    surge: Annotated[
        float,
        typer.Option(metavar="X", min=1.01, max=1e9, help="Mark points whose rho is above X times the median before them."),
    ] = 2.0,
    window: Annotated[int, typer.Option(metavar="N", min=2, help="Number of certified points that the median is over.")] = 5,
    budget: options.Budget = None,
    estimate: options.Estimate = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on, and measure new checkpoints as they appear, until Ctrl-C.")
    ] = False,
    interval: Annotated[
        float | None, typer.Option(metavar="X", min=0.1, help="Seconds between two looks of --watch.  [default: 30]")
    ] = None,
    notify: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Command to run or webhook to post to when --watch sees a gate break or a verdict change; may be repeated.",
        ),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure every checkpoint, and keep no report.")] = False,
    output: options.Output = None,
    plot: options.Plot = None,
    format: options.FormatOption = Format.table,  # noqa: A002
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure all checkpoints of a run in step order, and mark where curvature surges.

    Reports are kept by content: a second call pays only for what is new, and an interrupted one goes on.
    """
    started = time.monotonic()
    found: Track | None = None
    with exit_codes(), joined():
        settings = options.settings(given)
        seconds = options.seconds(budget)
        check_outputs(output, plot)
        of_watch = {"--notify": notify, "--interval": interval}
        following.check(
            watch, of_watch, {"--budget": budget, "--estimate": estimate or None, "--format": _not_table(format)}
        )
        if watch:
            _watch(run, settings, interval, notify or [], no_cache, quiet, verbose,
                   last=last, surge=surge, window=window, output=output, plot=plot)  # fmt: skip
            return
        if estimate and not leads():
            return
        if estimate:
            estimates.check(format.value, {"--output": output, "--plot": plot, "--budget": budget})
        with reporting(quiet, verbose) as progress:
            progress("importing torch", 0.0)
            from curvcli.analysis.cache import FileCache, NoCache

            store = NoCache() if no_cache else FileCache()
            if estimate:
                from curvcli.analysis.checkpoint import Options
                from curvcli.analysis.estimate import estimate_run

                with apart():
                    cost = estimate_run(run, Options(**settings), store, last=last, progress=progress)
            else:
                from curvcli.analysis.track import track as tracked
                from curvcli.render.headline import point_line

                # Said below, in one line and with an exit code of its own.
                with suppress(OutOfTime):
                    found = tracked(
                        run, last=last, surge=surge, window=window, cache=store, progress=progress, budget=seconds,
                        started=started, on_point=lambda point: progress.say(point_line(point)), **settings,
                    )  # fmt: skip
        if isinstance(store, FileCache) and store.complaint:
            typer.echo(plain(f"curv: {store.complaint}"), err=True)
        if estimate:
            estimates.show(cost, format.value)
        elif not leads():
            pass
        elif found is not None:
            _write(found, output, plot)
            with readers_may_leave():
                _print(found, format, verbose)
        else:
            typer.echo(f"curv: the budget of {seconds:g} s ran out, and nothing was measured; raise --budget", err=True)
    if found is None and not estimate:
        raise typer.Exit(3)


def _not_table(format: Format) -> str | None:  # noqa: A002
    return None if format is Format.table else format.value


def _watch(
    run: Path,
    settings: dict[str, Any],
    interval: float | None,
    targets: list[str],
    no_cache: bool,
    quiet: bool,
    verbose: bool,
    *,
    output: Path | None,
    plot: Path | None,
    **course: Any,
) -> None:
    # Before anything is waited for.
    for target in targets:
        notifier.check(target)
    with reporting(quiet, verbose) as progress:
        progress("importing torch", 0.0)
        from curvcli.analysis.cache import FileCache
        from curvcli.analysis.follow import INTERVAL, follow

        looks = follow(
            run,
            interval=interval or INTERVAL,
            cache=None if no_cache else FileCache(),
            progress=progress,
            **course,
            **settings,
        )
        following.watched(looks, targets, output, plot, _write, progress)


def _write(found: Track, output: Path | None, plot: Path | None) -> None:
    from curvcli.documents import write_whole

    if output:
        write_whole(output, found.to_json().encode())
    if plot:
        from curvcli.render.track_plot import plot_track

        write_whole(plot, plot_track(found, plot.suffix[1:].lower()))


def _print(found: Track, format: Format, verbose: bool) -> None:  # noqa: A002
    if format is Format.table:
        from curvcli.cli.screen import terminal
        from curvcli.render.track_table import show

        show(found, terminal(), verbose=verbose)
    elif format is Format.csv:
        from curvcli.render.track_table import to_csv

        typer.echo(to_csv(found), nl=False)
    elif format is Format.markdown:
        from curvcli.render.track_markdown import markdown

        typer.echo(markdown(found), nl=False)
    else:
        typer.echo(found.to_json(), nl=False)
