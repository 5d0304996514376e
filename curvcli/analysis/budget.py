"""A measurement within a time budget.

The measurement itself stops at the budget's end, before its next product. An alarm a little later breaks into what
it cannot stop: imports, reading, one long product.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from math import inf
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from curvcli.analysis.launch import decides, speaking, together
from curvcli.analysis.stages import Progress
from curvcli.errors import OutOfTime, UsageError

if TYPE_CHECKING:
    from curvcli.documents import Report

T = TypeVar("T")

# For the product in hand to end, and the report to be written: a share of the budget, and seconds at least.
GRACE, LEAST_GRACE = 0.1, 1.0


@dataclass(frozen=True)
class Budget:
    """Time that measuring may take.

    Args:
        seconds: of it; infinite is without end.
        started: instant of `time.monotonic()` at which it began.
    """

    seconds: float = inf
    started: float = field(default_factory=monotonic)

    @property
    def deadline(self) -> float:
        """Instant from which nothing more is started."""
        return self.started + self.seconds

    @contextmanager
    def alarm(self) -> Iterator[Callable[[], None]]:
        """Raise OutOfTime a little after the deadline, whatever runs then; yields what calls it off."""
        with _alarm(self.deadline + max(LEAST_GRACE, GRACE * self.seconds)) as disarm:
            yield disarm


def within(budget: Budget, work: Callable[[Progress], T], tell: Progress = lambda stage, done: None) -> tuple[T | None, str]:
    """What some work comes to, or None and why, where the budget ran out before there was anything to show.

    Args:
        work: takes the progress to report to; the stage `report` says that what is left is short, and must not be lost.
        tell: takes what is being done, and the fraction done.
    """
    doing = "starting"
    try:
        with together(), budget.alarm() as disarm:

            def progress(stage: str, done: float) -> None:
                nonlocal doing
                doing = stage
                if stage == "report":
                    disarm()
                tell(stage, done)

            # Imports count towards the budget: whoever waits for a verdict waits for them too.
            progress("importing torch", 0.0)
            return work(progress), ""
    except OutOfTime:
        return None, f"the budget of {budget.seconds:g} s ran out (at: {doing}), and nothing was measured; raise --budget"


def measure(
    checkpoint: Path,
    options: Mapping[str, Any],
    *,
    started: float,
    seconds: float | None,
    tell: Progress = lambda stage, done: None,
    on_verdict: Callable[[Report], None] | None = None,
) -> tuple[Report | None, str]:
    """The report of a checkpoint, or None and why, where not even the full model was reached in time.

    Args:
        options: of `curvcli.analysis.checkpoint.Options`.
        started: instant of `time.monotonic()` at which the budget began.
        seconds: the budget; None is without end.
        tell: takes what is being done, and the fraction done.
        on_verdict: as of `analyze_checkpoint`.

    Raises:
        UsageError: an option is not known.
        CurvError: the checkpoint cannot be read or measured.
    """
    budget = Budget(inf if seconds is None else seconds, started)

    def work(progress: Progress) -> Report:
        from curvcli.analysis.checkpoint import Options, analyze_checkpoint
        from curvcli.analysis.options import options_of

        known = [option.name for option in fields(Options) if option.name != "deadline"]
        if unknown := [name for name in options if name not in known]:
            raise UsageError(f"{unknown[0]!r:.80} is no rule and no option", hint=f"options: {', '.join(known)}")
        return analyze_checkpoint(checkpoint, replace(options_of(options), deadline=budget.deadline), progress, on_verdict)

    return within(budget, work, tell)


@contextmanager
def _alarm(at: float) -> Iterator[Callable[[], None]]:
    """Raise OutOfTime at an instant, whatever runs then; yields what calls it off."""

    def ring(number: int, frame: FrameType | None) -> None:
        if speaking():  # with other ranks, which would wait for the end of the sentence
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        raise OutOfTime

    def disarm() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    # Python runs signal handlers in the main thread only. Of several ranks only rank 0 sets an alarm, and tells the others.
    if at == inf or not decides() or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.signal(signal.SIGALRM, ring)
    # A time of 0 would call the alarm off.
    signal.setitimer(signal.ITIMER_REAL, max(at - monotonic(), 0.01))
    try:
        yield disarm
    finally:
        disarm()
        signal.signal(signal.SIGALRM, before)
