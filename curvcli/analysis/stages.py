"""Progress of a measurement, in stages whose cost is guessed beforehand in products of the full model."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]

# Products of the full model that a stage takes, by the first word of its name, as measured on the samples: a layer's own
# products are cheaper ones. Others are one each.
COST = {"full": 10.0, "embedding,": 6.0, "layer": 4.0, "restricted": 1.0, "truncated": 3.0, "sharpness": 24.0}
ONCE = ("choosing how to multiply", "gradient", "full model", "next update", "report")


def products(layers: int, *, depths: bool = True, truncated: bool = False, norm: bool = False) -> float:
    """What an analysis takes, in products of the full model, by what it takes on the samples.

    Args:
        layers: how many the network has.
        depths: whether the curve of restricted depths is measured.
        truncated: whether that of the networks cut short is.
        norm: whether sharpness in the optimizer's norm is.
    """
    found = sum(_cost(stage) for stage in ONCE) + (_cost("sharpness") if norm else 0.0)
    if layers:
        found += _cost("embedding, head") + layers * _cost("layer")
        found += (layers - 1) * _cost("restricted") if depths else 0.0
        found += layers * _cost("truncated") if truncated else 0.0
    return found


def _cost(stage: str) -> float:
    return COST.get(stage.split()[0], 1.0)


class Stages:
    """What is being done, and how much of the whole is done.

    Args:
        progress: called with a stage's name and the fraction of everything that is done.
        total: products that everything takes, as `products` has them.
    """

    def __init__(self, progress: Progress, total: float) -> None:
        self.progress, self.total = progress, total
        self.done, self.planned, self.ticks, self.name = 0.0, 0.0, 0.0, ""
        self.told = 0.0

    def enter(self, name: str, *, planned: bool = True) -> None:
        """The stage before is done.

        Args:
            planned: whether it is one of those that the total counts.
        """
        # Advance by the planned cost, not the actual one, so that the bar never goes back.
        self.done += self.planned
        self.total += 0.0 if planned else _cost(name)
        self.planned = _cost(name)
        self.ticks, self.name = 0.0, name
        self._say()

    def tick(self, products: float) -> None:
        """Some products were made."""
        self.ticks += products
        self._say()

    def _say(self) -> None:
        # Within a stage: towards its planned cost and never past it, however many products it takes.
        within = self.planned * (1 - 0.8**self.ticks)
        self.told = max(self.told, min((self.done + within) / self.total, 1.0))  # it waits where the total has grown
        self.progress(self.name, self.told)
