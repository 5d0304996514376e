"""`curv track --watch`: a line a checkpoint as they appear, and somebody told of what matters."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from curvcli.analysis.launch import launched
from curvcli.cli.notify import notify
from curvcli.errors import CurvError, UsageError, plain

if TYPE_CHECKING:
    from curvcli.analysis.follow import Look
    from curvcli.cli.progress import Told
    from curvcli.documents import Track


def check(watch: bool, of_watch: Mapping[str, object], others: Mapping[str, object]) -> None:
    """Raises UsageError where options contradict each other, or where several processes are to watch.

    Args:
        of_watch: options by flag that only who watches has a use for; None or empty is not given.
        others: that who watches has none for.
    """
    if not watch:
        if any(value not in (None, []) for value in of_watch.values()):
            raise UsageError(f"{' and '.join(of_watch)} are of --watch", hint="pass --watch, or drop them")
        return
    if launched():
        raise UsageError("--watch is of one process", hint="start it without torchrun")
    for flag, value in others.items():
        if value is not None:
            raise UsageError(f"--watch goes on until it is interrupted, and takes no {flag}", hint=f"drop {flag}")


def watched(
    looks: Iterator[Look], targets: Sequence[str], output: Path | None, plot: Path | None, write: Any, progress: Told
) -> None:
    """Print what each look found, write the documents anew, and notify. Ends where the looks do.

    Args:
        looks: of `curvcli.analysis.follow.follow`.
        targets: commands and webhooks.
        write: writes a track to `output` and `plot`.
        progress: stands aside while something is printed.
    """
    # With the line itself, so that a checkpoint that changed and was measured again is printed again.
    told: set[tuple[str, str]] = set()
    progress("waiting for a checkpoint", 0.0)
    for look in looks:
        with progress.aside():
            _say(look, targets, output, plot, write, told)
        progress("waiting for the next checkpoint", 0.0)


def _say(
    look: Look, targets: Sequence[str], output: Path | None, plot: Path | None, write: Any, told: set[tuple[str, str]]
) -> None:
    # The run may not exist yet, or its data may be mended later: keep watching.
    if look.trouble is not None or look.track is None:
        typer.echo(plain(f"curv: {look.trouble}; still watching"), err=True)
        return
    try:
        write(look.track, output, plot)
    except CurvError as error:  # a disk that is full now has room again when the next one is written
        typer.echo(f"curv: {error}; still watching", err=True)
    for line in _new_lines(look.track, told):
        typer.echo(line)
    for event in look.events:
        typer.echo(plain(f"! {event.message}"))
        for target in targets:
            if (failed := notify(target, look.told(event))) is not None:
                typer.echo(f"curv: {failed}; still watching", err=True)
    sys.stdout.flush()


def _new_lines(track: Track, told: set[tuple[str, str]]) -> Iterator[str]:
    from curvcli.render.headline import point_line

    for point in track.points:
        line = point_line(point)
        if (point.checkpoint, line) not in told:
            told.add((point.checkpoint, line))
            yield line
