"""A measurement within a time budget.

The measurement itself stops at the budget's end, before its next product. An alarm a little later breaks into what
it cannot stop: imports, reading, one long product.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any

from curvcli.errors import OutOfTime

if TYPE_CHECKING:
    from curvcli.documents import Report

GRACE = 2.0  # seconds for the product in hand to end


def measure(
    checkpoint: Path, options: dict[str, Any], started: float, seconds: float | None, quiet: bool, verbose: bool
) -> tuple[Report | None, str]:
    """The report of a checkpoint, or None and why, where not even the full model was reached in time.

    Args:
        options: of `curvcli.analysis.checkpoint.Options`.
        started: instant of `time.monotonic()` at which the budget began.
        seconds: the budget; None is without end.
    """
    from curvcli.cli.progress import reporting

    deadline = float("inf") if seconds is None else started + seconds
    doing = "starting"
    try:
        with _alarm(deadline + GRACE) as disarm, reporting(quiet, verbose) as tell:

            def progress(stage: str, done: float) -> None:
                nonlocal doing
                doing = stage
                if stage == "report":  # measured: what is left is short, and must not be lost
                    disarm()
                tell(stage, done)

            progress("importing torch", 0.0)
            from curvcli.analysis.checkpoint import Options, analyze_checkpoint

            return analyze_checkpoint(checkpoint, Options(**options, deadline=deadline), progress), ""
    except OutOfTime:
        return None, f"the budget of {seconds:g} s ran out (at: {doing}), and nothing was measured; raise --budget"


@contextmanager
def _alarm(at: float) -> Iterator[Any]:
    """Raise OutOfTime at an instant, whatever runs then; yields what calls it off."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    def disarm() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    if at == float("inf") or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(at - monotonic(), 0.01))
    try:
        yield disarm
    finally:
        disarm()
        signal.signal(signal.SIGALRM, before)
