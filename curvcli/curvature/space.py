"""Vector spaces: all that a solver may ask of vectors, so that how they are stored is another space and no other solver.

A vector is a tensor of the entries that are held here, all of them on one device. In a space that is sharded each process
holds a part: what is linear acts on the part alone, and only `inner`, `norm`, `finite`, `count`, `gather` and `agree`
have to speak with the other processes, which call them in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from curvcli.curvature.precision import inner, length
from curvcli.curvature.ranks import Ranks, current

DRAWN = 2**20  # random numbers at a time; a multiple of the 16 that torch draws from as many uniform ones
LAST = 16  # of the end of a draw, which torch makes together


class Space(Protocol):
    """Real vectors of `size` entries, of which n are held here."""

    @property
    def size(self) -> int:
        """Entries of a whole vector."""
        ...

    def empty(self, rows: int) -> Tensor:
        """Room for a basis, of shape (rows, n)."""
        ...

    def random(self, generator: torch.Generator) -> Tensor:
        """A vector of independent normal entries, of shape (n,)."""
        ...

    def inner(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Inner products of vectors, of shape (k, n), with one of shape (n,): shape (k,), the same in all processes."""
        ...

    def here(self, vectors: Tensor) -> Tensor:
        """Vectors, of shape (n,) or (k, n), on the device of this space: copies of those that lie elsewhere."""
        ...

    def combine(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """Linear combinations: coefficients of shape (k,) or (m, k), vectors (k, n), result (n,) or (m, n)."""
        ...

    def norm(self, vector: Tensor) -> float:
        """Euclidean norm."""
        ...

    def finite(self, vector: Tensor) -> bool:
        """Whether no entry is NaN or infinite."""
        ...

    def count(self, mask: Tensor) -> int:
        """How many entries of a boolean vector of shape (n,) are true."""
        ...

    def gather(self, vector: Tensor) -> Tensor:
        """The whole vector, of shape (size,)."""
        ...

    def agree(self, *numbers: float) -> list[float]:
        """The same numbers, or decisions, in all processes, which may have rounded differently, or read another clock."""
        ...


@dataclass(frozen=True)
class OneDevice:
    """The space of vectors that lie on one device as a whole."""

    size: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, rows: int) -> Tensor:
        """Memory of shape (rows, size) that is not filled."""
        return torch.empty((rows, self.size), dtype=self.dtype, device=self.device)

    def random(self, generator: torch.Generator) -> Tensor:
        """The same vector, up to rounding, for a generator's seed in every precision; on a GPU another than on the CPU."""
        if self.device.type == "cuda":
            # A CPU draws 124 million in five seconds, in which a GPU makes ten products of GPT-2.
            own = torch.Generator(self.device).manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            return torch.randn(self.size, generator=own, dtype=self.dtype, device=self.device)
        return self._drawn(generator)

    def _drawn(self, generator: torch.Generator) -> Tensor:
        found = torch.empty(self.size, dtype=self.dtype)
        for begin, part in drawn(self.size, generator):
            found[begin : begin + len(part)] = part
        return found.to(self.device)

    def inner(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Products of the rows, of shape (k, size), with the vector, good to rounding at any length."""
        return inner(rows, vector)

    def here(self, vectors: Tensor) -> Tensor:
        """Vectors on the space's device; themselves, where they lie there."""
        return vectors.to(self.device)

    def combine(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """One product of the coefficients, in the rows' precision and on their device, with the rows."""
        # Coefficients are from small problems, solved in float64 on the CPU.
        return coefficients.to(rows.dtype).to(rows.device) @ rows

    def norm(self, vector: Tensor) -> float:
        """Euclidean norm; on a GPU this waits for it."""
        return length(vector)

    def finite(self, vector: Tensor) -> bool:
        """Whether no entry is NaN or infinite; on a GPU this waits for the answer."""
        low, high = torch.aminmax(vector)  # NaN where there is one: a pass without a mask of the vector's length
        return bool(torch.isfinite(low) & torch.isfinite(high))

    def count(self, mask: Tensor) -> int:
        """How many entries are true; on a GPU this waits for the answer."""
        return int(mask.sum())

    def gather(self, vector: Tensor) -> Tensor:
        """The vector itself, which is whole already; not a copy."""
        return vector

    def agree(self, *numbers: float) -> list[float]:
        """The numbers themselves."""
        return list(numbers)


@dataclass(frozen=True)
class Replicated(OneDevice):
    """The space of vectors of which every process holds the whole, the same but for rounding.

    So each can compute what it needs by itself; only what is decided, and what is given out, has to be the same to the bit.
    """

    ranks: Ranks

    def random(self, generator: torch.Generator) -> Tensor:
        """As the CPU draws it: from one seed GPUs of two kinds draw different numbers."""
        return self._drawn(generator)

    def agree(self, *numbers: float) -> list[float]:
        """Rank 0's numbers."""
        return self.ranks.first(numbers)


def space_of(size: int, dtype: torch.dtype, device: torch.device) -> OneDevice:
    """The space of vectors of one device here: replicated where several processes measure together."""
    ranks = current()
    return OneDevice(size, dtype, device) if ranks.world == 1 else Replicated(size, dtype, device, ranks)


def drawn(size: int, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """So many independent normal numbers part by part, each with where it begins: the same as all of them at once.

    In float64 on the CPU, so that a seed means the same vector in every precision; in parts, so that no vector of twice the
    size is held.
    """
    begin = 0
    while begin < size:
        count = DRAWN if size - begin >= DRAWN + LAST else size - begin
        yield begin, torch.randn(count, generator=generator, dtype=torch.float64)
        begin += count
