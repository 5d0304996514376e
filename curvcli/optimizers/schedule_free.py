"""Schedule-Free AdamW and SGD: gradients at an interpolation of the iterates and their average."""

from __future__ import annotations

from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal, InverseRoot, Multiple
from curvcli.documents import Finding
from curvcli.errors import InputError
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule, State, moment, steps

_SHARED = frozenset(
    {"lr", "weight_decay", "r", "k", "warmup_steps", "train_mode", "weight_sum", "lr_max", "scheduled_lr", "weight_lr_power"}
)


class _ScheduleFree(Rule):
    """Defazio et al., arXiv 2405.15682, as the package `schedulefree` has it.

    z -= lr P^(-1) g and x += c (z - x), with gradients taken at y = (1 - b) z + b x.

    Where an eigenvector flips its sign at each step, x = c z / (2 - c), so that y = z [(1 - b) + b c / (2 - c)]: the
    bracket is the filter at z = -1, c being the weight of the last step in the average. Decay is of y, beside the gradient.
    """

    def preconditioner(self, group: Group, state: State) -> InverseRoot:
        """P = I."""
        return Multiple()

    def lr(self, group: Group, state: State) -> float:
        """lr of the last step, min(1, k / warmup_steps) of the group's. Raises InputError where it or k is missing."""
        warmup = group.number("warmup_steps", 0.0, least=0.0)
        return group.number("lr") * (min(1.0, steps(state) / warmup) if warmup else 1.0)

    def transfer(self, group: Group, state: State) -> float:
        """(1 - b) + b c / (2 - c), c as the class has it. Raises InputError where b or what gives c is missing or wrong."""
        b, c = self._beta(group), _share(group, state)
        return (1 - b) + b * c / (2 - c)

    def gradient_at(self, group: Group, state: State, weight: Tensor) -> Tensor | None:
        """y, where the weights are x: after the optimizer's `eval()`. Raises InputError where the group does not say."""
        if group.options.get("train_mode") is None:
            raise InputError(
                "the optimizer's group does not say whether the weights are x or y ('train_mode')",
                hint=f"save with a current release of schedulefree, or {NO_OPTIMIZER}",
            )
        z = state.get("z")
        if group.flag("train_mode") or not isinstance(z, Tensor):
            return None
        return weight.detach().lerp(z.to(weight), 1 - self._beta(group))

    def findings(self, view: OptimizerView) -> list[Finding]:
        """Where everything is measured."""
        return [
            Finding(
                code="measured-at-y",
                severity="info",
                message="Schedule-Free takes gradients at y, between its iterates and their average x: loss and curvature "
                "are those at y, not at the average that is evaluated",
            )
        ]

    def _beta(self, group: Group) -> float:
        return group.fraction("momentum")


class ScheduleFreeAdamW(_ScheduleFree):
    """Threshold 2/(lr [(1 - b) + b c / (2 - c)]) - wd, c the last step's weight in the average."""

    names = frozenset({"AdamWScheduleFree"})
    state = frozenset({"z", "exp_avg_sq"})
    extra = frozenset({"step"})
    second = "exp_avg_sq"
    options = _SHARED | {"betas", "eps"}

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = sqrt(v / (1 - b2^k)) + eps, in the parameter's shape. Raises as Adam's."""
        square, correction = moment(state, "exp_avg_sq"), 1 - group.betas[1] ** steps(state)
        return Diagonal.of((square / correction).sqrt() + group.number("eps", 1e-8), square)

    def edge(self, lr: float, decay: float, transfer: float) -> float:
        """2/(lr g) - wd: the decay goes through the same filter as the gradient."""
        return 2 / (lr * transfer) - decay

    def decoupled(self, group: Group, name: str | None) -> bool:
        """Always."""
        return True

    def _beta(self, group: Group) -> float:
        return group.betas[0]


class ScheduleFreeSGD(_ScheduleFree):
    """Threshold 2/(lr [(1 - b) + b c / (2 - c)]), c the last step's weight in the average."""

    names = frozenset({"SGDScheduleFree"})
    state = frozenset({"z"})
    extra = frozenset({"step"})
    options = _SHARED | {"momentum"}


def _share(group: Group, state: State) -> float:
    """c of the last step, k^r lr_max^p over the sum of all such weights. Raises InputError where that is no share."""
    total = group.number("weight_sum")
    power, r = group.number("weight_lr_power", 2.0), group.number("r", 0.0)
    try:
        own = steps(state) ** r * group.number("lr_max", least=0.0) ** power
        share = own / total if total else 0.0  # as the package has it at learning rate 0
    except (OverflowError, ZeroDivisionError):
        share = float("nan")
    if not 0 <= share <= 1 + 1e-9:
        raise InputError(
            f"the last step's weight in Schedule-Free's average is {share:g}, no share of 'weight_sum' {total:g}",
            hint=f"the optimizer state is damaged: use another checkpoint, or {NO_OPTIMIZER}",
        )
    return min(share, 1.0)
