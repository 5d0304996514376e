"""Inverse roots of preconditioners that are diagonal in a basis of their own, one orthogonal matrix for each side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal

Sides = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Rotated:
    """P = Q D Q^T, where Q is the Kronecker product of an orthogonal matrix for each side of a tensor, and D is diagonal.

    The form of SOAP (arXiv 2409.11321), and of Shampoo (arXiv 1802.09568), where D is a product over the sides too. For a
    matrix X, Q^T X is A^T X B with sides A and B.

    Attributes:
        sides: for each dimension of D's entries, an orthogonal matrix, of shape (n, n), whose columns are the basis; None
            for the identity.
        inner: D by its inverse root; its entries have as many dimensions as there are sides, and as many entries as the
            parameter. Their shape may differ from the parameter's, where neighbouring dimensions are taken as one.
    """

    sides: Sides
    inner: Diagonal

    @property
    def idle(self) -> int:
        """How many directions of the basis never had a gradient."""
        return self.inner.idle

    @property
    def positive(self) -> bool:
        """Whether D is finite and above 0 on every direction of the basis that had a gradient."""
        return self.inner.positive

    def apply(self, tensor: Tensor) -> Tensor:
        """Q D^(-1/2) Q^T x; nothing of x along directions that never had a gradient."""
        return self._back(self.inner.apply(self._there(tensor)), tensor)

    def invert(self, tensor: Tensor) -> Tensor:
        """Q D^(1/2) Q^T x; nothing of x along directions that never had a gradient."""
        return self._back(self.inner.invert(self._there(tensor)), tensor)

    def solve(self, tensor: Tensor) -> Tensor:
        """Q D^(-1) Q^T x, along directions that never had a gradient too."""
        return self._back(self.inner.solve(self._there(tensor)), tensor)

    def scaled(self, factor: float) -> Rotated:
        """P times the factor; the same directions are idle."""
        return replace(self, inner=self.inner.scaled(factor))

    def to(self, parameter: Tensor) -> Rotated:
        """Basis and entries in the parameter's precision on its device."""
        sides = tuple(None if side is None else side.to(parameter) for side in self.sides)
        return Rotated(sides, self.inner.to(parameter))

    def _there(self, tensor: Tensor) -> Tensor:
        return turned(tensor.reshape(self.inner.entries.shape), self.sides)

    def _back(self, tensor: Tensor, like: Tensor) -> Tensor:
        return turned(tensor, [None if side is None else side.T for side in self.sides]).reshape(like.shape)


def turned(tensor: Tensor, sides: Sequence[Tensor | None]) -> Tensor:
    """A tensor times a matrix on each of its sides: sum over i of x[.., i, ..] A[i, k].

    Args:
        sides: one for each dimension, of shape (n, k) where that has n entries; None leaves it.
    """
    for dimension, side in enumerate(sides):
        if side is not None:
            tensor = torch.tensordot(tensor, side, dims=([dimension], [0])).movedim(-1, dimension)
    return tensor
