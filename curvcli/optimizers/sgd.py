"""Stochastic gradient descent: plain, heavy ball, dampened, Nesterov."""

from __future__ import annotations

from torch import Tensor

from curvcli.optimizers.base import Group, OptimizerView, State


class SGD:
    """Cohen et al., arXiv 2103.00065: threshold 2/lr, (2 + 2b)/lr with PyTorch's heavy ball."""

    names = frozenset({"SGD"})
    state: frozenset[str] = frozenset()
    extra = frozenset({"momentum_buffer", "step"})
    options = frozenset({"lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize"})

    def matches(self, view: OptimizerView) -> bool:
        said = [set(g.options) for g in view.groups]
        return view.keys <= self.extra and all({"dampening", "nesterov", "momentum"} <= options for options in said)

    def name(self, view: OptimizerView) -> str:
        return "SGD"

    def preconditioner(self, group: Group, state: State) -> None:
        return None

    def transfer(self, group: Group, state: State) -> float:
        b = group.fraction("momentum")
        if group.flag("nesterov"):
            return (1 + 2 * b) / (1 + b)
        return (1 - group.fraction("dampening")) / (1 + b) if b else 1.0

    def lr(self, group: Group, state: State) -> float:
        return group.number("lr")

    def decoupled(self, group: Group, name: str | None) -> bool:
        return False

    def momentum(self, group: Group, state: State) -> Tensor | None:
        return state.get("momentum_buffer")
