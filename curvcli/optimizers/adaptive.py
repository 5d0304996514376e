"""RMSprop, Adagrad and Adadelta: gradients divided by a root of their squares' average or sum."""

from __future__ import annotations

from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal
from curvcli.errors import InputError
from curvcli.optimizers.base import Group, Rule, State, moment, steps


class RMSprop(Rule):
    """Cohen et al., arXiv 2207.14484: threshold 2/lr, (2 + 2b)/lr with momentum."""

    names = frozenset({"RMSprop"})
    state = frozenset({"square_avg"})
    extra = frozenset({"step", "momentum_buffer", "grad_avg"})
    unset = frozenset({"momentum_buffer", "grad_avg"})
    second = "square_avg"
    options = frozenset({"lr", "alpha", "eps", "momentum", "centered", "weight_decay", "maximize"})

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = sqrt(v) + eps, in the parameter's shape; sqrt(v - mean^2) + eps where centered, the mean being `grad_avg`.

        Raises:
            InputError: a moment is missing, or v has negative entries.
            UnsupportedError: v is quantised.
        """
        average = moment(state, "square_avg")
        square = average
        if group.flag("centered"):
            mean = state.get("grad_avg")
            if not isinstance(mean, Tensor):
                raise InputError(
                    "RMSprop is centered and its state has no 'grad_avg'", hint="it is damaged: use another checkpoint"
                )
            square = (square - mean.to(square).square()).clamp_min(0)
        return Diagonal.of(square.sqrt() + group.number("eps", 1e-8), average)

    def transfer(self, group: Group, state: State) -> float:
        """1/(1 + b), b the momentum. Raises InputError where it is not in [0, 1)."""
        return 1 / (1 + group.fraction("momentum"))

    def momentum(self, group: Group, state: State) -> Tensor | None:
        """The momentum buffer times P, in the parameter's shape; None where there is no buffer."""
        buffer = state.get("momentum_buffer")
        # PyTorch's buffer holds gradients that were divided already: undo it, for the caller divides again.
        return None if buffer is None else buffer * self.preconditioner(group, state).entries


class Adagrad(Rule):
    """Threshold 2/lr with lr decayed as torch/optim/adagrad.py does: lr / (1 + (t - 1) lr_decay)."""

    names = frozenset({"Adagrad"})
    state = frozenset({"sum"})
    extra = frozenset({"step"})
    second = "sum"
    options = frozenset({"lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value", "maximize"})

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = sqrt(sum of squared gradients) + eps, in the parameter's shape.

        Raises:
            InputError: the sum is missing or has negative entries.
            UnsupportedError: the sum is quantised.
        """
        total = moment(state, "sum")
        return Diagonal.of(total.sqrt() + group.number("eps", 1e-10), total)

    def lr(self, group: Group, state: State) -> float:
        """lr / (1 + (t - 1) lr_decay). Raises InputError where lr is missing, or t while it decays."""
        decay = group.number("lr_decay", 0.0, least=0.0)
        return group.number("lr") / (1 + (steps(state) - 1) * decay) if decay else group.number("lr")


class Adadelta(Rule):
    """Zeiler, arXiv 1212.5701, as torch.optim has it: threshold 2/lr, P being held still.

    P goes on moving as RMSprop's does: full-batch training with it settles a little above the edge.
    """

    names = frozenset({"Adadelta"})
    state = frozenset({"square_avg", "acc_delta"})
    extra = frozenset({"step"})
    second = "square_avg"
    options = frozenset({"lr", "rho", "eps", "weight_decay", "maximize"})

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = sqrt(v + eps) / sqrt(u + eps), u the average of squared updates without lr, in the parameter's shape.

        Raises:
            InputError: an average is missing or has negative entries.
            UnsupportedError: one is quantised.
        """
        square, updates, eps = moment(state, "square_avg"), moment(state, "acc_delta"), group.number("eps", 1e-6)
        return Diagonal.of(((square + eps) / (updates + eps)).sqrt(), square)
