"""Matrices of an optimizer's state, one for each side of a parameter: where they are kept, and what they have to be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvcli.curvature.rotated import Sides
from curvcli.errors import InputError
from curvcli.optimizers.base import State

MOST_SIDES = 8  # of a parameter: convolutions have up to five dimensions
# Of eigenvectors in float32 it is 1e-6, in bfloat16 3e-3; the relative error of P is as large.
_ORTHOGONAL = 2e-2
_ROUNDING = 1e-4  # of the largest eigenvalue
_SYMMETRIC = 2e-2  # of the largest entry; inverse roots by SVD in float32 are symmetric to 1e-5, in bfloat16 to 4e-3


def matrices(state: State, key: str) -> dict[int, Tensor]:
    """The tensors named `key_0`, `key_1`, ..., by their number: the side of the parameter that they are for."""
    found = {i: state.get(f"{key}_{i}") for i in range(MOST_SIDES)}
    return {i: value for i, value in found.items() if isinstance(value, Tensor)}


def rotated(state: State) -> bool:
    """Whether a parameter's second moment is in a basis that stands beside it, as SOAP's is."""
    return any(f"Q_{i}" in state for i in range(MOST_SIDES))


def basis(known: Mapping[int, Tensor], shape: tuple[int, ...]) -> Sides:
    """Square matrices as the sides of a tensor of a shape, in order; of sides without one the identity.

    Where fewer dimensions are left than the shape has, neighbours were merged. Raises InputError for what is not square.
    """
    for place, matrix in known.items():
        if matrix.dim() != 2 or len(matrix) != matrix.shape[1] or not matrix.is_floating_point():
            raise _no_basis(place, matrix, "not square")
    return tuple(known.get(i) for i in range(max(len(shape), max(known) + 1)))


def prove(sides: Sides) -> None:
    """Raises InputError where a side is not orthogonal. Costs a product of matrices each."""
    for place, matrix in enumerate(sides):
        if matrix is not None and not (error := _skewness(matrix)) < _ORTHOGONAL:
            raise _no_basis(place, matrix, f"off by {error:.2g}")


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors, of shape (n, n), in columns, and eigenvalues, of shape (n,), of a stored matrix, at least in float32.

    An eigenvalue that is below 0 by rounding is 0.

    Raises InputError where it is not symmetric, or has an eigenvalue below 0.
    """
    if matrix.is_floating_point() and bool(torch.isfinite(matrix).all()):
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        if float((matrix - matrix.T).abs().max()) <= _SYMMETRIC * float(matrix.abs().max()):
            values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
            if not bool((values < -_ROUNDING * values[-1].abs()).any()):
                return vectors, values.clamp_min(0)
    raise InputError(
        f"optimizer state of shape {tuple(matrix.shape)} is not symmetric and positive, as roots of outer products are",
        hint="the optimizer state is damaged: use another checkpoint",
    )


def _no_basis(place: int, matrix: Tensor, why: str) -> InputError:
    return InputError(
        f"optimizer state 'Q_{place}' of shape {tuple(matrix.shape)} is no orthogonal basis ({why})",
        hint="the optimizer state is damaged: use another checkpoint",
    )


def _skewness(matrix: Tensor) -> float:
    """Largest entry of |Q^T Q - I|."""
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return float((matrix.T @ matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)).abs().max())
