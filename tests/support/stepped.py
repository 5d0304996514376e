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
        vars(again).update({k: v for k, v in vars(optimizer).items() if k not in vars(again)})  # of its class, not copied
        for p in moved.parameters():
            p.grad = torch.full_like(p, gradient)
        again.step()
        return again, moved

    after, still = update(0.0)
    ahead, behind = (dict(update(sign * h)[1].named_parameters()) for sign in (1, -1))
    return after, still, {n: (behind[n].detach() - p.detach()) / (2 * h) for n, p in ahead.items()}


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
