"""Progress on stderr: a bar with time left on a terminal, plain lines elsewhere. stdout stays clean."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, inf
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
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        from curvcli.cli.screen import terminal

        stage_column, left_column = (
            TextColumn(f"{{task.{what}}}", markup=False) for what in ("description", "fields[left]")
        )
        columns = (stage_column, BarColumn(), TaskProgressColumn(), left_column)
        # Taken off at the end: what stays on the terminal is the result.
        with Progress(*columns, console=terminal(stderr=True), transient=True) as bar:
            yield _Bar(bar, bar.add_task("starting", total=1.0, left=""))
    else:
        yield _Lines()


def told_early(told: Told) -> Callable[[Report], None]:
    """Takes a report of the full model, and says its verdict while the rest is measured."""

    def say(report: Report) -> None:
        from curvcli.render.headline import early_line

        told.say(early_line(report))

    return say


class TimeLeft:
    """The time left, in round numbers and as a promise: it never rises.

    Where the promised end has passed there is a new one, which says that it takes longer.

    Args:
        start: of the work, as `time.monotonic()` has it.
    """

    least = 0.05  # done; before that elapsed time is mostly imports, and no rate to extrapolate

    def __init__(self, start: float) -> None:
        self.start = start
        self.end, self.longer = inf, False

    def __call__(self, now: float, done: float) -> str:
        """As "about 40 s left"; empty while nothing can be said.

        Args:
            now: as `start`.
            done: of the work, 0 to 1.
        """
        if done <= self.least:
            return ""
        left = (now - self.start) * (1 - done) / done
        if now > self.end and left > 0:
            self.end, self.longer = inf, True
        self.end = min(self.end, now + left)
        return f"{'longer than thought: ' if self.longer else ''}about {_round(self.end - now)} left"


def _round(seconds: float) -> str:
    """As "5 s", "50 s", "3 min" or "2 h": rounded upward, as nobody minds to be done sooner."""
    for unit, name, most, step in ((1, "s", 60, 5), (1, "s", 120, 10), (60, "min", 120, 1)):
        if (rounded := step * max(1, ceil(seconds / unit / step))) < most:
            return f"{rounded} {name}"
    return f"{ceil(seconds / 3600)} h"


class _Bar(Told):
    """A bar with the time left."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self.bar, self.task = bar, task
        self.left = TimeLeft(time.monotonic())

    def __call__(self, stage: str, done: float) -> None:
        left = self.left(time.monotonic(), done)
        self.bar.update(self.task, description=plain(stage), completed=done, left=left)

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
        self.left = TimeLeft(self.start)

    def __call__(self, stage: str, done: float) -> None:
        now = time.monotonic()
        if now - self.last < (2.0 if self.last == self.start else self.interval):
            return
        self.last = now
        left = self.left(now, done)
        print(f"curv: {done:4.0%} {plain(stage)}{f', {left}' if left else ''}", file=sys.stderr, flush=True)


class _Log(_Plain):
    """A line for each thing begun, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.stage = ""

    def __call__(self, stage: str, done: float) -> None:
        if stage != self.stage:
            self.stage = stage
            print(f"curv: {time.monotonic() - self.start:8.1f} s {done:4.0%} {plain(stage)}", file=sys.stderr, flush=True)
