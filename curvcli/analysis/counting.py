"""Products that are counted, and move the progress on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from curvcli.analysis.stages import Stages
from curvcli.curvature import resources
from curvcli.curvature.hvp import HVP
from curvcli.curvature.operator import LARGE


class Counted(Protocol):
    """A measurement: products made so far, in those over the whole shard, and its stages."""

    hvps: float
    stages: Stages


def count(work: Counted, share: float) -> None:
    """A product was made.

    Args:
        share: of one over the whole shard, that it is.
    """
    work.hvps += share
    work.stages.tick(share)


class Counting:
    """An engine of the whole shard that counts its products and moves the progress on."""

    def __init__(self, hvp: HVP, work: Counted) -> None:
        self.hvp, self.work = hvp, work

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        """The engine's."""
        count(self.work, 1.0)
        found = self.hvp.product(names, tangents)
        if sum(t.nbytes for t in tangents) >= LARGE:
            resources.give_back(tangents[0].device)
        return found

    def subset(self, indices: Sequence[int]) -> HVP:
        """The engine's, which counts nothing."""
        return self.hvp.subset(indices)

    def part(self) -> HVP:
        """The engine's, which counts nothing."""
        return self.hvp.part()
