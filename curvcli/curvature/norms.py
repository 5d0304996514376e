"""Spectral norms of weight matrices, with a certificate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.space import OneDevice

DENSE = 128  # of the shorter side, up to which singular values are computed all
TOLERANCE = 1e-2  # of the square, so that a norm is good to half a percent


class _Gram:
    """W'W as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.space = OneDevice(matrix.shape[1], matrix.dtype, matrix.device)

    def matvec(self, vector: Tensor) -> Tensor:
        """W'W v for v of shape (columns,)."""
        return self.matrix.T @ (self.matrix @ vector)


def spectral_norm(matrix: Tensor) -> float | None:
    """Largest singular value of a matrix, of shape (m, n); None where it is not finite, or did not converge.

    Of a large one the top eigenvalue of W'W by Lanczos from a random start: a lower bound, above which nothing lies but
    within `TOLERANCE`, with the certainty that eigenvalues of the Hessian have.
    """
    matrix = matrix.detach().float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix.detach()
    if not bool(torch.isfinite(matrix).all()):
        return None
    if min(matrix.shape) <= DENSE:
        return float(torch.linalg.matrix_norm(matrix, ord=2))
    # Lanczos vectors have the length of the shorter side.
    matrix = matrix if matrix.shape[1] <= matrix.shape[0] else matrix.T
    found = Lanczos(TOLERANCE, TOLERANCE, max_products=100, bottom_tolerance=float("inf")).extremes(_Gram(matrix))
    return found.top.value**0.5 if found.top is not None and found.status == "converged" and found.top.value > 0 else None


def largest_spectral_norm(module: nn.Module) -> float | None:
    """The largest over a module's weights; None where it has none, or one of them could not be had.

    A convolution's kernels are one matrix, of shape (outputs, the rest); what else has three dimensions is a stack of
    matrices (a mixture's experts). Vectors do not count.
    """
    found: list[float | None] = []
    for part in module.modules():
        convolution = isinstance(part, nn.modules.conv._ConvNd)  # torch has no public base class of them
        for weight in part.parameters(recurse=False):
            if weight.dim() < 2 or not weight.numel():
                continue
            one = convolution or weight.dim() == 2
            matrices = [weight.flatten(1)] if one else list(weight.flatten(0, -3))
            found += [spectral_norm(matrix) for matrix in matrices]
    known = [norm for norm in found if norm is not None]
    return max(known) if known and len(known) == len(found) else None
