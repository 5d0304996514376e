"""Optimizers for which no number is given, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from curvcli.errors import UnsupportedError
from curvcli.optimizers.base import NO_OPTIMIZER, OptimizerView
from curvcli.optimizers.optimi import PACKAGE

_NO_THRESHOLD = "its update is no linear map of the gradient, so no Euclidean stability threshold exists"


_NUMBER = re.compile(r"_\d+$")
# Matrices for each side of a tensor, and what stands beside them where there is a rule.
_FACTORS = ("Q", "GG", "precond", "inv_precond", "pre_cond", "inv_pre_cond")
_KNOWN = (
    {"exp_avg", "exp_avg_sq", "Q", "GG"},
    {"momentum_buffer", "precond", "inv_precond"},
    {"momentum_buffer", "pre_cond", "inv_pre_cond"},
)


class Seen:
    """An optimizer's options and state by name; values that are None are not set."""

    def __init__(self, view: OptimizerView) -> None:
        self.name: str | None = view.name
        self.keys: frozenset[str] = view.keys
        self.groups = [group.options for group in view.groups]
        self.options = frozenset(key for group in self.groups for key in group)

    def values(self, key: str) -> list[object]:
        """An option's values over the groups that set it."""
        return [group[key] for group in self.groups if group.get(key) is not None]

    def on(self, key: str) -> bool:
        """Whether some group sets an option to anything but False or 0."""
        return any(value is not False and value != 0 for value in self.values(key))

    def says(self, name: str) -> bool:
        """Whether an option's value names an algorithm."""
        said = [value for key in ("algorithm", "optimizer", "optim") for value in self.values(key)]
        return any(isinstance(value, str) and value.lower() == name for value in said)


class Refused(NamedTuple):
    """A family that no number is given for.

    Attributes:
        family: for people.
        names: parts of its classes' names, in lower case.
        looks_like: how its options and state look.
        reason: to go on "the optimizer is ...: ".
    """

    family: str
    names: tuple[str, ...]
    looks_like: Callable[[Seen], bool]
    reason: str


# The first that fits speaks. What bitsandbytes stores in 32 bits is named as torch names it by now: what has its names
# still is quantised.
REFUSED: list[Refused] = [
    Refused(
        "schedule-free, and neither its AdamW nor its SGD",
        ("schedulefree",),
        lambda s: (
            ("weight_sum" in s.options or "z" in s.keys)
            and not ({"weight_sum", "warmup_steps", "train_mode"} <= s.options and s.keys <= {"z", "exp_avg_sq", "step"})
        ),
        "what its average weighs and how its gradients are scaled is not known; not supported",
    ),
    Refused(
        "a variant of Muon",
        ("muon",),
        lambda s: s.keys >= {"momentum", "variance"} and s.says("muon"),  # Dion's own, and what it says of Adam beside it
        "what it does to an orthogonalised update, or where it keeps its momentum, is not known; not supported",
    ),
    Refused("Dion", ("dion",), lambda s: s.says("dion"), _NO_THRESHOLD),
    Refused(
        "a variant of Lion",
        ("lion",),
        lambda s: s.says("lion"),
        "where it keeps its momentum, or what else it does to it, is not known; not supported",
    ),
    Refused("Rprop", ("rprop",), lambda s: "prev" in s.keys, _NO_THRESHOLD),
    Refused(
        "CAME",
        ("came",),
        lambda s: bool(s.keys & {"exp_avg_res_row", "exp_avg_res_col"}),
        "it divides the update by how far it is from its average; not supported",
    ),
    Refused(
        "Shampoo with grafting",
        ("scalableshampoo", "distributedshampoo"),
        lambda s: {"pre_conditioner", "graft"} <= s.keys or any("factor_matrices" in key for key in s.keys),
        "each tensor's step is made as long as another optimizer's, so it is no linear map of the gradient, and "
        "its matrices are kept by block or in objects; a threshold for such steps would be needed; not supported",
    ),
    Refused(
        "a variant of SOAP or Shampoo",
        ("soap", "shampoo", "psgd"),
        lambda s: (
            any("soap_" in key for key in s.keys)  # heavyball's
            or (any(_has(s.keys, part) for part in _FACTORS) and not any(known <= _parts(s.keys) for known in _KNOWN))
        ),
        "its preconditioner is not diagonal, and how it is stored is not known; not supported",
    ),
    Refused(
        "AdEMAMix",
        ("ademamix",),
        lambda s: (
            (bool("exp_avg_slow" in s.keys or s.values("beta3")) or any(_length(v) == 3 for v in s.values("betas")))
            and not ("exp_avg_slow" in s.keys and all(_length(v) == 3 for v in s.values("betas")))
        ),
        "it adds a second, slow moment to the update, which is not in its state; not supported",
    ),
    Refused(
        "LAMB or LARS",
        ("lamb", "lars"),
        lambda s: (
            bool(s.keys & {"trust_ratio", "unorm_vec"})
            or bool(s.options & {"grad_averaging", "trust_clip", "always_adapt", "trust_coeff", "trust_coefficient"})
        ),
        "it scales each tensor's update by a ratio of norms, which is no linear map of the gradient",
    ),
    Refused(
        "Lookahead",
        ("lookahead",),
        lambda s: any("lookahead" in key for key in s.options) or bool(s.keys & {"lookahead_slow_avg", "slow_buffer"}),
        "it pulls the weights back to slow ones every few steps; not supported",
    ),
    Refused(
        "SAM",
        ("sam",),
        lambda s: bool(s.keys & {"old_p", "e_w"}),
        "it takes gradients at disturbed weights; not supported",
    ),
    Refused(
        "Sophia or AdaHessian",
        ("sophia", "adahessian"),
        lambda s: bool(s.keys & {"hessian", "exp_hessian_diag_sq"}),
        "it clips by, or divides by, estimates of the Hessian; not supported",
    ),
    Refused(
        "AdaBelief",
        ("adabelief",),
        lambda s: "exp_avg_var" in s.keys,
        "it divides by the gradient's deviation from its mean; not supported",
    ),
    Refused(
        "Adan or MARS",
        ("adan", "mars"),
        lambda s: bool(s.keys & {"exp_avg_diff", "neg_pre_grad", "pre_grad", "last_grad", "previous_grad"}),
        "it adds differences of successive gradients to the update; not supported",
    ),
    Refused(
        "Prodigy or D-Adaptation",
        ("prodigy", "dadapt"),
        lambda s: {"d", "d0"} <= s.options or "p0" in s.keys,
        "its learning rate is multiplied by an estimate of its own; not supported",
    ),
    Refused(
        "APOLLO",
        ("apollo",),
        lambda s: "scale_type" in s.options or "scaled_grad" in s.keys,
        "it scales gradients by a ratio of norms of themselves, which is no linear map of the gradient",
    ),
    Refused(
        "GaLore, and not its AdamW",
        ("galore",),
        lambda s: "projector" in s.keys,
        "its moments are of projected gradients, in a layout or by a projector that is not known; not supported",
    ),
    Refused(
        "a cautious AdamW",
        ("cautious",),
        lambda s: False,  # its files are those of transformers' AdamW
        "it masks entries of the update by their sign, which is no linear map of the gradient",
    ),
    Refused(
        "StableAdamW, or another of torch-optimi's",
        ("stableadam",),
        lambda s: s.options >= PACKAGE,  # its AdamW arrives as torch's
        "its Adam and RAdam look alike in a file, where its AdamW alone is told, and StableAdamW shortens a tensor's step "
        "where its gradient is long against the second moment; not supported",
    ),
    Refused(
        "8-bit Adam",
        (),
        lambda s: any(key.startswith(("absmax", "qmap")) for key in s.keys),
        "its moments are quantised, and what they are scaled by is not stored by block; not supported",
    ),
    Refused(
        "bitsandbytes' with one moment",
        (),
        lambda s: "state1" in s.keys,
        "SGD, RMSprop, Adagrad and Lion look alike in its files; not supported",
    ),
    Refused(
        "one of timm's (NAdamW, NAdam, ADOPT, LaProp, SGDW)",
        ("nadamw", "adopt", "laprop", "sgdw"),
        # Of those that can be cautious AdamW alone has amsgrad.
        lambda s: (
            bool(s.options & {"clip_exp", "schedule_decay"}) or ("caution" in s.options and "amsgrad" not in s.options)
        ),
        "it is neither Adam nor SGD, though its state has the same names; not supported",
    ),
    Refused(
        "TensorFlow's RMSprop",
        ("rmsproptf",),
        lambda s: "lr_in_momentum" in s.options,
        "it takes the root of the second moment and eps together; not supported",
    ),
    Refused(
        "RAdam of before torch had it",
        (),
        lambda s: s.name is None and bool(s.options & {"buffer", "degenerated_to_sgd"}),
        "its update is rectified by a factor that its buffer holds; not supported",
    ),
    Refused(
        "ASGD", ("asgd",), lambda s: {"ax", "eta"} <= s.keys, "it keeps an average of the weights beside them; not supported"
    ),
]


def refuse(view: OptimizerView, known: Collection[str] = ()) -> None:
    """Raise UnsupportedError, with the reason, for an optimizer that no rule may measure.

    Args:
        known: classes that have a rule: the parts of their names say nothing.
    """
    seen = Seen(view)
    named = "" if view.name in known else (view.name or "").lower()
    for each in REFUSED:
        if any(name in named for name in each.names) or each.looks_like(seen):
            raise UnsupportedError(f"the optimizer is {each.family}: {each.reason}", hint=NO_OPTIMIZER)


def _has(keys: Collection[str], part: str) -> bool:
    return part in _parts(keys)


def _parts(keys: Collection[str]) -> set[str]:
    """Names of entries, without the number of the side that a matrix is for."""
    return {_NUMBER.sub("", key) for key in keys}


def _length(value: object) -> int:
    return len(value) if isinstance(value, (tuple, list)) else 0
