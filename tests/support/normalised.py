"""Optimizers whose step is normalised, as their authors publish them: Lion, and Muon with Adam in one class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(mean.lerp(p.grad, 1 - first).sign(), alpha=group["lr"])
                mean.lerp_(p.grad, 1 - second)


class MuonWithAuxAdam(torch.optim.Optimizer):
    """One optimizer of two kinds of groups, told apart by `use_muon`; polar factors are exact."""

    def __init__(
        self, matrices: Iterable[Tensor], others: Iterable[Tensor], lr: float = 0.02, rest_lr: float = 3e-3
    ) -> None:
        muon = {"params": list(matrices), "lr": lr, "momentum": 0.95, "weight_decay": 0.0, "use_muon": True}
        adam = {"params": list(others), "lr": rest_lr, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        super().__init__([muon, {**adam, "use_muon": False}], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if group["use_muon"]:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    u, _, vh = torch.linalg.svd(p.grad.lerp(buffer, group["momentum"]), full_matrices=False)
                    p.sub_(u @ vh, alpha=group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
                else:
                    self._adam(p, group)

    def _adam(self, p: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[p], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        assert p.grad is not None
        state["step"] += 1
        state["exp_avg"].lerp_(p.grad, 1 - first)
        state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second)
        root = (state["exp_avg_sq"] / (1 - second ** state["step"])).sqrt() + group["eps"]
        p.sub_(state["exp_avg"] / (1 - first ** state["step"]) / root, alpha=group["lr"])


def split(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The matrices inside a model's layers, and the other parameters."""
    named = list(model.named_parameters())
    inside = [p for n, p in named if "layers." in n and p.dim() == 2]
    ids = {id(p) for p in inside}
    return inside, [p for _, p in named if id(p) not in ids]
