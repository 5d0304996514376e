"""Progress on stderr: a bar with time left on a terminal, plain lines elsewhere. stdout stays clean."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from curvcli.errors import plain


@contextmanager
def reporting(quiet: bool, verbose: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A callback taking what is being done and the fraction done, for the length of the context."""
    with _reporting(quiet, verbose) as tell:
        yield lambda stage, done: tell(plain(stage), done)  # a stage names files and layers


@contextmanager
def _reporting(quiet: bool, verbose: bool) -> Iterator[Callable[[str, float], None]]:
    if verbose:
        yield _Log()
    elif quiet:
        yield lambda stage, done: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        stage_column = TextColumn("{task.description}", markup=False)
        columns = (stage_column, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("starting", total=1.0)
            yield lambda stage, done: bar.update(task, description=stage, completed=done)
    else:
        yield _Lines()


class _Lines:
    """A line when work begins to take long, and then at most every few seconds."""

    interval = 5.0

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, stage: str, done: float) -> None:
        now = time.monotonic()
        if now - self.last < (2.0 if self.last == self.start else self.interval):
            return
        self.last = now
        left = f", about {(now - self.start) * (1 - done) / done:.0f} s left" if done > 0.05 else ""
        print(f"curv: {done:4.0%} {stage}{left}", file=sys.stderr, flush=True)


class _Log:
    """A line for each thing begun, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.stage = ""

    def __call__(self, stage: str, done: float) -> None:
        if stage != self.stage:
            self.stage = stage
            print(f"curv: {time.monotonic() - self.start:8.1f} s {done:4.0%} {stage}", file=sys.stderr, flush=True)
