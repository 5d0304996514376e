"""Both ends of a symmetric operator's spectrum by a thick-restarted Davidson iteration, warm from vectors at hand.

A small residual says that some eigenvalue is near, not that none lies above: a start that is nearly an eigenvector stops the
solve before anything else is seen. Where that matters take curvature/lanczos.py.

The basis grows by the residual of the wanted Ritz pair, which from one start vector spans the same
Krylov space as Lanczos, so the two ends share every product. Unlike Lanczos it takes any number of
warm start vectors, and unlike LOBPCG it keeps what memory allows; at a restart it keeps the extreme
Ritz vectors and the previous iterate of the wanted one (GD+k: Stathopoulos and McCombs, SIAM J. Sci.
Comput. 29, 2007), which keeps convergence near that of the unrestarted method.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvcli.curvature.operator import LARGE, Operator
from curvcli.curvature.ritz import Extremes, Ritz, Status, agreed
from curvcli.curvature.space import Space


@dataclass(frozen=True)
class Davidson:
    """Settings of the eigensolver.

    Args:
        tolerance: residual over |eigenvalue| at which the top pair counts as converged. The error of
            the value is then about its square times |eigenvalue| over the spectral gap.
        bottom_tolerance: the same for the smallest eigenvalue, over half the top where that is larger:
            what is smaller does not matter beside it, and is not waited for. It counts as converged only
            within a tenth of itself, however little it is beside the top.
        max_products: stop after this many products.
        basis: vectors kept, at least 6; memory is twice this many vectors.
        asymmetry: |u.Gv - v.Gu| over the norm of G, at most, before the products are called wrong.
        seed: of the random start.
        deadline: instant of `time.monotonic()` at which to stop with what there is.
        least: top value below which the result is of no use: the solve ends as "max-hvps" once it is not to be expected to
            rise so far, an error being about residual^2 over the spectral gap, which is taken for half the value.
    """

    tolerance: float = 1e-2
    bottom_tolerance: float = 1e-1
    max_products: int = 200
    basis: int = 24
    asymmetry: float = 1e-3
    seed: int = 0
    deadline: float = float("inf")
    least: float = -float("inf")

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self.deadline

    def extremes(self, operator: Operator, start: Sequence[Tensor] = ()) -> Extremes:
        """Largest and smallest algebraic eigenvalue of `operator`.

        Args:
            start: warm start vectors of the operator's space, any number. A random one is used
                where there is none.
        """
        # At least six: a restart keeps four, and there has to be room to grow.
        space = _Subspace(operator, min(max(self.basis, 6), operator.space.size), self.seed)
        for vector in start:
            space.expand(vector)
        if not space.count:
            space.expand(space.random())
        while space.status is None:
            top, bottom = space.pair(-1), space.pair(0)
            top_done = top.residual <= self.tolerance * abs(top.value)
            # Of a positive operator the far end is rounding, without digits of its own: against the top it is 0.
            bottom_done = bottom.residual <= self.bottom_tolerance * max(abs(bottom.value), abs(top.value) / 2)
            # One vector, as from a warm start that is an eigenvector still, says nothing of the other end, nor that
            # nothing lies above it.
            bottom_done = bottom_done and (space.count > 1 or space.complete or self.bottom_tolerance == float("inf"))
            reach = top.value + 2 * top.residual**2 / max(abs(top.value), 1e-30)
            over = (top_done and bottom_done) or space.complete or space.products >= self.max_products or self.expired
            over = over or reach < self.least
            over, top_done = map(bool, operator.space.agree(over, top_done))
            status: Status = "converged" if top_done or space.complete else "max-hvps"
            if space.skew > self.asymmetry * space.norm:
                status = "asymmetric"
            if over:
                known = bottom.residual <= 0.1 * abs(bottom.value)
                found = Extremes(top, bottom, space.vector(-1), status, space.products, known)
                return agreed(found, operator.space.agree)
            # The bottom only gets products that the top no longer needs.
            space.improve(0 if top_done else -1)
        return Extremes(None, None, None, space.status, space.products)


class _Rows:
    """Vectors that are filled in order. A GPU's memory is taken as they come: there an empty tensor takes it all at once."""

    def __init__(self, space: Space, capacity: int) -> None:
        self.space = space
        none = space.empty(0)
        few = 1 if none.shape[1] * none.element_size() >= LARGE else 4
        self.size = capacity if none.device.type == "cpu" else min(few, capacity)  # of a block
        self.blocks: list[Tensor] = []  # each (size, n)

    def __setitem__(self, index: int, vector: Tensor) -> None:
        block, row = divmod(index, self.size)
        if block == len(self.blocks):
            self.blocks.append(self.space.empty(self.size))
        self.blocks[block][row] = vector

    def inner(self, count: int, vector: Tensor) -> Tensor:
        """Inner products of the first `count` with a vector, of shape (count,)."""
        used = range(0, count, self.size)
        parts = [self.space.inner(b[: count - i], vector) for i, b in zip(used, self.blocks, strict=False)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Combinations of the first k: coefficients of shape (k,) or (m, k), result (n,) or (m, n)."""
        count, found = coefficients.shape[-1], None
        for i, block in zip(range(0, count, self.size), self.blocks, strict=False):
            part = self.space.combine(coefficients[..., i : i + self.size], block[: count - i])
            found = part if found is None else found.add_(part)
        assert found is not None  # noqa: S101  (k is 1 at least)
        return found


class _Subspace:
    """An orthonormal basis, its images, and the operator projected on it."""

    def __init__(self, operator: Operator, capacity: int, seed: int) -> None:
        self.operator, self.space = operator, operator.space
        self.capacity = capacity
        self.basis = _Rows(self.space, capacity)  # of which the first `count` are in use
        self.images = _Rows(self.space, capacity)  # G times the basis
        self.projected = torch.zeros((capacity, capacity), dtype=torch.float64)
        self.count = self.products = 0
        self.skew = 0.0
        self.status: Literal["non-finite"] | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self.previous: Tensor | None = None  # the last wanted Ritz vector, in coordinates of the basis
        self.values, self.vectors = torch.zeros(0), torch.zeros(0, 0)

    @property
    def complete(self) -> bool:
        """The basis spans the whole space: the Ritz values are the eigenvalues."""
        return self.count == self.space.size

    @property
    def norm(self) -> float:
        return float(self.values.abs().max())

    def random(self) -> Tensor:
        return self.space.random(self.generator)

    def expand(self, vector: Tensor) -> None:
        """Add a direction at the cost of one product; one inside the span is replaced by a random one."""
        if self.status is not None or self.complete:
            return
        if self.count == self.capacity:
            self._restart()
        direction = self._orthonormal(vector)
        while direction is None:
            direction = self._orthonormal(self.random())
        image = self.operator.matvec(direction)
        self.products += 1
        if not self.space.finite(image):
            self.status = "non-finite"
            return
        n = self.count
        self.basis[n], self.images[n] = direction, image
        # Fetched together: a GPU is waited for once.
        both = torch.stack([self.basis.inner(n + 1, image), self.images.inner(n + 1, direction)])
        column, row = both.cpu().double()
        self.skew = max(self.skew, float((column - row).abs().max()))
        # The mean of both, since eigh reads only one triangle; `skew` remembers how far they differ.
        self.projected[: n + 1, n] = self.projected[n, : n + 1] = (column + row) / 2
        self.count = n + 1
        self.values, self.vectors = torch.linalg.eigh(self.projected[: n + 1, : n + 1])

    def pair(self, index: int) -> Ritz:
        """Ritz pair by rank: -1 is the top, 0 the bottom."""
        return Ritz(float(self.values[index]), self.space.norm(self._residual(index)))

    def vector(self, index: int) -> Tensor:
        """The vector of a Ritz value, of norm 1."""
        return self.basis.combine(self.vectors[:, index])

    def improve(self, index: int) -> None:
        """Expand by the residual of one Ritz pair, restarting first where the basis is full."""
        residual = self._residual(index)
        # Where the basis is full `expand` restarts first, and uses the coordinates of the step before.
        if self.count < self.capacity:
            self.previous = self.vectors[:, index]
        self.expand(residual)

    def _residual(self, index: int) -> Tensor:
        image = self.images.combine(self.vectors[:, index])
        return image - float(self.values[index]) * self.vector(index)

    def _restart(self) -> None:
        """Keep the extreme Ritz vectors and the previous iterate (GD+k)."""
        m = self.count
        # More of the top, which is what is wanted; some of the bottom for the other end and the norm of G.
        top, bottom = max(2, m // 3), max(1, m // 6)
        kept = [*self.vectors[:, -top:].T, *self.vectors[:, :bottom].T]
        if self.previous is not None:
            kept.append(torch.cat([self.previous, self.previous.new_zeros(m - len(self.previous))]))
        # QR drops nothing here: the previous iterate is no Ritz vector of the basis that has grown since.
        rotation = torch.linalg.qr(torch.stack(kept, dim=1)).Q
        k = rotation.shape[1]
        for rows in (self.basis, self.images):
            for index, vector in enumerate(rows.combine(rotation.T)):
                rows[index] = vector
        self.projected[:k, :k] = rotation.T @ self.projected[:m, :m] @ rotation
        self.count = k
        self.previous = None

    def _orthonormal(self, vector: Tensor) -> Tensor | None:
        """The part of `vector` outside the basis, normalised; None where rounding is all that is left."""
        norm = self.space.norm(vector)
        if not 0 < norm < float("inf"):
            return None
        direction = vector / norm
        for _ in range(3):  # "twice is enough" holds for one vector against a basis orthonormal to rounding
            if self.count:
                direction = direction - self.basis.combine(self.basis.inner(self.count, direction))
            left = self.space.norm(direction)
            if left < 1e-5:  # of a vector of norm 1: no digit of float32 is left of a direction
                return None
            direction = direction / left
        return direction
