"""Symmetric operators: all that an eigensolver may know of a curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from curvcli.curvature.hvp import HVP
from curvcli.curvature.space import OneDevice, Space


class Operator(Protocol):
    """A real symmetric operator on the vectors of a space."""

    @property
    def space(self) -> Space: ...

    def matvec(self, vector: Tensor) -> Tensor:
        """Image of a vector of the space."""
        ...


class DenseOperator:
    """A symmetric matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix  # (n, n)
        self.space = OneDevice(matrix.shape[0], matrix.dtype, matrix.device)

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector


class PreconditionedHessian:
    """S^(1/2) (H + L) S^(1/2) restricted to named parameters, on flat vectors.

    With S = P^(-1) this is the preconditioned Hessian G (arXiv 2606.16768). L is the diagonal that a
    coupled (not decoupled) weight decay adds to the Hessian.

    Args:
        hvp: products with H.
        names: the parameters that move; order of the flat vector.
        scale: root of S for each name, in the parameter's shape.
        decay: coupled weight decay for each name (absent means 0).
    """

    def __init__(
        self, hvp: HVP, names: Sequence[str], scale: dict[str, Tensor], decay: dict[str, float] | None = None
    ) -> None:
        if not names:
            raise ValueError("an operator needs at least one parameter")
        self.hvp, self.names = hvp, tuple(names)
        self.scale = [scale[n] for n in names]
        self.decay = [(decay or {}).get(n, 0.0) for n in names]
        self.sizes = [s.numel() for s in self.scale]
        self.space = OneDevice(sum(self.sizes), self.scale[0].dtype, self.scale[0].device)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat vector as tensors in the parameters' shapes (views)."""
        return [v.view(s.shape) for v, s in zip(vector.split(self.sizes), self.scale, strict=True)]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Inverse of `split`."""
        return torch.cat([t.reshape(-1) for t in tensors])

    def matvec(self, vector: Tensor) -> Tensor:
        tangents = [s * v for s, v in zip(self.scale, self.split(vector), strict=True)]
        images = self.hvp.product(self.names, tangents)
        return self.flatten(
            [
                s * (image.detach() + weight * t if weight else image.detach())
                for s, image, t, weight in zip(self.scale, images, tangents, self.decay, strict=True)
            ]
        )

    def mask(self, names: Sequence[str]) -> Tensor:
        """Boolean vector, true on the entries of the given names."""
        chosen = set(names)
        return torch.cat(
            [
                torch.full((size,), n in chosen, dtype=torch.bool, device=self.space.device)
                for n, size in zip(self.names, self.sizes, strict=True)
            ]
        )

    def carry(self, vector: Tensor, names: Sequence[str], sizes: dict[str, int]) -> Tensor:
        """A flat vector over other `names` (of `sizes`): cut to this operator's, padded with zeros."""
        pieces = dict(zip(names, vector.split([sizes[n] for n in names]), strict=True))
        return torch.cat(
            [pieces[n] if n in pieces else vector.new_zeros(size) for n, size in zip(self.names, self.sizes, strict=True)]
        )

    def lower(self, direction: Mapping[str, Tensor]) -> Tensor:
        """A direction of the weights as a flat vector, the inverse of `lift`; absent names are 0."""
        pieces = []
        for name, scale in zip(self.names, self.scale, strict=True):
            if name in direction and direction[name].shape == scale.shape:
                ratio = direction[name].to(scale) / scale
                pieces.append(torch.where(scale > 0, ratio, torch.zeros_like(ratio)))
            else:
                pieces.append(torch.zeros_like(scale))
        return self.flatten(pieces)


def lift(vector: Tensor, names: Sequence[str], scale: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat vector v over `names` as the direction S^(1/2) v of the weights: what lasts while S moves on."""
    pieces = vector.split([scale[n].numel() for n in names])
    return {n: scale[n] * v.view(scale[n].shape) for n, v in zip(names, pieces, strict=True)}
