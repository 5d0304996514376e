"""Sharpness in a norm, S = max of d'Hd over ||d|| <= 1: for optimizers whose step is steepest in a norm and normalised.

To second order such a step changes the loss by -lr ||g||_dual + lr^2 S / 2 at most, so the edge of stability of normalised
descent is Z = lr S / (2 ||g||_dual) = 1 (arXiv 2603.05002). To maximise a quadratic form over such a ball is NP-hard in
general (over the max-norm's it is max-cut), so what is found is a lower bound of S, from several starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

import torch
from torch import Tensor

from curvcli.curvature.balls import Ball
from curvcli.curvature.precision import all_finite, numbers
from curvcli.curvature.ranks import ALONE, Ranks, agreed, current

Product = Callable[[Sequence[Tensor]], list[Tensor]]
SharpnessStatus = Literal["settled", "unsettled", "flat", "non-finite"]


@dataclass(frozen=True)
class Sharpest:
    """What `FrankWolfe.sharpest` found.

    Attributes:
        value: d'Hd for the best d found, a lower bound of S; None where a product is not finite.
        direction: that d, a tensor for each parameter; None where `value` is.
        starts: what every start had come to when each had taken as many products as any other.
        improvement: of the value by its last step, over the value.
        products: Hessian-vector products spent.
        status: settled, the last step improved the value by less than the tolerance; flat: no curvature found is positive.
    """

    value: float | None
    direction: list[Tensor] | None
    starts: Mapping[str, float]
    improvement: float | None
    products: int
    status: SharpnessStatus

    @property
    def spread(self) -> float | None:
        """Best start less the worst, over the best: 0 where they agree; None with one start, or nothing positive."""
        best = max(self.starts.values(), default=0.0)
        return (best - min(self.starts.values())) / best if len(self.starts) > 1 and best > 0 else None


@dataclass(frozen=True)
class FrankWolfe:
    """Frank-Wolfe with exact line search on d'Hd over a product of balls; one product a step.

    The vertex s for which <s, Hd> is largest, and H s, tell d'Hd all along the segment from d to s, whose best point is
    taken: so the value never falls, whatever the signs of H's eigenvalues. Where H is positive along the segment the best
    point is s itself, and the step is the power step d <- polar(Hd) (or sign). It converges to a stationary point
    (Lacoste-Julien, arXiv 1607.00345).

    Args:
        tolerance: improvement by a step, over the value, below which a start has settled.
        max_products: over all starts; half of them are for the starts in equal parts, the other half for the best one.
        deadline: instant of `time.monotonic()` from which no step is begun; a start's first product is always made.
        holders: the processes that hold slices of the parameters, where they are divided: tensors are of these then.
    """

    tolerance: float = 1e-2
    max_products: int = 24
    deadline: float = inf
    holders: Ranks = ALONE

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed, by the clock of rank 0."""
        return self.deadline < inf and agreed(self._late)[0]

    @property
    def _late(self) -> bool:
        return time.monotonic() >= self.deadline

    def sharpest(self, product: Product, balls: Sequence[Ball], starts: Mapping[str, Sequence[Tensor]]) -> Sharpest:
        """The sharpest direction found from any of the starts.

        Args:
            product: H d for tensors in the parameters' shapes.
            balls: of every parameter.
            starts: by name, a tensor for each parameter, whose steepest vertex is where to begin; at least one.
        """
        climbs: dict[str, _Climb] = {}
        share = max(1, self.max_products // (2 * len(starts))) if len(starts) > 1 else max(1, self.max_products)
        for name, start in starts.items():
            climb = climbs[name] = _Climb(product, balls, start, self.holders)
            self._climb(climb, share)
        # Rank 0's values, or ranks that round differently could go on from different starts.
        reached = dict(zip(climbs, current().first([climb.value for climb in climbs.values()]), strict=True))
        spent = sum(climb.products for climb in climbs.values())
        if not all(isfinite(value) for value in reached.values()):
            return Sharpest(None, None, {}, None, spent, "non-finite")
        best = climbs[max(reached, key=lambda name: reached[name])]
        del climbs  # two tensors a parameter for each start that lost
        before = best.products
        self._climb(best, before + self.max_products - spent)
        spent += best.products - before
        if not isfinite(best.value):
            return Sharpest(None, None, {}, None, spent, "non-finite")
        settled: SharpnessStatus = "settled" if best.improvement <= self.tolerance else "unsettled"
        # Not flat while a value of 0 or below is still rising.
        status = settled if best.value > 0 else "flat" if settled == "settled" else "unsettled"
        known = best.improvement if isfinite(best.improvement) else None
        return Sharpest(best.value, best.d, reached, known, spent, status)

    def _climb(self, climb: _Climb, most: int) -> None:
        """Steps until it has settled or has taken so many products in all."""
        while agreed(
            isfinite(climb.value) and climb.products < most and climb.improvement > self.tolerance and not self._late
        )[0]:
            climb.step()


class _Climb:
    """One start: a point of the ball with its product, both moved along segments."""

    def __init__(self, product: Product, balls: Sequence[Ball], start: Sequence[Tensor], holders: Ranks) -> None:
        self.product, self.balls, self.holders = product, balls, holders
        self.d = self._vertex(start)
        self.image = self._made(self.d)
        self.products, self.improvement = 1, inf  # before the first step nothing has settled
        self.value = self._inner(self.d, self.image)

    def step(self) -> None:
        """To the best point of the segment from here to the vertex that H d points at."""
        if not isfinite(self.value):
            return
        vertex = self._vertex(self.image)
        image = self._made(vertex)
        self.products += 1
        here, cross, there = self.value, self._inner(vertex, self.image), self._inner(vertex, image)
        if not isfinite(there):
            self.value = there
            return
        share, value = _best(here, cross, there)
        # H is linear: the product at the new point interpolates the two that are known, and costs nothing.
        for mine, other in ((self.d, vertex), (self.image, image)):
            for a, b in zip(mine, other, strict=True):
                a.lerp_(b, share)
        self.improvement = (value - here) / abs(value) if value else (0.0 if value == here else inf)
        self.value = value

    def _vertex(self, along: Sequence[Tensor]) -> list[Tensor]:
        # All have to know: the vertex of a matrix is found by all of them together.
        if any(self.holders.each(float(not all_finite(along)))):
            return [torch.full_like(t, float("nan")) for t in along]  # a decomposition of NaN raises
        return [ball.steepest(t.detach()) for ball, t in zip(self.balls, along, strict=True)]

    def _made(self, d: list[Tensor]) -> list[Tensor]:
        return [t.detach() for t in self.product(d)]

    def _inner(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return sum(self.holders.each(sum(numbers([(a * b).sum() for a, b in zip(left, right, strict=True)]))))


def _best(here: float, cross: float, there: float) -> tuple[float, float]:
    """Where (1-t)^2 here + 2 t (1-t) cross + t^2 there is largest for t in [0, 1], and its value there."""
    bend = here - 2 * cross + there
    shares = [0.0, 1.0]
    # A parabola that opens upward is largest at an end.
    if bend < 0 and 0 < (inside := (here - cross) / bend) < 1:
        shares.append(inside)
    return max(
        ((t, (1 - t) ** 2 * here + 2 * t * (1 - t) * cross + t**2 * there) for t in shares), key=lambda found: found[1]
    )


def joint_dual(balls: Sequence[Ball], tensors: Sequence[Tensor]) -> float:
    """The dual norm of the product of balls: the sum of the parameters' own."""
    return sum(ball.dual(t) for ball, t in zip(balls, tensors, strict=True))


def distance(lr: float, sharpness: float, dual: float) -> float | None:
    """Z = lr S / (2 ||g||_dual); None where the gradient is 0 or Z is not finite."""
    found = lr * sharpness / (2 * dual) if dual > 0 else inf
    return found if abs(found) < inf else None
