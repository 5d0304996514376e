"""Unit balls of the norms in which normalised optimizers descend steepest, and those norms' duals.

Sign descent and Lion step along sign(m), the steepest direction in the max-norm; Muon steps along the polar factor of every
matrix, the steepest one in the spectral norm. A model's ball is the product of its parameters' (Bernstein and Newhouse,
arXiv 2409.20325), each with the radius that the optimizer scales its step by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

DENSE = 512  # of the shorter side, up to which a polar factor is that of the singular value decomposition
_ITERATIONS = 18  # of Newton-Schulz: singular values from 2e-5 of the Frobenius norm on come to 1


class Ball(Protocol):
    """The ball ||d|| <= 1 of a norm of one parameter's tensors."""

    @property
    def radius(self) -> float:
        """What the optimizer's normalised step is scaled by, the learning rate left out."""
        ...

    def steepest(self, tensor: Tensor) -> Tensor:
        """A d of the ball for which <x, d> is largest, in the parameter's shape."""
        ...

    def dual(self, tensor: Tensor) -> float:
        """The largest <x, d> over the ball: the dual norm."""
        ...

    def scaled(self, factor: float) -> Self:
        """The ball of a step that is so many times as long."""
        ...


@dataclass(frozen=True)
class MaxNorm:
    """No entry of d is larger than the radius: the ball of sign descent; its dual is the l1 norm."""

    radius: float = 1.0

    def steepest(self, tensor: Tensor) -> Tensor:
        """radius sign(x)."""
        return tensor.sign() * self.radius

    def dual(self, tensor: Tensor) -> float:
        """radius times the sum of magnitudes."""
        # In float64, since a large tensor has many entries to add up; MPS has no float64.
        return self.radius * float(tensor.abs().sum(dtype=torch.float64 if tensor.device.type != "mps" else None))

    def scaled(self, factor: float) -> Self:
        """Of a radius so many times as large."""
        return replace(self, radius=self.radius * factor)


@dataclass(frozen=True)
class Spectral:
    """No singular value of d is larger than the radius: Muon's ball; its dual is the nuclear norm.

    A parameter of four dimensions is one matrix, of shape (first, the rest), as Muon takes convolutions; one of three is a
    stack of matrices, each with a ball of its own.
    """

    radius: float = 1.0

    def steepest(self, tensor: Tensor) -> Tensor:
        """radius U V' for the singular value decomposition U S V'. Of a large matrix near it, and within the ball."""
        return polar(_matrices(tensor)).reshape(tensor.shape) * self.radius

    def dual(self, tensor: Tensor) -> float:
        """radius times the nuclear norm, the sum of singular values; of a large matrix from below, by a factor of 1e-3."""
        matrices = _matrices(tensor)
        if min(matrices.shape[-2:]) <= DENSE:
            return self.radius * float(torch.linalg.svdvals(matrices).sum())
        return self.radius * float((matrices * polar(matrices)).sum())

    def scaled(self, factor: float) -> Spectral:
        """Of a radius so many times as large."""
        return replace(self, radius=self.radius * factor)


def polar(matrices: Tensor) -> Tensor:
    """U V' of matrices U S V', of shape (..., m, n): exactly up to DENSE, by Newton-Schulz for larger ones.

    The iteration x (15 - 10 x^2 + 3 x^4) / 8 takes singular values to 1 from below and none beyond it, unlike Muon's own
    five steps, which leave them between 0.7 and 1.2. So what is found lies within the ball.
    """
    if min(matrices.shape[-2:]) <= DENSE:
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        factor: Tensor = u @ vh
        return factor
    # Work with the smaller of the two Gram matrices.
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    # The Frobenius norm is no less than the largest singular value, so that all begin at 1 or below.
    size = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / torch.where(size > 0, size, torch.ones_like(size))
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = (15 / 8) * x + (-(10 / 8) * gram + (3 / 8) * gram @ gram) @ x
    return x if wide else x.mT


def _matrices(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() > 3 else tensor
