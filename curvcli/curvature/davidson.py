"""Both ends of a symmetric operator's spectrum by a thick-restarted Davidson iteration.

The basis grows by the residual of the wanted Ritz pair, which from one start vector spans the same
Krylov space as Lanczos, so the two ends share every product. Unlike Lanczos it takes any number of
warm start vectors, and unlike LOBPCG it keeps what memory allows; at a restart it keeps the extreme
Ritz vectors and the previous iterate of the wanted one (GD+k: Stathopoulos and McCombs, SIAM J. Sci.
Comput. 29, 2007), which keeps convergence near that of the unrestarted method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvcli.curvature.operator import Operator

Status = Literal["converged", "max-hvps", "non-finite", "asymmetric"]


@dataclass(frozen=True)
class Ritz:
    """An approximate eigenpair with its certificate: some eigenvalue lies within `residual` of `value`.

    At the top `value` is a lower bound of the largest eigenvalue, at the bottom an upper bound of
    the smallest. `vector` has shape (operator.size,) and norm 1.
    """

    value: float
    residual: float
    vector: Tensor


@dataclass(frozen=True)
class Extremes:
    """Result of a solve. `top` and `bottom` are None where status is "non-finite"."""

    top: Ritz | None
    bottom: Ritz | None
    status: Status
    products: int


@dataclass(frozen=True)
class Davidson:
    """Settings of the eigensolver.

    Args:
        tolerance: residual over |eigenvalue| at which the top pair counts as converged. The error of
            the value is then about its square times |eigenvalue| over the spectral gap.
        bottom_tolerance: the same for the smallest eigenvalue; None spends no product on it alone.
        max_products: stop after this many products.
        basis: vectors kept, at least 6; memory is twice this many vectors.
        asymmetry: |u.Gv - v.Gu| over the norm of G, at most, before the products are called wrong.
        seed: of the random start.
    """

    tolerance: float = 1e-2
    bottom_tolerance: float | None = 1e-1
    max_products: int = 200
    basis: int = 24
    asymmetry: float = 1e-3
    seed: int = 0

    def extremes(self, operator: Operator, start: Sequence[Tensor] = ()) -> Extremes:
        """Largest and smallest algebraic eigenvalue of `operator`.

        Args:
            start: warm start vectors of shape (operator.size,), any number. A random one is used
                where there is none.
        """
        space = _Subspace(operator, min(max(self.basis, 6), operator.size), self.seed)
        for vector in [*start, space.random()][: max(1, len(start))]:
            space.expand(vector)
        while space.status is None:
            top, bottom = space.pair(-1), space.pair(0)
            top_done = top.residual <= self.tolerance * abs(top.value)
            # The far end matters against the top: of a positive operator it is rounding, and has no digits.
            bottom_done = self.bottom_tolerance is None or bottom.residual <= self.bottom_tolerance * max(
                abs(bottom.value), abs(top.value)
            )
            status: Status = "converged" if top_done or space.complete else "max-hvps"
            if space.skew > self.asymmetry * space.norm:
                status = "asymmetric"
            if (top_done and bottom_done) or space.complete or space.products >= self.max_products:
                return Extremes(top, bottom, status, space.products)
            space.improve(0 if top_done else -1)
        return Extremes(None, None, space.status, space.products)


class _Subspace:
    """An orthonormal basis, its images, and the operator projected on it."""

    def __init__(self, operator: Operator, capacity: int, seed: int) -> None:
        self.operator = operator
        self.basis = torch.empty((capacity, operator.size), dtype=operator.dtype, device=operator.device)
        self.images = torch.empty_like(self.basis)
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
        return self.count == self.operator.size

    @property
    def norm(self) -> float:
        return float(self.values.abs().max())

    def random(self) -> Tensor:
        return torch.randn(self.operator.size, generator=self.generator, dtype=torch.float64).to(self.basis)

    def expand(self, vector: Tensor) -> None:
        """Add a direction at the cost of one product; one inside the span is replaced by a random one."""
        direction = self._orthonormal(vector)
        while direction is None:
            direction = self._orthonormal(self.random())
        image = self.operator.matvec(direction)
        self.products += 1
        if not bool(torch.isfinite(image).all()):
            self.status = "non-finite"
            return
        n = self.count
        self.basis[n], self.images[n] = direction, image
        column = (self.basis[: n + 1] @ image).double().cpu()
        row = (self.images[: n + 1] @ direction).double().cpu()
        self.skew = max(self.skew, float((column - row).abs().max()))
        self.projected[: n + 1, n] = self.projected[n, : n + 1] = (column + row) / 2
        self.count = n + 1
        self.values, self.vectors = torch.linalg.eigh(self.projected[: n + 1, : n + 1])

    def pair(self, index: int) -> Ritz:
        """Ritz pair by rank: -1 is the top, 0 the bottom."""
        y = self.vectors[:, index].to(self.basis)
        vector = y @ self.basis[: self.count]
        residual = y @ self.images[: self.count] - float(self.values[index]) * vector
        return Ritz(float(self.values[index]), float(torch.linalg.vector_norm(residual)), vector)

    def improve(self, index: int) -> None:
        """Expand by the residual of one Ritz pair, restarting first where the basis is full."""
        y = self.vectors[:, index].to(self.basis)
        residual = y @ self.images[: self.count] - float(self.values[index]) * (y @ self.basis[: self.count])
        wanted = self.vectors[:, index]
        if self.count == len(self.basis):
            self._restart()
        else:
            self.previous = wanted
        self.expand(residual)

    def _restart(self) -> None:
        """Keep the extreme Ritz vectors and the previous iterate (GD+k)."""
        m = self.count
        top, bottom = max(2, m // 3), max(1, m // 6)
        kept = [*self.vectors[:, -top:].T, *self.vectors[:, :bottom].T]
        if self.previous is not None:
            kept.append(torch.cat([self.previous, self.previous.new_zeros(m - len(self.previous))]))
        # QR drops nothing here: the previous iterate is no Ritz vector of the basis that has grown since.
        rotation = torch.linalg.qr(torch.stack(kept, dim=1)).Q
        k = rotation.shape[1]
        coordinates = rotation.T.to(self.basis)
        self.basis[:k] = coordinates @ self.basis[:m]
        self.images[:k] = coordinates @ self.images[:m]
        self.projected[:k, :k] = rotation.T @ self.projected[:m, :m] @ rotation
        self.count = k
        self.previous = None

    def _orthonormal(self, vector: Tensor) -> Tensor | None:
        """The part of `vector` outside the basis, normalised; None where rounding is all that is left."""
        norm = float(torch.linalg.vector_norm(vector))
        if not 0 < norm < float("inf"):
            return None
        direction = vector / norm
        for _ in range(3):  # "twice is enough" holds for one vector against a basis orthonormal to rounding
            rows = self.basis[: self.count]
            direction = direction - (rows @ direction) @ rows
            left = float(torch.linalg.vector_norm(direction))
            if left < 1e-5:
                return None
            direction = direction / left
        return direction
