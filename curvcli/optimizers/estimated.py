"""Optimizer state that was not saved, as the gradients on the shard suggest it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvcli.curvature.problem import Problem
from curvcli.curvature.shards import Shards
from curvcli.curvature.slicewise import sliced_gradient
from curvcli.optimizers.adam import Adam
from curvcli.optimizers.base import Group, OptimizerView, State


def estimate(problem: Problem, options: Mapping[str, Any], shards: Shards | None = None) -> OptimizerView:
    """Adam's state as the shard's gradients suggest it: v is the mean over batches of squared gradients.

    A stand-in for state that was not saved: the true v averages the squares of (clipped) gradients
    of training batches, whose size differs, over past weights. Step is taken as large.

    Args:
        shards: where processes divide the parameters: the gradient of one batch at a time is whole, and of the moments each
            keeps slices. The view puts an entry together whenever it is asked for, which all processes have to do alike.
    """
    names, tensors = list(problem.parameters), list(problem.parameters.values())
    squares = _held(shards, names, tensors)
    means = _held(shards, names, tensors)
    for indices in problem.given:  # of a batch in halves, both: the squares of their gradients would be of fewer tokens
        share = sum(problem.weights[i] for i in indices)
        for square, mean, found in zip(squares, means, _gradient(problem, indices, shards, names), strict=True):
            square.addcmul_(found, found, value=share)
            mean.add_(found, alpha=share)
    state: dict[str, State] = {n: Adam().expected(m, s) for n, m, s in zip(names, means, squares, strict=True)}
    if shards is not None:
        state = {n: _Whole(entry, n, shards) for n, entry in state.items()}
    return OptimizerView((Group(tuple(names), options),), state, "AdamW")


def _held(shards: Shards | None, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for what is held here of each tensor."""
    if shards is None:
        return [torch.zeros_like(t) for t in tensors]
    bounds = [shards.bounds(n) for n in names]
    return [t.new_zeros(end - begin) for t, (begin, end) in zip(tensors, bounds, strict=True)]


def _gradient(problem: Problem, indices: Sequence[int], shards: Shards | None, names: Sequence[str]) -> list[Tensor]:
    """Gradient of the mean loss over these batches, summed over the processes; what is held here of it."""
    if problem.streamed is not None:
        return sliced_gradient(problem.subset(indices), names)
    tensors, own = list(problem.parameters.values()), set(problem.own)
    share = sum(problem.weights[i] for i in indices)
    gradients = [torch.zeros_like(t) for t in tensors]
    with problem.gathered():
        for i in (i for i in indices if i in own):
            parts = torch.autograd.grad(problem.batch_loss(i), tensors, allow_unused=True)
            for gradient, part in zip(gradients, parts, strict=True):
                if part is not None:
                    gradient.add_(part, alpha=problem.weights[i] / share)
    if shards is not None:
        return shards.scatter(names, gradients)
    problem.ranks.sum_(gradients)
    return gradients


class _Whole(Mapping[str, Any]):
    """State of a parameter whose tensors are held in slices, each put together anew whenever it is asked for."""

    def __init__(self, entry: State, name: str, shards: Shards) -> None:
        self._entry, self._name, self._shards = entry, name, shards

    def __getitem__(self, key: str) -> Any:
        value = self._entry[key]
        return self._shards.gather([self._name], [value])[0] if isinstance(value, Tensor) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entry)

    def __len__(self) -> int:
        return len(self._entry)
