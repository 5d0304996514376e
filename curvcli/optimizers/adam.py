"""Adam, AdamW and NAdam: a momentum filter over gradients divided by a root mean square."""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from torch import Tensor

from curvcli.curvature.inverse_root import Diagonal
from curvcli.documents import Finding
from curvcli.optimizers.base import Group, OptimizerView, Options, Rule, State, moment, product, steps

_SHARED = frozenset({"lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay"})
# Copies of the weights in float32, and what was lost to rounding.
_COPIES = frozenset({"master_param", "master", "compensation", "kahan_comp"})
ESTIMATED: Options = MappingProxyType({"betas": (0.9, 0.999), "eps": 1e-8})
_LATE = 1e9  # steps after which no bias is left to correct


class Adam(Rule):
    """Cohen et al., arXiv 2207.14484: threshold (2/lr - wd)(1 + b1)/(1 - b1).

    Bias correction is as the group says: off with transformers' `correct_bias` or apex' and DeepSpeed's
    `bias_correction`. Weight decay is decoupled as the group says (`decoupled_weight_decay`, `adam_w_mode`).
    """

    names = frozenset(
        {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}
        | {f"{paged}Adam{w}{bits}" for paged in ("", "Paged") for w in ("", "W") for bits in ("", "8bit", "32bit")}
    )
    state = frozenset({"exp_avg", "exp_avg_sq"})
    extra = _COPIES | {"step", "max_exp_avg_sq"}
    unset = frozenset({"max_exp_avg_sq"})
    second = "exp_avg_sq"
    averages = ("exp_avg", "exp_avg_sq")
    options = _SHARED | {"amsgrad", "correct_bias", "bias_correction", "adam_w_mode"}
    defaults: Options | None = ESTIMATED

    def name(self, view: OptimizerView) -> str:
        """Adam or AdamW as the class says; of other classes, AdamW where all groups decouple weight decay."""
        if view.name in ("Adam", "AdamW"):
            return view.name
        return "AdamW" if all(self.decoupled(g, view.name) for g in view.groups) else "Adam"

    def matches(self, view: OptimizerView) -> bool:
        """Whether the state is Adam's and the options are not RAdam's."""
        return super().matches(view) and not _rectified(view)

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = (1 - b1^t) (sqrt(v / (1 - b2^t)) + eps), in the parameter's shape; sqrt(v) + eps without bias correction.

        With amsgrad v is the largest second moment so far. Under `correct_bias` eps is added to sqrt(v) before the
        correction, as transformers does.

        Raises:
            InputError: the steps or betas are not known, or v is missing or has negative entries.
            UnsupportedError: v is quantised.
        """
        square = moment(state, "max_exp_avg_sq" if group.flag("amsgrad") else "exp_avg_sq")
        root, eps = square.sqrt(), group.number("eps", 1e-8)
        if not all(group.flag(key, True) for key in ("correct_bias", "bias_correction")):
            return Diagonal.of(root + eps, square)
        first, second = (1 - beta ** steps(state) for beta in group.betas)
        # transformers adds eps to the root before it is corrected.
        inner, outer = (eps, 0.0) if "correct_bias" in group.options else (0.0, eps)
        return Diagonal.of(((root + inner) / second**0.5 + outer) * first, square)

    def transfer(self, group: Group, state: State) -> float:
        """(1 - b1)/(1 + b1). Raises InputError where the betas are missing or not in [0, 1)."""
        return (1 - group.betas[0]) / (1 + group.betas[0])

    def decoupled(self, group: Group, name: str | None) -> bool:
        """As the group says; where it does not, yes, but for the class Adam without `t_alpha`."""
        # Files from before torch 2.8 do not say; AdamW is what trainers of Transformers use. bitsandbytes' Adam decouples.
        assumed = name != "Adam" or "t_alpha" in group.options
        return group.flag("decoupled_weight_decay", group.flag("adam_w_mode", assumed))

    def momentum(self, group: Group, state: State) -> Tensor:
        """The first moment as stored, in the parameter's shape; P holds its bias correction."""
        return state["exp_avg"]  # type: ignore[no-any-return]

    def expected(self, mean: Tensor, square: Tensor) -> State:
        """The mean and the mean square as the two moments, after so many steps that no bias is left to correct."""
        return {"step": _LATE, "exp_avg": mean, "exp_avg_sq": square, "max_exp_avg_sq": square}

    def findings(self, view: OptimizerView) -> list[Finding]:
        """`decay-assumed` where weight decay is on and neither the class nor its group says whether it is decoupled."""
        says = {"decoupled_weight_decay", "adam_w_mode", "correct_bias", "t_alpha"}
        unsaid = [group for group in view.groups if says.isdisjoint(group.options)]
        if view.name is not None or not any(g.number("weight_decay", 0.0) for g in unsaid):
            return []
        return [
            Finding(
                code="decay-assumed",
                severity="info",
                message="the checkpoint does not say whether weight decay is decoupled: it is taken as AdamW's; pass "
                "--optimizer adam where it is part of the gradient",
            )
        ]


class NAdam(Adam):
    """torch/optim/nadam.py: -lr [(1 - mu_t)/(1 - M_t) g + mu_t+1/(1 - M_t mu_t+1) m] / (sqrt(v) + eps).

    M_t is the running product of mu. With m = (1 - b1) z/(z - b1) g, the filter at z = -1 is
    (1 - mu_t)/(1 - M_t) + mu_t+1/(1 - M_t mu_t+1) (1 - b1)/(1 + b1).
    """

    names = frozenset({"NAdam"})
    state = frozenset({"exp_avg", "exp_avg_sq", "mu_product"})
    extra = frozenset({"step"})
    counts = frozenset({"step", "mu_product"})
    unset: frozenset[str] = frozenset()
    options = _SHARED | {"momentum_decay"}
    defaults = None  # of an optimizer that is rare no file without state is taken for its

    def name(self, view: OptimizerView) -> str:
        """Always NAdam."""
        return "NAdam"

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = sqrt(v / (1 - b2^t)) + eps, in the parameter's shape. Raises as Adam's; M_t is in `transfer`."""
        square, correction = moment(state, "exp_avg_sq"), 1 - group.betas[1] ** steps(state)
        return Diagonal.of((square / correction).sqrt() + group.number("eps", 1e-8), square)

    def transfer(self, group: Group, state: State) -> float:
        """The filter at z = -1 as the class gives it, with mu at this step and the next.

        Raises InputError where the steps, the betas or the running product of mu are missing or out of range.
        """
        now, ahead = self._coefficients(group, state)
        return now + ahead * super().transfer(group, state)

    def decoupled(self, group: Group, name: str | None) -> bool:
        """As the group says, no where it does not."""
        return group.flag("decoupled_weight_decay")

    def momentum(self, group: Group, state: State) -> Tensor:
        """The first moment times both coefficients of the update, in the parameter's shape. Raises as `transfer`."""
        # The share of the gradient itself is taken from m too: the next gradient is not known.
        now, ahead = self._coefficients(group, state)
        return state["exp_avg"] * (now + ahead)  # type: ignore[no-any-return]

    def expected(self, mean: Tensor, square: Tensor) -> State:
        """The mean and the mean square as the two moments, after so many steps that the product of mu is 0."""
        return {"step": _LATE, "mu_product": 0.0, "exp_avg": mean, "exp_avg_sq": square}

    def findings(self, view: OptimizerView) -> list[Finding]:
        """None: nothing is assumed."""
        return []  # its decay is coupled unless its group says otherwise

    def _coefficients(self, group: Group, state: State) -> tuple[float, float]:
        beta, decay, step = group.betas[0], group.number("momentum_decay", 4e-3, least=0.0), steps(state)
        mu, mu_next = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
        passed = product(state, "mu_product")
        return (1 - mu) / (1 - passed), mu_next / (1 - passed * mu_next)


class RAdam(Adam):
    """torch/optim/radam.py (Liu et al., arXiv 1908.03265): Adam's step times a factor r_t, SGD's where that is undefined.

    r_t = sqrt((p - 4)(p - 2) q / ((q - 4)(q - 2) p)) where p > 5, with q = 2/(1 - b2) - 1 and p = q - 2 t b2^t / (1 - b2^t).
    """

    names = frozenset({"RAdam"})
    extra = frozenset({"step"})
    unset: frozenset[str] = frozenset()
    options = _SHARED
    defaults = None

    def name(self, view: OptimizerView) -> str:
        """Always RAdam."""
        return "RAdam"

    def matches(self, view: OptimizerView) -> bool:
        """Whether the state is Adam's and the options are those of torch's RAdam."""
        return self.state <= view.keys and _rectified(view)

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = (1 - b1^t) (sqrt(v) + eps) / (r_t sqrt(1 - b2^t)), or 1 - b1^t throughout, in the parameter's shape.

        Raises as Adam's.
        """
        square, t = moment(state, "exp_avg_sq"), steps(state)
        first, second = (1 - beta**t for beta in group.betas)
        most = 2 / (1 - group.betas[1]) - 1
        length = most - 2 * t * (1 - second) / second
        if length <= 5:
            return Diagonal.of(torch.full_like(square, first), square)
        factor = math.sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length))
        return Diagonal.of((square.sqrt() + group.number("eps", 1e-8)) * (first / (factor * math.sqrt(second))), square)

    def decoupled(self, group: Group, name: str | None) -> bool:
        """As the group says, no where it does not."""
        return group.flag("decoupled_weight_decay")

    def findings(self, view: OptimizerView) -> list[Finding]:
        """None: nothing is assumed."""
        return []


class Adamax(Rule):
    """torch/optim/adamax.py (Kingma and Ba, arXiv 1412.6980): threshold (2 + 2b)/((1 - b) lr).

    P is a running maximum, which small gradients do not move.
    """

    names = frozenset({"Adamax"})
    state = frozenset({"exp_avg", "exp_inf"})
    extra = frozenset({"step"})
    options = frozenset({"lr", "betas", "eps", "weight_decay", "maximize"})

    def preconditioner(self, group: Group, state: State) -> Diagonal:
        """P = (1 - b1^t) u, u the maximum as stored, in the parameter's shape; no more than eps where no gradient came.

        Raises InputError where the steps, the betas or u are missing, or u has negative entries.
        """
        largest = moment(state, "exp_inf")
        first = 1 - group.betas[0] ** steps(state)
        return Diagonal.of(largest * first, largest > 1.5 * group.number("eps", 1e-8))

    def transfer(self, group: Group, state: State) -> float:
        """(1 - b1)/(1 + b1). Raises InputError where the betas are missing or not in [0, 1)."""
        return (1 - group.betas[0]) / (1 + group.betas[0])

    def momentum(self, group: Group, state: State) -> Tensor:
        """The first moment as stored, in the parameter's shape; P holds its bias correction."""
        return state["exp_avg"]  # type: ignore[no-any-return]


def _rectified(view: OptimizerView) -> bool:
    """Whether groups have the options of torch's RAdam, which has neither amsgrad nor a fused step as Adam's have."""
    said = [set(group.options) for group in view.groups]
    return bool(said) and all("foreach" in keys and keys.isdisjoint({"amsgrad", "fused", "momentum_decay"}) for keys in said)
