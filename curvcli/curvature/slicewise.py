"""Gradients of weights that are gathered a block at a time, and differences of these, of which slices are kept."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot

import torch
from torch import Tensor

from curvcli.curvature.differences import Differences
from curvcli.curvature.hvp import taken
from curvcli.curvature.precision import all_finite, norm
from curvcli.curvature.problem import Problem
from curvcli.curvature.streaming import Streamed
from curvcli.errors import UnsupportedError


class OnSlices(Differences):
    """The same of weights that processes divide, whose blocks are gathered one at a time; tangents and images are slices.

    All processes call it alike. A product is that of all of them.
    """

    def subset(self, indices: Sequence[int]) -> OnSlices:
        """The same of some of the batches, which are shared out anew: all processes go through the network together."""
        part = self.problem.subset(indices)
        return OnSlices(part.shared(part.ranks) if part.owners else part, self.step)

    def weights(self, names: Sequence[str]) -> list[Tensor]:
        """Slices."""
        return [self._streamed.parts[n] for n in names]

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """Of the whole vector."""
        return hypot(*self._streamed.shards.ranks.each(norm(tensors)))

    def along(self, names: Sequence[str], tangents: Sequence[Tensor], length: float) -> list[Tensor]:
        """(g(w + h t) - g(w - h t)) / 2h over all batches."""
        total = [torch.zeros_like(t) for t in tangents]
        for signed in (length, -length):
            with self._streamed.moved(names, tangents, signed):
                add_gradients(self.problem, names, total, 1 / (2 * signed))
        return total

    @property
    def _streamed(self) -> Streamed:
        return _streamed(self.problem)


class Sums:
    """Gradients as a backward pass gives them, summed over the processes and added to the slices that are held here.

    Args:
        streamed: the weights that they are of.
        names: of the parameters.
        totals: slices of each, which are added to.
    """

    def __init__(self, streamed: Streamed, names: Sequence[str], totals: Sequence[Tensor]) -> None:
        self.streamed, self.names, self.totals = streamed, names, totals
        self.places: dict[int, list[int]] = {}
        for place, name in enumerate(names):
            self.places.setdefault(streamed.group_of(name), []).append(place)
        self.group: int | None = None
        self.waiting: dict[int, Tensor] = {}

    def take(self, place: int, gradient: Tensor, weight: float) -> None:
        """The gradient of one parameter; what has come of another group is sent first."""
        group = self.streamed.group_of(self.names[place])
        if group != self.group:
            self.flush()
            self.group = group
        # A process without a batch goes through another's: of that nothing counts, numbers that are none neither.
        self.waiting[place] = gradient * weight if weight else torch.zeros_like(gradient)

    def flush(self) -> None:
        """Sends what has come."""
        if self.group is None:
            return
        places = self.places[self.group]
        shapes = self.streamed.shards.shapes
        # A parameter that a batch does not use (an expert) has no gradient here, and may have one elsewhere.
        wholes = [self.waiting[p] if p in self.waiting else self.totals[p].new_zeros(shapes[self.names[p]]) for p in places]
        self.waiting.clear()
        found = self.streamed.shards.scatter([self.names[p] for p in places], wholes, self.group)
        for place, part in zip(places, found, strict=True):
            self.totals[place].add_(part)
        self.group = None


def add_gradients(problem: Problem, names: Sequence[str], totals: Sequence[Tensor], factor: float = 1.0) -> None:
    """Adds the gradient of the mean loss, times a factor, to slices of it. All processes call it alike.

    Raises:
        LostError: the processes do not go through the network in one order.
    """
    streamed = _streamed(problem)
    sums, inputs = Sums(streamed, names, totals), [problem.parameters[n] for n in names]
    with problem.gathered():
        for index, share in problem.shares:
            # Where each process has all batches, each adds its part of all.
            weight = factor * share / (1 if problem.owners else streamed.shards.ranks.world)
            with taken(inputs, lambda place, found, weight=weight: sums.take(place, found, weight)):  # type: ignore[misc]
                torch.autograd.grad(problem.batch_loss(index), inputs, allow_unused=True)
            sums.flush()


def sliced_gradient(problem: Problem, names: Sequence[str]) -> list[Tensor]:
    """As `problem.gradient`, in slices; weights are gathered a block at a time.

    Raises:
        UnsupportedError: it is not finite.
    """
    streamed = _streamed(problem)
    totals = [torch.zeros_like(streamed.parts[n]) for n in names]
    add_gradients(problem, names, totals)
    if any(streamed.shards.ranks.each(float(not all_finite(totals)))):
        raise UnsupportedError(
            "the gradient of the loss is not finite on this data",
            hint="check the data and the weights: a run in this state has already diverged",
        )
    return totals


def _streamed(problem: Problem) -> Streamed:
    if problem.streamed is None:
        raise ValueError("the weights of this problem are whole")
    return problem.streamed
