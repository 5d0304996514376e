"""Products of a tracker's measurement, counted."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from curvcli.curvature.hvp import HVP


class Counting:
    """An engine that counts its products.

    Args:
        hvp: that makes them.
    """

    def __init__(self, hvp: HVP) -> None:
        self.hvp, self.products = hvp, 0

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        """One more."""
        self.products += 1
        return self.hvp.product(names, tangents)

    def subset(self, indices: Sequence[int]) -> HVP:
        """The engine's own, whose products do not count."""
        return self.hvp.subset(indices)

    def part(self) -> HVP:
        """The engine's own, whose products do not count."""
        return self.hvp.part()
