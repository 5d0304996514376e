"""Whether a gradient's norm, or the loss, is out of the run's own range: the six-sigma rule on its logarithm."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import fsum, inf, isfinite, log, sqrt
from typing import Any

SIGMAS = 6.0  # above the mean from which a value is an outlier
WINDOW, LEAST = 100, 10  # values that the mean is over, at most; and from how many on anything is said
NARROW = 0.01  # of the logarithm: a spread below it is taken for this, so that a run at rest has no outliers of rounding


class OwnRange:
    """Values of a run so far, the newest last.

    Args:
        values: of before, of a job that is resumed.
    """

    def __init__(self, values: Sequence[float] = ()) -> None:
        self.values: deque[float] = deque(values, maxlen=WINDOW)

    def sigmas(self, value: float) -> float | None:
        """Standard deviations by which log(value) lies above the mean of those before; the value then counts as one of them.

        None while few came before, and of a value that is not above 0 or not finite, which counts for nothing.
        """
        if not 0 < value < inf:
            return None
        # Not including the new value, or an outlier would widen the range it is held against.
        before = [log(known) for known in self.values]
        self.values.append(value)
        if len(before) < LEAST:
            return None
        # By hand: at every step of a job the exact fractions of statistics.pstdev cost ten times as much.
        mean = fsum(before) / len(before)
        spread = sqrt(fsum((known - mean) ** 2 for known in before) / len(before))
        return (log(value) - mean) / max(spread, NARROW)


class LossWatch:
    """The loss of every step, between one record and the next.

    Args:
        values: of before, of a job that is resumed.
    """

    def __init__(self, values: Sequence[float] = ()) -> None:
        self.range = OwnRange(values)
        self._sigmas: float | None = None
        self._finite: bool | None = None

    def see(self, loss: float | None) -> None:
        """The loss of one step, as the job gave it."""
        if loss is None:
            return
        self._finite = isfinite(loss) and self._finite is not False
        sigmas = self.range.sigmas(float(loss))
        if sigmas is not None:
            self._sigmas = sigmas if self._sigmas is None else max(self._sigmas, sigmas)

    def told(self) -> dict[str, Any]:
        """What a record says of the steps since the last one; the next begins anew."""
        found = {"loss_sigmas": self._sigmas, "loss_finite": self._finite}
        self._sigmas = self._finite = None
        return found
