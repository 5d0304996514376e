"""How far an eigenvalue moves with the data: the jackknife over folds of the shard, without a product of its own.

A Lanczos basis that the whole shard's eigenvalue has converged in holds those of all but one fold well enough, so leaving a
fold out is an eigenproblem of the basis' size (delete-a-group jackknife with unequal groups: Busing, Meijer and van der
Leeden, Statistics and Computing 9, 1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, sqrt

import torch
from torch import Tensor

# Student's t with 1, 2, ... degrees of freedom at 95 %, one side: 90 % between both ends.
_T = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
CONFIDENCE = 0.9
# Over the value: how well a solve, which stops at this residual, knows what is left without a fold. Where the top is one of
# many equal entries, as of a weight decay, no fold has a part in it and the jackknife sees no error at all.
_SOLVED = 1e-2


@dataclass(frozen=True)
class Folds:
    """The operator of each fold of the shard between the vectors of a solve on the whole."""

    weights: Sequence[float]  # of each fold in the mean, summing to 1
    matrices: Tensor  # (folds, k, k), float64, symmetric

    def spread(self) -> Spread:
        """The jackknife. At least two folds."""
        count = len(self.weights)
        weights = torch.tensor(list(self.weights), dtype=torch.float64)
        parts = weights[:, None, None] * self.matrices
        whole, _ = _top(parts.sum(dim=0))
        left, held = torch.empty(count, dtype=torch.float64), torch.empty(count, dtype=torch.float64)  # (folds,) each
        for i in range(count):
            left[i], vector = _top((parts.sum(dim=0) - parts[i]) / (1 - weights[i]))
            held[i] = vector @ self.matrices[i] @ vector
        scale = 1 / weights
        # Busing et al., with h_i = 1 / w_i: the value less its bias; then its variance over pseudo-values.
        corrected = count * whole - float(((1 - weights) * left).sum())
        pseudo = scale * whole - (scale - 1) * left
        error = sqrt(float(((pseudo - corrected).square() / (scale - 1)).mean()))
        return Spread(float((weights * held).sum()), corrected, error, count)

    def prefix(self, count: int) -> tuple[float, float]:
        """The first folds' share of the shard, and their top eigenvalue between the vectors: a lower bound of it."""
        share = sum(self.weights[:count])
        weights = torch.tensor(list(self.weights[:count]), dtype=torch.float64)
        value, _ = _top((weights[:, None, None] * self.matrices[:count]).sum(dim=0) / share)
        return share, value


@dataclass(frozen=True)
class Spread:
    """What leaving folds out says of an eigenvalue.

    Attributes:
        held_out: mean over folds of v.Gv on the fold, for the top vector v of the others. In expectation it is at most the
            eigenvalue of the data behind the shard.
        corrected: the eigenvalue less the jackknife's estimate of its bias: that of few data overstates that of many.
        error: its standard error.
        folds: how many.
    """

    held_out: float
    corrected: float
    error: float
    folds: int

    def bracket(self, value: float, above: float) -> tuple[float, float]:
        """Ends between which the data's eigenvalue lies with a confidence of 90 %.

        Args:
            value: the whole shard's top Ritz value.
            above: how far above it the shard's eigenvalue may lie.
        """
        # m folds leave m - 1 degrees of freedom.
        reach = hypot(_T[min(self.folds - 1, len(_T)) - 1] * self.error, _SOLVED * value)
        low = min(self.held_out, self.corrected, value) - reach
        return max(low, min(0.0, value)), value + above + reach  # a top eigenvalue below 0 would be news


def _top(matrix: Tensor) -> tuple[float, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), vectors[:, -1]
