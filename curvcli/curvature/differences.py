"""Hessian-vector products by central differences of gradients, where no exact ones can be had, and what they are good for.

(g(w + h t) - g(w - h t)) / 2h takes no second derivative and no graph of a gradient. It is off by rounding, which grows with
1/h, and by what the Hessian changes on the way, which grows with h^2. A length relative to the weights will not do: along
sharp directions of real checkpoints, which lie in few rows, 1e-3 of the weights was up to 98 % off
(docs/explanation/accuracy.md). What serves all directions of a unit ball of G is one change of loss to second order,
h^2 |Gv| / 2, which `Step` keeps and the first solve finds by trial.

At a kink (ReLU, the flips of a router) the gradient jumps. The jumps add up to something that two lengths can agree on, and
that is no part of the Hessian: only an exact product shows it, or a look at the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvcli.curvature import hvp
from curvcli.curvature.hvp import HVP, Choice, FreshGraph, Mode, Summed, random_direction, taken, timed
from curvcli.curvature.precision import norm
from curvcli.curvature.problem import Problem
from curvcli.curvature.selftest import check_second_derivative, moved
from curvcli.errors import UnsupportedError, exhausted

TRIED = 1 / 8  # of all weights, in the smallest tensors, that an exact product is made of
APART = 0.02  # of an exact product, that differences may lie off it on a direction drawn at random
AGREE = 0.05  # of a product, that two step lengths may lie apart; else there is no product
ENOUGH = 3e-3  # and at which no better length is looked for
FACTOR = 4.0  # between one step length and the next that is tried
MOVES = 8  # lengths that are tried in one direction
# Operations whose derivative jumps, by their names in aten.
KINKS = frozenset(
    [
        "relu",
        "relu_",
        "leaky_relu",
        "leaky_relu_",
        "threshold",
        "threshold_",
        "hardtanh",
        "hardtanh_",
        "hardswish",
        "hardswish_",
        "hardsigmoid",
        "_prelu_kernel",
        "rrelu_with_noise",
        "hardshrink",
        "softshrink",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "topk",
    ]
)
T = TypeVar("T")


@dataclass
class Step:
    """How far weights are moved; one for all products of a measurement.

    Attributes:
        length: multiple of a product's tangents; None where each product looks for its own, by two lengths that agree.
        reach: what a step changes the loss by, to second order, in nats; None before it was found.
        scale: norm of the largest image in the solve before, which the next one begins with.
        floor: the most that two lengths came apart in a solve, over its eigenvalue.
    """

    length: float | None = None
    reach: float | None = None
    scale: float | None = None
    floor: float | None = None

    @contextmanager
    def of(self, length: float | None) -> Any:
        """Within it products are of this length."""
        before, self.length = self.length, length
        try:
            yield
        finally:
            self.length = before

    def said(self) -> dict[str, str]:
        """What a report says of it, by a finding's code."""
        if self.floor is None:
            return {}
        return {
            "differences": "products are central differences of gradients, not exact: at two step lengths they lay "
            f"{self.floor:.1e} of the eigenvalue apart at most, which residuals count in and no estimate is closer than"
        }


class Differences:
    """Products by differences of this process' gradients.

    Weights are exchanged for moved copies and put back, the same tensors to the bit, whatever happens.

    Args:
        problem: whose Hessian it is.
        step: how far they are moved.
    """

    def __init__(self, problem: Problem, step: Step) -> None:
        self.problem, self.step = problem, step

    def part(self) -> HVP:
        """Itself."""
        return self

    def subset(self, indices: Sequence[int]) -> Differences:
        """The same of some of the batches, whose weights sum to 1."""
        return type(self)(self.problem.subset(indices), self.step)

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        """By two gradients of each batch; by four or more where no length is given, and NaN where none agree."""
        if self.step.length is not None:
            return self.along(names, tangents, self.step.length)
        found, apart = self.careful(names, tangents)
        return found if apart <= AGREE else [torch.full_like(image, float("nan")) for image in found]

    def careful(self, names: Sequence[str], tangents: Sequence[Tensor]) -> tuple[list[Tensor], float]:
        """A product, and how far it lies from that of another length, over its norm; infinite where nothing is known."""
        weights = self.weights(names)
        size, reach = self.norm(weights), self.norm(tangents)
        if not reach > 0 or not isfinite(reach):
            return [torch.full_like(t, 0.0 if reach == 0 else float("nan")) for t in tangents], 0.0

        def distance(one: list[Tensor], other: list[Tensor]) -> float:
            scale = max(self.norm(one), self.norm(other))
            return self.norm([a - b for a, b in zip(one, other, strict=True)]) / scale if scale else 0.0

        # Relative to the weights, as far as rounding asks for in smooth directions: 1e-3 in float32.
        start = torch.finfo(weights[0].dtype).eps ** (1 / 3) / 5 * (size or 1.0) / reach
        _, found, apart = settled(lambda length: self.along(names, tangents, length), distance, start)
        return found, apart

    def weights(self, names: Sequence[str]) -> list[Tensor]:
        """What is held here of the weights."""
        return [self.problem.parameters[n] for n in names]

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """Euclidean norm of a vector of these."""
        found, streamed = norm(tensors), self.problem.streamed
        # Where all go through the network together, one decides how often.
        return found if streamed is None else streamed.shards.ranks.first([found])[0]

    def along(self, names: Sequence[str], tangents: Sequence[Tensor], length: float) -> list[Tensor]:
        """(g(w + h t) - g(w - h t)) / 2h over this process' batches."""
        parameters = [self.problem.parameters[n] for n in names]
        total = [torch.zeros_like(p) for p in parameters]
        for signed in (length, -length):
            with moved(parameters, tangents, signed):
                for i, share in self.problem.shares:
                    weight = share / (2 * signed)
                    # Each gradient is added as it comes: there is no moment at which all of a batch's are held.
                    with taken(parameters, lambda at, part, weight=weight: total[at].add_(part, alpha=weight)):  # type: ignore[misc]
                        torch.autograd.grad(self.problem.batch_loss(i), parameters, allow_unused=True)
        return total


def settled(
    image: Callable[[float], T], distance: Callable[[T, T], float], start: float, enough: float = ENOUGH
) -> tuple[float, T, float]:
    """A length whose image lies as near as can be had to that of one `FACTOR` longer.

    Too long a step is off by its square and too short a one by its inverse, so lengths are tried in the direction in which
    the images come nearer.

    Returns:
        The length, its image, and the distance.
    """
    longer, shorter = image(start), image(start / FACTOR)
    best = (start / FACTOR, shorter, _number(distance(longer, shorter)))
    for _ in range(MOVES):
        if best[2] <= enough:
            return best
        length = best[0] / FACTOR
        new = image(length)
        apart = _number(distance(best[1], new))
        if apart >= best[2]:
            break
        best = (length, new, apart)
    if best[0] < start / FACTOR:
        return best
    here, length = longer, start
    for _ in range(MOVES):
        new = image(length * FACTOR)
        apart = _number(distance(new, here))
        if apart >= best[2]:
            break
        best = (length, here, apart)
        here, length = new, length * FACTOR
        if apart <= enough:
            break
    return best


def _number(distance: float) -> float:
    return distance if isfinite(distance) else inf


def build(problem: Problem, mode: Mode, step: Step | None, *, threads: bool = False) -> HVP:
    """The product engine of a mode, `step` being that of the measurement where the mode is "differences"."""
    if step is None:
        return hvp.build(problem, mode, threads=threads)
    engine = Differences(problem, step)
    return engine if problem.ranks.world == 1 else Summed(engine, problem.ranks)


def choose(
    problem: Problem, *, mode: Mode | Literal["auto"] = "auto", memory: float = inf, graphs: float | None = None
) -> Choice:
    """As `hvp.choose`; where the mode is "differences", that they can be trusted on this model.

    Raises:
        UnsupportedError: they cannot; or no exact mode works, where one was asked for.
    """
    if mode != "differences":
        return hvp.choose(problem, mode=mode, memory=memory, graphs=graphs)
    first = problem.subset([0]).alone()
    engine, names, tangents = Differences(first, Step()), list(problem.parameters), random_direction(problem)
    _, seconds = timed(engine, names, tangents)
    trusted(first if first.names is not None else first.lean(TRIED))  # of few tensors all
    return Choice("differences", {"differences": seconds}, {})


def trusted(problem: Problem) -> None:
    """That differences of gradients are the Hessian's products, on the first batch along a direction drawn at random.

    Against an exact product, where the model has second derivatives; else by its operations, of which none may have a kink.

    Raises:
        UnsupportedError: they are not.
    """
    exactly = "measure it exactly, with --mode fresh: on fewer tokens (--tokens), or with more memory or ranks (--shard)"
    problem = problem.subset([0]).alone()
    names, tangents = list(problem.parameters), random_direction(problem)
    found, apart = Differences(problem, Step()).careful(names, tangents)
    kinks = ", ".join(kinks_of(problem))
    because = f"its {kinks} have kinks, where a gradient jumps" if kinks else "float32 rounds too much, or gradients jump"
    if not apart <= AGREE:
        raise UnsupportedError(
            f"differences of gradients do not settle here: those of two step lengths lie {apart:.0%} apart: {because}",
            hint=exactly,
        )
    # Of kinks no differences tell whether a second derivative is right.
    exact = _exact(problem, names, tangents, check=not kinks)
    if exact is None:
        if kinks:
            raise UnsupportedError(
                f"differences of gradients are not to be trusted on this model: {because}, and it has no second derivatives "
                "to hold them against",
                hint="use plain PyTorch in place of fused kernels, and an exact mode",
            )
        return
    wrong = norm([a - b for a, b in zip(found, exact, strict=True)]) / norm(exact)
    if not wrong <= APART:
        raise UnsupportedError(
            f"differences of gradients are {wrong:.0%} off an exact product on this model: {because}",
            hint=exactly,
        )


def _exact(problem: Problem, names: Sequence[str], tangents: Sequence[Tensor], *, check: bool) -> list[Tensor] | None:
    """The product by double backward; None where the model has no second derivatives, or none that are right."""
    try:
        found = FreshGraph(problem).product(names, tangents)
        if check:
            check_second_derivative(problem, tangents, found)
    except RuntimeError as error:  # what autograd raises, and UnsupportedError
        if exhausted(error):
            raise
        return None
    except UnsupportedError:
        return None
    return found if any(bool(image.any()) for image in found) else None


def kinks_of(problem: Problem) -> list[str]:
    """Operations of the first batch's forward pass whose derivative jumps, by name."""
    seen: set[str] = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Seen():  # type: ignore[no-untyped-call]
        problem.batch_loss(0)
    return sorted({name.strip("_") for name in seen & KINKS})


def reach_at(length: float, scale: float) -> float:
    """What a step of a unit vector changes the loss by to second order, where no image of one is longer than `scale`."""
    return length**2 * scale / 2


def length_at(reach: float, scale: float) -> float:
    """The step of a unit vector that changes the loss so much."""
    return sqrt(2 * reach / scale)
