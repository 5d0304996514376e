"""The gradient of a mean loss, and how far those of its batches lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from curvcli.curvature.precision import norm
from curvcli.curvature.problem import Problem, gradient


@dataclass(frozen=True)
class Spread:
    """Norms of the gradients of a problem's batches.

    Args:
        squares: sum over batches of (weight * norm) squared.
        weights: sum of squared weights, 1 where there is one batch.
    """

    squares: float
    weights: float

    @property
    def batch(self) -> float:
        """Norm of a batch's gradient, as the root mean square."""
        return sqrt(self.squares / self.weights)

    def mean(self, whole: float) -> float:
        """Norm of the gradient that the batches are samples of, from that of their mean: without what chance adds to it.

        Two batches' gradients have an inner product whose expectation is that norm squared. 0 where chance is all there is;
        of one batch nothing can be told apart.
        """
        if self.weights >= 1:
            return whole
        return sqrt(max(0.0, whole**2 - self.squares) / (1 - self.weights))


def spread_gradient(problem: Problem, names: Sequence[str]) -> tuple[list[Tensor], Spread]:
    """As `gradient`, and the spread of what it is the mean of."""
    squares = weights = 0.0

    def see(index: int, parts: Sequence[Tensor]) -> None:
        nonlocal squares, weights
        weights += problem.weights[index] ** 2
        squares += (problem.weights[index] * norm(parts)) ** 2

    found = gradient(problem, names, see)
    return found, Spread(sum(problem.ranks.each(squares)), sum(problem.ranks.each(weights)))
