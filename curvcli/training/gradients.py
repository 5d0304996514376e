"""Whether a gradient's norm is out of the run's own range: the six-sigma rule on its logarithm."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf, log
from statistics import fmean, pstdev

SIGMAS = 6.0  # above the mean from which a norm is an outlier
WINDOW, LEAST = 100, 10  # measurements that the mean is over, at most; and from how many on anything is said
NARROW = 0.01  # of the logarithm: a spread below it is taken for this, so that a run at rest has no outliers of rounding


class GradientWatch:
    """Norms of a run's gradients so far, the newest last.

    Args:
        norms: of before, of a job that is resumed.
    """

    def __init__(self, norms: Sequence[float] = ()) -> None:
        self.norms: deque[float] = deque(norms, maxlen=WINDOW)

    def sigmas(self, norm: float) -> float | None:
        """Standard deviations by which log(norm) lies above the mean of those before; the norm then counts as one of them.

        None while few came before, and of a norm that is 0 or not finite, which counts for nothing.
        """
        if not 0 < norm < inf:
            return None
        # Not including the new norm, or an outlier would widen the range it is held against.
        before = [log(value) for value in self.norms]
        self.norms.append(norm)
        if len(before) < LEAST:
            return None
        return (log(norm) - fmean(before)) / max(pstdev(before), NARROW)
