"""What an analysis with `--shard` takes of each device, by the shapes of the weights alone: nothing is read or computed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from curvcli.analysis.plan import BESIDE, WANTED, WORKING

DEVICES = (1, 8, 64)
FOLDS = 8  # parts of the shard that the full model's products are made of
PREPARED = 2  # preconditioner and the optimizer's next step
GATHERED = 3  # weights, tangents and images, which a product has as a whole
OF_BLOCK = 3  # a block's weights, their gradients, and these once more as they are sent
PASSES = 2  # of a product by differences of gradients, each of which gathers weights twice and sums gradients once


@dataclass(frozen=True)
class Scale:
    """Bytes of one device; on one alone nothing is divided.

    Attributes:
        devices: how many there are.
        slices: weights, preconditioner, next step and vectors, of which 16 are a basis.
        basis: these 16, of which all but one may lie elsewhere.
        gathered: what is whole while an exact product is made, beside the slices.
        moved: what it receives for a product, where sums go round in a ring.
        moved_full: for one of the full model, whose images are summed for each fold.
        block: what is whole where products are differences of gradients, and blocks are gathered one at a time.
        moved_by_block: as `moved`, at most, where each device has one batch.
        moved_full_by_block: as `moved_full`.
    """

    devices: int
    slices: int
    basis: int
    gathered: int
    moved: int
    moved_full: int
    block: int
    moved_by_block: int
    moved_full_by_block: int

    @property
    def peak(self) -> int:
        """What it holds at most for exact products, beside the graph of a batch."""
        return self.slices + self.gathered

    @property
    def peak_by_block(self) -> int:
        """What it holds at most for differences, beside the graph of a batch."""
        return self.slices + self.block

    @property
    def least_by_block(self) -> int:
        """The same with its basis elsewhere: a GPU's in main memory, else on disk."""
        return self.peak_by_block - self.basis * (WANTED - 1) // WANTED


def scale(shapes: Mapping[str, Sequence[int]], devices: int, itemsize: int = 4) -> Scale:
    """Of one of so many devices.

    Args:
        shapes: of the weights, by name. All of them are taken to train.
        itemsize: bytes of an entry; everything is measured in float32.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    # A sum that goes round in a ring passes every device twice; what is gathered passes it once.
    share, whole = sum(-(-size // devices) for size in sizes.values()), sum(sizes.values())
    passed = share * (devices - 1) * itemsize
    held = 1 + PREPARED + BESIDE + WORKING + WANTED
    blocks = Counter[str]()
    for name, size in sizes.items():
        blocks[block_of(name)] += size
    return Scale(
        devices=devices,
        slices=int(held * share * itemsize),
        basis=WANTED * share * itemsize,
        gathered=GATHERED * whole * itemsize if devices > 1 else 0,
        moved=4 * passed,
        moved_full=(2 + 2 * FOLDS) * passed,
        block=OF_BLOCK * max(blocks.values(), default=0) * itemsize if devices > 1 else 0,
        moved_by_block=4 * PASSES * passed,
        moved_full_by_block=4 * PASSES * FOLDS * passed,
    )


def block_of(name: str) -> str:
    """What a stored weight is gathered with: its layer, by the first number in its name, else its own module."""
    numbered = re.match(r"(.*?\.)?\d+(?=\.)", name)
    return numbered[0] if numbered else name.rpartition(".")[0]


def least(shapes: Sequence[Sequence[int]], devices: int, itemsize: int = 4) -> int:
    """What exact products take of each at least, beside weights and graphs: with its vectors elsewhere but one."""
    whole = sum(prod(shape) for shape in shapes)
    share = sum(-(-prod(shape) // devices) for shape in shapes)
    return int(((PREPARED + BESIDE + WORKING + 1) * share + GATHERED * whole) * itemsize)
