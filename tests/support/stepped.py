"""What optimizers do, found out by running them: how a step answers a gradient, and whether a quadratic diverges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def answer(
    optimizer: torch.optim.Optimizer, model: nn.Module, h: float = 1e-6
) -> tuple[torch.optim.Optimizer, nn.Module, dict[str, Tensor]]:
    """A step without a gradient, in copies, and minus its derivative by each entry of the gradient, by name.

    The oracle of P: central differences of the optimizer's own update, which know no formula. For a P that is diagonal.
    """

    def update(gradient: float) -> tuple[torch.optim.Optimizer, nn.Module]:
        again, moved = copy.deepcopy((optimizer, model))
        for p in moved.parameters():
            p.grad = torch.full_like(p, gradient)
        again.step()
        return again, moved

    after, still = update(0.0)
    ahead, behind = (dict(update(sign * h)[1].named_parameters()) for sign in (1, -1))
    return after, still, {n: (behind[n].detach() - p.detach()) / (2 * h) for n, p in ahead.items()}


def answers(
    optimizer: torch.optim.Optimizer, model: nn.Module, h: float = 1e-6
) -> tuple[torch.optim.Optimizer, nn.Module, dict[str, Tensor]]:
    """As `answer`, for a P that is a matrix for each tensor: minus the derivative of each weight by each gradient, (n, n).

    One entry of every tensor at once: no tensor's step looks at another's gradient.
    """

    def update(entry: int, gradient: float) -> tuple[torch.optim.Optimizer, nn.Module]:
        again, moved = copy.deepcopy((optimizer, model))
        for p in moved.parameters():
            p.grad = torch.zeros_like(p)
            if entry < p.numel():
                p.grad.view(-1)[entry] = gradient
        again.step()
        return again, moved

    after, still = update(0, 0.0)
    found = {n: torch.zeros(p.numel(), p.numel(), dtype=p.dtype) for n, p in model.named_parameters()}
    for entry in range(max(len(matrix) for matrix in found.values())):
        ahead, behind = (dict(update(entry, sign * h)[1].named_parameters()) for sign in (1, -1))
        for n, matrix in found.items():
            if entry < len(matrix):
                matrix[:, entry] = ((behind[n] - ahead[n]).detach() / (2 * h)).reshape(-1)
    return after, still, found


def root(matrices: Mapping[str, Tensor]) -> Tensor:
    """P^(-1/2) of a whole model, from P^(-1) of each tensor as `answers` has them."""
    parts = []
    for matrix in matrices.values():
        assert float((matrix - matrix.T).abs().max()) < 1e-6 * float(matrix.abs().max()), "no gradient's map"
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        parts.append(vectors @ torch.diag(values.sqrt()) @ vectors.T)
    whole: Tensor = torch.block_diag(*parts)
    return whole


def grows(
    optimizer: torch.optim.Optimizer,
    weight: nn.Parameter,
    curvature: float | Tensor,
    hold: Callable[[], None] = lambda: None,
    steps: int = 1500,
    start: float = 1e-6,
) -> bool:
    """Whether the real optimizer goes a hundredfold away from the minimum of curvature w^2 / 2.

    Args:
        hold: puts back what the optimizer changes of its own accord and the threshold takes as it is, after each step.
    """
    with torch.no_grad():
        weight.fill_(start)
    largest = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * curvature * weight**2).sum().backward()
        optimizer.step()
        hold()
        largest = max(largest, abs(weight.detach()).max().item())
    return largest > 100 * start


def scale(parts: Mapping[str, Tensor]) -> Tensor:
    """The diagonal of P^(-1/2) end to end, from that of P^(-1) by name."""
    return torch.cat([part.reshape(-1) for part in parts.values()]).sqrt()
