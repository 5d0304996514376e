"""Whether second derivatives are those of the loss: double backward against differences of gradients.

A kernel that returns a gradient it computed beforehand (fused cross-entropies do) has a double backward
that runs, is symmetric, and lacks the kernel's own curvature. No property of the products shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from curvcli.curvature.precision import norm
from curvcli.curvature.problem import Problem, gradient
from curvcli.errors import UnsupportedError


def check_second_derivative(problem: Problem, direction: Sequence[Tensor], image: Sequence[Tensor]) -> None:
    """Compare H d on the first batch with central differences of two step lengths.

    Where both lengths agree with each other and not with H d, H is not the Hessian of this loss. Where they
    disagree with each other (ReLU, router flips, rounding) they prove nothing, and nothing is said.

    Args:
        direction: d for every parameter, in its shape.
        image: H d by double backward on the first batch.

    Raises:
        UnsupportedError: a second derivative is missing.
    """
    # One batch is enough: a kernel that is wrong on one is wrong on all.
    first = problem.subset([0])
    names, parameters = list(problem.parameters), list(problem.parameters.values())
    double = parameters[0].dtype == torch.float64
    size, reach = norm(parameters), norm(direction)
    if not size > 0 or not reach > 0:
        return

    def difference(relative: float) -> list[Tensor]:
        length = relative * size / reach
        with moved(parameters, direction, length):
            above = gradient(first, names)
        with moved(parameters, direction, -length):
            below = gradient(first, names)
        return [(a - b) / (2 * length) for a, b in zip(above, below, strict=True)]

    # Relative to the weights. In float32 1e-3 gave errors of 3e-5 to 2e-4 on smooth models; shorter steps drown in rounding.
    long, short = (difference(r) for r in ((1e-5, 5e-6) if double else (1e-3, 5e-4)))
    scale = max(norm(long), norm(image))
    apart = norm([a - b for a, b in zip(long, short, strict=True)])
    wrong = norm([a - b for a, b in zip(short, image, strict=True)])
    # Truncation falls with the square of the length: where a halving changes 1 %, the shorter is good to 0.4 %.
    if apart <= 0.01 * scale and wrong > 0.03 * scale:
        raise UnsupportedError(
            f"second derivatives of this loss are wrong: products are {wrong / scale:.0%} off differences of gradients",
            hint="a fused kernel (cross-entropy, norm, attention) is differentiable once only: use plain PyTorch, or "
            "--mode differences; of a network that has blown up differences prove nothing: look at its loss",
        )


@contextmanager
def moved(parameters: Sequence[Tensor], direction: Sequence[Tensor], length: float) -> Iterator[None]:
    """Within it the parameters are `length` times a direction further on."""
    # By swapping storage: in-place arithmetic would spoil graphs that the user holds, and would not restore every bit.
    kept = [p.data for p in parameters]
    try:
        for parameter, data, d in zip(parameters, kept, direction, strict=True):
            parameter.data = data + length * d
        yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
