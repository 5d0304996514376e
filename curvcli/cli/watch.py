"""`curv watch`: the log of a running job, live in the terminal."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curvcli.cli.app import app, check_outputs, exit_codes
from curvcli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from curvcli.documents import Log

# A terminal that was resized is drawn again this soon, in seconds; the file is looked at every --interval.
_REDRAW = 0.2


@app.command(
    epilog="Examples:\n\n"
    "`curv watch run/curvature.jsonl`\n\n"
    "`curv watch runs/ --tail 30 --interval 10`\n\n"
    "`curv watch run/ --once | less`\n\n"
    "`curv watch run/ --plot run.png`"
)
def watch(
    log: Annotated[
        Path,
        typer.Argument(metavar="LOG", help="curvature.jsonl of a job, or its directory; also the newest one a level below."),
    ],
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit; also when stdout is piped.")] = False,
    tail: Annotated[int, typer.Option(metavar="N", min=1, help="Most records in the table.")] = 12,
    interval: Annotated[float, typer.Option(metavar="X", min=0.1, help="Seconds between two looks at the file.")] = 2.0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the picture here (.png, .svg, .pdf), print one frame and exit."),
    ] = None,
) -> None:
    """Show a running job's rho against the edge of stability: its curve, its unlocks, its last records.

    Waits for a log that is not there yet. Ctrl-C ends it and leaves the last frame; the job goes on.
    """
    with exit_codes():
        check_outputs(None, plot)
        if once or plot or not sys.stdout.isatty():
            _one_frame(log, tail, plot)
        else:
            _live(log, tail, interval)


def _one_frame(path: Path, tail: int, plot: Path | None) -> None:
    from curvcli.cli.screen import terminal
    from curvcli.documents import find_log, load_records, write_whole
    from curvcli.render.watch import screen

    if (found := find_log(path)) is None:
        wrong = "holds no curvature.jsonl" if path.exists() else "does not exist"
        raise InputError(
            f"{path} {wrong}",
            hint="a tracker in the job writes one, and curv track measures checkpoints; without --once, on a terminal, curv "
            "watch waits for it",
        )
    log = load_records(found)
    if plot:
        from curvcli.render.plot_log import plot_log

        write_whole(plot, plot_log(log, plot.suffix[1:].lower()))
    # No colour system: no escape reaches a file or a pager.
    console = terminal(color_system=None)
    console.print(screen(log, console, tail=tail))


def _live(path: Path, tail: int, interval: float) -> None:
    from rich.live import Live

    from curvcli.cli.screen import terminal
    from curvcli.render.watch import screen

    console = terminal()
    # A terminal must get its own screen back, whatever ends the watcher.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    last: Log | None = None
    try:
        # A screen of its own, as a resize garbles lines that scroll; the last frame is printed when it is gone.
        with Live(console=console, screen=True, auto_refresh=False) as display:
            for log in _looks(path, interval, console):
                last = log
                display.update(screen(log, console, tail=tail, height=console.height), refresh=True)
    finally:
        if last is not None:
            console.print(screen(last, console, tail=tail, height=console.height))


def _looks(path: Path, interval: float, console: Console) -> Iterator[Log]:
    """What to draw, each time that there is something to draw: after a look, or on a new size."""
    from curvcli.documents import LOG_NAME, Follower, Log, find_log

    follower: Follower | None = None
    while True:
        if follower is None and (found := find_log(path)):
            follower = Follower(found)
        # Until there is a log, an empty one is drawn, which says what is waited for.
        log = follower.poll() if follower else Log(path / LOG_NAME if path.is_dir() else path)
        until = time.monotonic() + interval
        yield log
        while (left := until - time.monotonic()) > 0:
            size = console.size
            time.sleep(min(left, _REDRAW))
            if console.size != size:
                yield log
