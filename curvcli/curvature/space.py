"""Vector spaces: all that a solver may ask of vectors, so that how they are stored is another space and no other solver.

A vector is a tensor of the entries that are held here, all of them on one device. In a space that is sharded each process
holds a part: what is linear acts on the part alone, and only `inner`, `norm`, `finite`, `count` and `gather` have to speak
with the other processes, which call them in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from curvcli.curvature.precision import inner, length


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
        """The same vector, up to rounding, for a generator's seed in every precision and on every device."""
        # Drawn in float64 on the CPU, so that a seed means the same vector in every precision and on every device.
        return torch.randn(self.size, generator=generator, dtype=torch.float64).to(self.dtype).to(self.device)

    def inner(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Products of the rows, of shape (k, size), with the vector, good to rounding at any length."""
        return inner(rows, vector)

    def combine(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """One product of the coefficients, in the rows' precision and on their device, with the rows."""
        return coefficients.to(rows.dtype).to(rows.device) @ rows

    def norm(self, vector: Tensor) -> float:
        """Euclidean norm; on a GPU this waits for it."""
        return length(vector)

    def finite(self, vector: Tensor) -> bool:
        """Whether no entry is NaN or infinite; on a GPU this waits for the answer."""
        return bool(torch.isfinite(vector).all())

    def count(self, mask: Tensor) -> int:
        """How many entries are true; on a GPU this waits for the answer."""
        return int(mask.sum())

    def gather(self, vector: Tensor) -> Tensor:
        """The vector itself, which is whole already; not a copy."""
        return vector
