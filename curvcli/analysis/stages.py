"""Progress of a measurement, in stages whose cost is guessed beforehand in products of the full model."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]

# Products of the full model that a stage takes, as measured on the samples: a layer's own products are cheaper ones.
_COST = {"full": 10.0, "embedding,": 6.0, "layer": 5.0, "restricted": 3.0, "truncated": 5.0}


class Stages:
    """What is being done, and how much of the whole is done.

    Args:
        layers: how many the network has.
        progress: called with a stage's name and the fraction of everything that is done.
        depths: whether the curves over depth are measured.
    """

    def __init__(self, layers: int, progress: Progress, depths: bool) -> None:
        self.progress = progress
        self.total = 14.0 + (_COST["embedding,"] if layers else 0) + layers * (_COST["layer"] + (2.0 if depths else 0))
        self.done, self.planned, self.ticks, self.name = 0.0, 0.0, 0.0, ""

    def enter(self, name: str) -> None:
        """The stage before is done."""
        self.done += self.planned
        self.planned = _COST.get(name.split()[0], 1.0)
        self.ticks, self.name = 0.0, name
        self._say()

    def tick(self, products: float) -> None:
        """Some products were made."""
        self.ticks += products
        self._say()

    def _say(self) -> None:
        # Within a stage: towards its planned cost and never past it, however many products it takes.
        within = self.planned * (1 - 0.8**self.ticks)
        self.progress(self.name, min((self.done + within) / self.total, 1.0))
