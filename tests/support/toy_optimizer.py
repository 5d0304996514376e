"""An optimizer whose P is a matrix for each tensor: the toy that stands for those which are not elementwise.

`Rotated` is P = (A x B) diag(d) (A x B)^T of orthogonal A and B: SOAP's form, Shampoo's where d is an outer product, and
GaLore's where d is infinite in part. `Whiten` is an optimizer with such a P, and `WhitenRule` all that the package is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvcli.optimizers.base import Group, Rule, State, steps


@dataclass(frozen=True)
class Rotated:
    left: Tensor  # (m, m), orthogonal
    right: Tensor  # (n, n), orthogonal
    diagonal: Tensor  # (m, n), infinite where nothing moves

    @property
    def idle(self) -> int:
        return int(torch.isinf(self.diagonal).sum())

    @property
    def positive(self) -> bool:
        return bool((self.diagonal > 0).all())

    def apply(self, tensor: Tensor) -> Tensor:
        return self._map(tensor, self.diagonal.rsqrt())

    def invert(self, tensor: Tensor) -> Tensor:
        return self._map(tensor, torch.where(torch.isinf(self.diagonal), 0.0, self.diagonal.sqrt()))

    def solve(self, tensor: Tensor) -> Tensor:
        return self._map(tensor, 1 / self.diagonal)

    def scaled(self, factor: float) -> Rotated:
        return replace(self, diagonal=self.diagonal * factor)

    def to(self, parameter: Tensor) -> Rotated:
        return Rotated(self.left.to(parameter), self.right.to(parameter), self.diagonal.to(parameter))

    def _map(self, tensor: Tensor, factor: Tensor) -> Tensor:
        inside = self.left.T @ tensor.reshape(factor.shape) @ self.right
        return (self.left @ (inside * factor) @ self.right.T).reshape(tensor.shape)


class Whiten(torch.optim.Optimizer):
    """w -= lr P^(-1) m, with P = (mean of G G^T)^(1/2) + eps from the left and m the mean of G."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), eps: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            (b1, b2), eps = group["betas"], group["eps"]
            for p in (p for p in group["params"] if p.grad is not None):
                gradient, state = p.grad.reshape(p.shape[0], -1), self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), outer=gradient.new_zeros(p.shape[0], p.shape[0]))
                state["step"] += 1
                state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["outer"].mul_(b2).add_(gradient @ gradient.T, alpha=1 - b2)
                values, vectors = torch.linalg.eigh(state["outer"])
                inverse = vectors @ torch.diag(1 / (values.clamp_min(0).sqrt() + eps)) @ vectors.T
                p.sub_((inverse @ state["exp_avg"].reshape(gradient.shape)).reshape(p.shape), alpha=group["lr"])


class WhitenRule(Rule):
    names = frozenset({"Whiten"})
    state = frozenset({"step", "exp_avg", "outer"})
    shaped_otherwise = frozenset({"outer"})
    options = frozenset({"lr", "betas", "eps"})

    def preconditioner(self, group: Group, state: State) -> Rotated:
        values, vectors = torch.linalg.eigh(state["outer"])
        rows, columns = len(values), state["exp_avg"].numel() // len(values)
        diagonal = (values.clamp_min(0).sqrt() + group.number("eps"))[:, None].expand(rows, columns)
        return Rotated(vectors, torch.eye(columns, dtype=values.dtype), diagonal)

    def transfer(self, group: Group, state: State) -> float:
        assert steps(state) >= 1
        return (1 - group.betas[0]) / (1 + group.betas[0])

    def momentum(self, group: Group, state: State) -> Tensor:
        return state["exp_avg"]
