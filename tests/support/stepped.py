"""What optimizers do, found out by running them: how a step answers a gradient, and whether a quadratic diverges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from curvcli.optimizers.preconditioner import Preconditioner, live, prepare


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


def metric(optimizer: torch.optim.Optimizer, model: nn.Module) -> Preconditioner:
    """What curv makes of an optimizer."""
    parameters = dict(model.named_parameters())
    return prepare(live(optimizer, parameters), parameters)


def as_matrix(of: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """A linear map of tensors in a weight's shape as its matrix, (n, n)."""
    unit = torch.eye(weight.numel(), dtype=weight.dtype)
    return torch.stack([of(row.view(weight.shape)).reshape(-1) for row in unit], dim=1)


def leaves(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, factor: float, steps: int = 500, start: float = 1e-6
) -> bool:
    """Whether the optimizer goes fiftyfold away from the minimum of a quadratic at so many times its threshold.

    The quadratic's Hessian is any, with no axis of P's.
    """
    found, random = metric(optimizer, nn.ParameterDict({"w": weight})), torch.randn(2 * [weight.numel()], dtype=weight.dtype)
    half, hessian = as_matrix(found.root["w"].apply, weight), random @ random.T
    assert found.threshold is not None
    hessian *= factor * found.threshold / float(torch.linalg.eigvalsh(half @ hessian @ half)[-1])
    hessian -= found.decay["w"] * torch.eye(len(hessian), dtype=weight.dtype) if "w" in found.decay else 0.0
    largest = 0.0
    with torch.no_grad():
        weight.fill_(start)
    for _ in range(steps):
        weight.grad = (hessian @ weight.detach().reshape(-1)).view(weight.shape)
        optimizer.step()
        largest = max(largest, float(weight.detach().abs().max()))
    return largest > 50 * start


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
