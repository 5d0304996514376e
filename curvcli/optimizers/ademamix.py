"""AdEMAMix: Adam with a second, slow average of the gradients beside the first."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal
from curvcli.errors import InputError
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule, State, moment, steps

# What three packages call the steps of the two warm-ups: the authors', bitsandbytes, pytorch_optimizer.
_ALPHA, _BETA3 = ("alpha_warmup", "t_alpha", "t_alpha_beta3"), ("beta3_warmup", "t_beta3", "t_alpha_beta3")


class AdEMAMix(Rule):
    """Pagliardini et al., arXiv 2409.03137: -lr [m1/(1 - b1^t) + alpha m2] / (sqrt(v/(1 - b2^t)) + eps).

    The filter at z = -1 is (1 - b1)/(1 + b1)/(1 - b1^t) + alpha (1 - b3)/(1 + b3), with alpha and b3 as their warm-ups
    have them at step t. Slow as m2 is, it weighs alpha (1 - b3)/2 there, and almost nothing late in a run.
    """

    names = frozenset({f"{paged}AdEMAMix{bits}" for paged in ("", "Paged") for bits in ("", "8bit", "32bit")})
    state = frozenset({"exp_avg_slow", "exp_avg_sq"})
    extra = frozenset({"step", "exp_avg", "exp_avg_fast"})
    unset = frozenset({"exp_avg_fast"})  # at b1 = 0
    second = "exp_avg_sq"
    options = frozenset({"lr", "betas", "eps", "weight_decay", "weight_decouple", "alpha", *_ALPHA, *_BETA3})
    refusals: Mapping[str, str] = {
        **Rule.refusals,
        "fixed_decay": "its decay does not go with the learning rate",
        "stable_adamw": "it divides the update by its size, which is no linear map of the gradient",
    }

    def name(self, view: OptimizerView) -> str:
        """Always AdEMAMix."""
        return "AdEMAMix"

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = sqrt(v / (1 - b2^t)) + eps, in the parameter's shape. Raises as Adam's; 1 - b1^t is in `transfer`."""
        square, correction = moment(state, "exp_avg_sq"), 1 - _betas(group)[1] ** steps(state)
        return Diagonal.of((square / correction).sqrt() + group.number("eps", 1e-8), square)

    def transfer(self, group: Group, state: State) -> float:
        """The filter at z = -1 as the class gives it. Raises InputError where a beta, alpha or the step is missing."""
        b1, b3 = _betas(group)[0], _slow_beta(group, state)
        fast: float = (1 - b1) / (1 + b1) / (1 - b1 ** steps(state))
        return fast + _alpha(group, state) * (1 - b3) / (1 + b3)

    def decoupled(self, group: Group, name: str | None) -> bool:
        """Yes, but where the group says no, as pytorch_optimizer's may."""
        return group.flag("weight_decouple", True)

    def momentum(self, group: Group, state: State) -> Tensor | None:
        """m1/(1 - b1^t) + alpha m2, in the parameter's shape; None where the fast average is not stored, as at b1 = 0."""
        fast = state.get("exp_avg", state.get("exp_avg_fast"))
        if not isinstance(fast, Tensor):
            return None
        first = fast / (1 - _betas(group)[0] ** steps(state))
        return first + _alpha(group, state) * state["exp_avg_slow"]  # type: ignore[no-any-return]


def _betas(group: Group) -> tuple[float, float, float]:
    betas = group.options.get("betas")
    try:
        first, second, third = (float(b) for b in betas)  # type: ignore[union-attr]
    except (TypeError, ValueError, RuntimeError):
        first = second = third = -1.0
    if not all(0 <= beta < 1 for beta in (first, second, third)):
        raise InputError(
            f"optimizer option 'betas' is {str(betas)[:60]}, not three in [0, 1)",
            hint=f"use another checkpoint, or {NO_OPTIMIZER}",
        )
    return first, second, third


def _progress(group: Group, state: State, keys: tuple[str, ...]) -> float:
    """Share of a warm-up that is done, 1 without one."""
    length = next((group.number(key, least=0.0) for key in keys if group.options.get(key) is not None), 0.0)
    return min(1.0, steps(state) / length) if length else 1.0


def _alpha(group: Group, state: State) -> float:
    return group.number("alpha", least=0.0) * _progress(group, state, _ALPHA)


def _slow_beta(group: Group, state: State) -> float:
    """b3, whose half-life grows linearly from b1's: 1/log(b3) is linear in the step."""
    (first, _, last), done = _betas(group), _progress(group, state, _BETA3)
    if done == 1 or last == 0:
        return last
    # The authors add 1e-8, which makes b1 = 0 a half-life of 0.
    return min(last, math.exp(1 / ((1 - done) / math.log(first + 1e-8) + done / math.log(last + 1e-8))))
