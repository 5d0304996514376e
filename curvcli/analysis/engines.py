"""How a measurement multiplies and takes gradients, on whole tensors or on the slices that processes hold of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from torch import Tensor

from curvcli.curvature.differences import Step, build, choose
from curvcli.curvature.gathering import Gathered
from curvcli.curvature.hvp import HVP, Choice, Mode
from curvcli.curvature.memory import few, sample
from curvcli.curvature.problem import Problem
from curvcli.curvature.shards import Shards
from curvcli.curvature.slicewise import OnSlices, sliced_gradient
from curvcli.curvature.spread import Spread, spread_gradient

TRIED = 1 / 8  # of all weights, that products are tried and tested on where processes divide them, or the basis is on disk
CROSSED = 2**13  # inputs that differences are tried on, where four rows have fewer
Held = Callable[[], AbstractContextManager[None]]


def chosen(
    problem: Problem, shards: Shards | None, mode: Mode | Literal["auto"], room: float, *, lean: bool = False
) -> Choice:
    """A way to multiply, tried on a few rows; where processes divide the weights, on the smaller tensors.

    Args:
        room: bytes that kept graphs may take.
        lean: whether the smaller tensors are to do though one process has all.

    Raises:
        UnsupportedError: none works.
    """
    # Kinks show where a step crosses some of them: four rows of one short vector each have too few.
    trial, graphs = sample(problem, few(problem, CROSSED)) if mode == "differences" else sample(problem)
    streamed = problem.streamed
    if streamed is None:
        trial = trial if shards is None and not lean else trial.lean(TRIED)  # else it would hold eight whole vectors
        return choose(trial, mode=mode, memory=room, graphs=graphs)
    # No more of them than of a block, which each process has room for.
    every = sum(p.nbytes for p in problem.parameters.values())
    trial = trial.lean(min(TRIED, streamed.largest / every))
    with problem.gathered(), streamed.whole(list(trial.parameters)):
        return choose(trial, mode=mode, graphs=graphs)


def engine(
    problem: Problem, mode: Mode, step: Step | None, shards: Shards | None, *, threads: bool
) -> tuple[HVP, Held | None]:
    """Products with the Hessian of a problem's mean loss, on slices where processes divide the parameters.

    Returns:
        The engine; and, on slices, within what products along one vector are made.
    """
    if problem.streamed is not None and step is not None:
        return OnSlices(problem, step), nullcontext
    found = build(problem, mode, step, threads=threads)
    if shards is None:
        return found, None
    whole = Gathered(found.part(), shards, problem.gathered)
    return whole, whole.held


def mean_gradient(problem: Problem, names: Sequence[str], shards: Shards | None) -> tuple[list[Tensor], Spread | None]:
    """Of the mean loss, in slices where processes divide the parameters, and the spread of what it is the mean of.

    Where blocks are gathered one at a time nobody has a batch's gradient, and of its spread nothing is known.

    Raises:
        UnsupportedError: it is not finite.
    """
    if problem.streamed is not None:
        return sliced_gradient(problem, names), None
    found, spread = spread_gradient(problem, names)
    return (found if shards is None else shards.parts(names, found)), spread
