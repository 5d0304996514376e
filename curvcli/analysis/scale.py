"""What an analysis with `--shard` takes of each device, by the shapes of the weights alone: nothing is read or computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from curvcli.analysis.plan import BESIDE, WANTED, WORKING

DEVICES = (1, 8, 64)
FOLDS = 8  # parts of the shard that the full model's products are made of
PREPARED = 2  # preconditioner and the optimizer's next step
GATHERED = 3  # weights, tangents and images, which a product has as a whole


@dataclass(frozen=True)
class Scale:
    """Bytes of one device; on one alone nothing is divided.

    Attributes:
        devices: how many there are.
        slices: weights, preconditioner, next step and vectors, of which 16 are a basis.
        gathered: what is whole while a product is made, beside them.
        moved: what it receives for a product, where sums go round in a ring.
        moved_full: for one of the full model, whose images are summed for each fold.
    """

    devices: int
    slices: int
    gathered: int
    moved: int
    moved_full: int

    @property
    def peak(self) -> int:
        """What it holds at most, beside the graph of a batch."""
        return self.slices + self.gathered


def scale(shapes: Sequence[Sequence[int]], devices: int, itemsize: int = 4) -> Scale:
    """Of one of so many devices.

    Args:
        shapes: of the weights. All of them are taken to train.
        itemsize: bytes of an entry; everything is measured in float32.
    """
    sizes = [prod(shape) for shape in shapes]
    # A sum that goes round in a ring passes every device twice; what is gathered passes it once.
    share, whole = sum(-(-size // devices) for size in sizes), sum(sizes)
    passed = share * (devices - 1) * itemsize
    held = 1 + PREPARED + BESIDE + WORKING + WANTED
    return Scale(
        devices=devices,
        slices=int(held * share * itemsize),
        gathered=GATHERED * whole * itemsize if devices > 1 else 0,
        moved=4 * passed,
        moved_full=(2 + 2 * FOLDS) * passed,
    )


def least(shapes: Sequence[Sequence[int]], devices: int, itemsize: int = 4) -> int:
    """What exact products take of each at least, beside weights and graphs: with its vectors elsewhere but one."""
    whole = sum(prod(shape) for shape in shapes)
    share = sum(-(-prod(shape) // devices) for shape in shapes)
    return int(((PREPARED + BESIDE + WORKING + 1) * share + GATHERED * whole) * itemsize)
