"""Stochastic gradient descent: plain, heavy ball, dampened, Nesterov."""

from __future__ import annotations

from torch import Tensor

from curvcli.curvature.inverse_root import Multiple
from curvcli.optimizers.base import Group, OptimizerView, Rule, State


class SGD(Rule):
    """Cohen et al., arXiv 2103.00065: threshold 2/lr, (2 + 2b)/lr with PyTorch's heavy ball."""

    names = frozenset({"SGD"})
    extra = frozenset({"momentum_buffer", "step"})
    unset = frozenset({"momentum_buffer"})  # before its first step
    options = frozenset({"lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize"})

    def matches(self, view: OptimizerView) -> bool:
        """Whether nothing but SGD's own is stored, and every group has all of momentum, dampening and nesterov."""
        said = [set(g.options) for g in view.groups]
        return view.keys <= self.extra and all({"dampening", "nesterov", "momentum"} <= options for options in said)

    def preconditioner(self, group: Group, state: State) -> Multiple:
        """P = I."""
        return Multiple()

    def transfer(self, group: Group, state: State) -> float:
        """1 without momentum, 1/(1 + b) with the heavy ball, (1 - d)/(1 + b) dampened by d.

        (1 + 2b)/(1 + b) with Nesterov's momentum. Raises InputError where the momentum b or d is not in [0, 1).
        """
        b = group.fraction("momentum")
        if group.flag("nesterov"):
            return (1 + 2 * b) / (1 + b)
        return (1 - group.fraction("dampening")) / (1 + b) if b else 1.0

    def momentum(self, group: Group, state: State) -> Tensor | None:
        """The momentum buffer as stored, Nesterov's too, without the gradient that it adds; None where there is none."""
        return state.get("momentum_buffer")
