"""Products that are counted, and move the progress on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from curvcli.analysis.stages import Stages
from curvcli.curvature.hvp import HVP


class Counted(Protocol):
    """A measurement: products made so far, in those over the whole shard, and its stages."""

    hvps: float
    stages: Stages


class Counting:
    """An engine that counts its products and moves the progress on."""

    def __init__(self, hvp: HVP, work: Counted, share: float) -> None:
        self.hvp, self.work, self.share = hvp, work, share  # of a product over the whole shard

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        """The engine's."""
        self.work.hvps += self.share
        self.work.stages.tick(self.share)
        return self.hvp.product(names, tangents)

    def subset(self, indices: Sequence[int]) -> HVP:
        """The same of some of the batches, which counts as much."""
        return Counting(self.hvp.subset(indices), self.work, self.share)

    def part(self) -> HVP:
        """What this process' batches add, which counts as much."""
        return Counting(self.hvp.part(), self.work, self.share)
