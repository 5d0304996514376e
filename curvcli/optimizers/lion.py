"""Lion: steps of one size in every entry, along the sign of a momentum."""

from __future__ import annotations

from torch import Tensor

from curvcli.curvature.balls import MaxNorm
from curvcli.documents import Finding
from curvcli.errors import UnsupportedError
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule, State


class Lion(Rule):
    """Chen et al., arXiv 2302.06675: -lr (sign(b1 m + (1 - b1) g) + wd w), steepest descent in the max-norm.

    No Euclidean threshold exists. Its edge is that of sharpness in the max-norm, Z = lr S / (2 ||g||_1) = 1 (arXiv
    2603.05002), which weight decay is no part of.
    """

    names = frozenset({"Lion", "FusedLion", "DeepSpeedCPULion"})
    state = frozenset({"exp_avg"})
    extra = frozenset({"step"})
    options = frozenset({"lr", "betas", "weight_decay", "cautious_factor"})

    def name(self, view: OptimizerView) -> str:
        """Always Lion."""
        return "Lion"

    def matches(self, view: OptimizerView) -> bool:
        """Whether one average of gradients is all the state there is, and every group has its betas and no eps.

        What has one divides by a second moment, and Adam's state that lost it is not Lion's.
        """
        only = "exp_avg" in view.keys and view.keys <= self.state | self.extra
        return only and all("betas" in g.options and {"eps", "amsgrad"}.isdisjoint(g.options) for g in view.groups)

    def ball(self, group: Group, state: State, weight: Tensor) -> MaxNorm:
        """The max-norm's, of radius 1. Raises UnsupportedError where entries are scaled by their sign."""
        if group.number("cautious_factor", 1.0) != 1:
            raise UnsupportedError(
                f"the optimizer's option cautious_factor is {group.number('cautious_factor'):g}: it scales entries of the "
                "update by their sign, which no norm's ball does; not supported",
                hint=NO_OPTIMIZER,
            )
        return MaxNorm()

    def decoupled(self, group: Group, name: str | None) -> bool:
        """Always."""
        return True

    def momentum(self, group: Group, state: State) -> Tensor:
        """The average as stored, in the parameter's shape, without the share of the next gradient, which is not known."""
        return state["exp_avg"]  # type: ignore[no-any-return]

    def findings(self, view: OptimizerView) -> list[Finding]:
        """None: nothing is assumed."""
        return []
