"""Progress on stderr: a bar with time left on a terminal, plain lines elsewhere. stdout stays clean."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from curvcli.analysis.launch import leads
from curvcli.errors import plain

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from curvcli.documents import Report


class Told:
    """Takes what is being done and the fraction done, and says nothing of it."""

    def __call__(self, stage: str, done: float) -> None:
        """Progress: a stage names files and layers."""

    def say(self, line: str) -> None:
        """A line that stays."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While something is printed to stdout."""
        yield


@contextmanager
def reporting(quiet: bool, verbose: bool = False) -> Iterator[Told]:
    """What tells of progress, for the length of the context."""
    if (quiet and not verbose) or not leads():
        yield Told()
    elif verbose:
        yield _Log()
    elif sys.stderr.isatty():
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        from curvcli.cli.screen import terminal

        stage_column = TextColumn("{task.description}", markup=False)
        columns = (stage_column, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True))
        # Taken off at the end: what stays on the terminal is the result.
        with Progress(*columns, console=terminal(stderr=True), transient=True) as bar:
            yield _Bar(bar, bar.add_task("starting", total=1.0))
    else:
        yield _Lines()


def told_early(told: Told) -> Callable[[Report], None]:
    """Takes a report of the full model, and says its verdict while the rest is measured."""

    def say(report: Report) -> None:
        from curvcli.render.headline import early_line

        told.say(early_line(report))

    return say


class _Bar(Told):
    """A bar with the time left."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self.bar, self.task = bar, task

    def __call__(self, stage: str, done: float) -> None:
        self.bar.update(self.task, description=plain(stage), completed=done)

    def say(self, line: str) -> None:
        self.bar.console.print(f"curv: {plain(line)}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.bar.stop()  # which gives stdout back, and takes the bar off the terminal that both may be
        try:
            yield
        finally:
            self.bar.start()


class _Plain(Told):
    def say(self, line: str) -> None:
        print(f"curv: {plain(line)}", file=sys.stderr, flush=True)


class _Lines(_Plain):
    """A line when work begins to take long, and then at most every few seconds."""

    interval = 5.0

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, stage: str, done: float) -> None:
        now = time.monotonic()
        if now - self.last < (2.0 if self.last == self.start else self.interval):
            return
        self.last = now
        # Before that, elapsed time is mostly imports, and no rate to extrapolate.
        left = f", about {(now - self.start) * (1 - done) / done:.0f} s left" if done > 0.05 else ""
        print(f"curv: {done:4.0%} {plain(stage)}{left}", file=sys.stderr, flush=True)


class _Log(_Plain):
    """A line for each thing begun, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.stage = ""

    def __call__(self, stage: str, done: float) -> None:
        if stage != self.stage:
            self.stage = stage
            print(f"curv: {time.monotonic() - self.start:8.1f} s {done:4.0%} {plain(stage)}", file=sys.stderr, flush=True)
