"""What measuring costs beside training, and a budget for it: when to measure, and how much of the probe."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from curvcli.curvature.ranks import Ranks
from curvcli.errors import UsageError

# Steps between measurements, at most, that a probe is made smaller for; one batch is measured however long that takes.
WANTED = 50
SETTLING = 5  # measurements after which the size of the probe is kept, so that their rho can be compared
TRIAL = 5  # products of the first measurement of a budget, which is there to find out what one costs


class Ledger:
    """Seconds spent training and measuring since the job began, or was resumed.

    What passes between two visits is training, with whatever else a job does then: loading, evaluating, saving.

    Args:
        clock: seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.trained = self.spent = 0.0
        self.steps = 0
        self._left: float | None = None

    def enter(self) -> None:
        """Training ends here: one more step of it is over."""
        self.rest()
        self.steps += 1

    def rest(self) -> None:
        """What has passed since the last entry or exit was training too."""
        now = self.clock()
        if self._left is not None:
            self.trained += now - self._left
        self._left = now

    def charge(self) -> float:
        """What has passed since the last entry or exit was measuring; the seconds of it."""
        now = self.clock()
        seconds = 0.0 if self._left is None else now - self._left
        self.spent += seconds
        self._left = now
        return seconds

    @property
    def share(self) -> float | None:
        """Seconds spent measuring over those spent training; None before any training was seen."""
        return self.spent / self.trained if self.trained > 0 else None


class Budget:
    """Measures when what that is expected to take has been earned: a share of the seconds spent training.

    The first measurement is made at once, on one batch and in few products, as nothing is known before it. From then on one
    is due when all that was spent and the next one together are within the share of the training so far; and not before half
    of the next one was earned since the last, however much a long pause has earned.

    Args:
        share: seconds of measuring for each second of training, at most.
        batches: of the probe.
        most: products of a measurement, at most.
        ledger: whose seconds count.
    """

    def __init__(self, share: float, *, batches: int, most: int, ledger: Ledger) -> None:
        self.share, self.most, self.ledger = share, most, ledger
        self.available, self.batches = max(batches, 1), 1
        self.measured = 0
        self._trial: float | None = None  # seconds of the first measurement, what is done once included
        self._costs: deque[float] = deque(maxlen=SETTLING)  # seconds a batch of the later ones
        self._since = 0.0  # seconds trained when the last measurement ended

    @property
    def due(self) -> bool:
        """Whether to measure now."""
        if self._trial is None:
            return True
        cost, ledger = self.cost(self.batches), self.ledger
        earned = self.share * ledger.trained >= ledger.spent + cost
        # A long pause counts as training, and must not pay for a burst of measurements after it.
        return earned and self.share * (ledger.trained - self._since) >= cost / 2

    def turn(self, ranks: Ranks) -> bool:
        """Whether to measure now, and on how many batches: by the clock of the first of the ranks that measure together."""
        due, batches = ranks.first([float(self.due), float(self.batches)])
        self.batches = int(batches)
        return bool(due)

    @property
    def products(self) -> int:
        """That the measurement may take which is due now."""
        return min(self.most, TRIAL) if self._trial is None else self.most

    def cost(self, batches: int) -> float:
        """Seconds that a measurement on so many batches is expected to take."""
        # The first measurement only until there is another: it includes one-time costs.
        each = median(self._costs) if self._costs else self._trial or 0.0
        return each * batches

    def paid(self, seconds: float, products: int) -> None:
        """A measurement was made, on `batches` of the probe; says how many the next one is on.

        Args:
            products: that it took; one that failed before its first says nothing of what others take.
        """
        self.measured += 1
        self._since = self.ledger.trained
        if self._trial is None:
            self._trial = seconds
        elif products:
            self._costs.append(seconds / self.batches)
        self._choose()

    def _choose(self) -> None:
        """As much of the probe as fits every `WANTED` steps; once settled less of it, where that has come to take twice."""
        if not self.ledger.steps or not self.ledger.trained:
            return
        allowed = self.share * WANTED * self.ledger.trained / self.ledger.steps
        fitting = max(1, min(self.available, int(allowed / self.cost(1))))
        # Kept once it has settled: rho on other data is another rho.
        if self.measured <= SETTLING or self.cost(self.batches) > 2 * allowed:
            self.batches = fitting

    def state_dict(self) -> dict[str, Any]:
        """The size of the probe, and what is known of costs: seconds are the job's own, and stay behind."""
        return {"batches": self.batches, "measured": self.measured, "trial": self._trial, "costs": list(self._costs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, or nothing, of an older version."""
        self.batches = min(int(state.get("batches", 1)), self.available)
        self.measured = int(state.get("measured", 0))
        self._trial = state.get("trial")
        self._costs.extend(state.get("costs", ()))


def budget_of(every: int | None, share: float | None, batches: int, most: int, ledger: Ledger) -> Budget | None:
    """The budget, where one is given. Raises UsageError as the tracker says."""
    if share is None:
        return None
    if every is not None:
        raise UsageError("every and max_overhead both say when to measure", hint="give one of them")
    if not 0 < share < float("inf"):
        raise UsageError(f"max_overhead {share:g} leaves nothing to measure with", hint="give a share above 0, as 0.05")
    return Budget(share, batches=batches, most=most, ledger=ledger)
