"""Limits in seconds that hold on a slow machine, or a busy one, too."""

from __future__ import annotations

import time
from collections.abc import Callable

QUICK = 0.04  # seconds that the loop below takes on a quiet core of 2024


def in_time(taken: float, seconds: float, clock: Callable[[], float] = time.perf_counter) -> bool:
    """Whether `taken` is less than what this machine, as it is just now, may take for `seconds` of a quick and quiet one."""
    return taken < seconds or taken < seconds * max(_loop(clock) for _ in range(3)) / QUICK


def _loop(clock: Callable[[], float]) -> float:
    start = clock()
    sum(n * n for n in range(1_000_000))
    return clock() - start
