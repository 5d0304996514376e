"""What every optimizer rule provides, and the form in which optimizer state arrives here."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from curvcli.curvature.balls import Ball
from curvcli.curvature.inverse_root import InverseRoot
from curvcli.curvature.precision import numbers
from curvcli.documents import Finding
from curvcli.errors import InputError, UnsupportedError
from curvcli.optimizers import optimi
from curvcli.optimizers.bitsandbytes import Renamed, as_torch

Options = Mapping[str, Any]
State = Mapping[str, Any]

_DOTTED = re.compile(r"[A-Za-z]+\.\d{1,2}")

NO_OPTIMIZER = "pass --optimizer none (in Python optimizer=None) for the curvature of the loss itself, without rho"

_MASKED = "it masks entries of the update by their sign, which is no linear map of the gradient"
_SLOW = "it adds a second, slow moment to the update"


@dataclass(frozen=True)
class Group:
    """One parameter group: its parameters by name and its hyperparameters."""

    names: tuple[str, ...]
    options: Options

    def number(self, key: str, default: float | None = None, least: float = -float("inf")) -> float:
        """A hyperparameter as a float. Raises InputError where it is missing, below `least` or no finite number."""
        value = self.options.get(key, default)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            wrong = f"is {value!r}, not a number" if key in self.options else "is missing"
            raise InputError(f"optimizer option {key!r} {wrong}", hint=_override(key)) from error
        if not abs(number) < float("inf") or number < least:
            raise InputError(f"optimizer option {key!r} is {number}", hint=_override(key))
        return number

    def fraction(self, key: str) -> float:
        """A hyperparameter in [0, 1), 0 where the group has none. Raises InputError."""
        number = self.number(key, 0.0, least=0.0)
        if number >= 1:
            raise InputError(f"optimizer option {key!r} is {number:g}, not in [0, 1)", hint=_override(key))
        return number

    def flag(self, key: str, default: bool = False) -> bool:
        """A switch, the default where the group does not say. Raises InputError where it is neither on nor off."""
        value = self.options.get(key)
        if value is None:
            return default
        number = scalar(value)
        if number not in (0, 1):
            raise InputError(f"optimizer option {key!r} is {str(value)[:40]}, neither on nor off", hint=_override(key))
        return bool(number)

    @property
    def betas(self) -> tuple[float, float]:
        """beta1, beta2, each in [0, 1). A third, of a slow average, is its rule's."""
        betas = self.options.get("betas")
        try:
            first, second, *_ = (float(b) for b in betas)  # type: ignore[union-attr]
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"optimizer option 'betas' is {betas!r}", hint="pass --betas B1,B2") from error
        if not (0 <= first < 1 and 0 <= second < 1):
            raise InputError(f"optimizer option 'betas' is {betas!r}", hint="pass --betas B1,B2, each in [0, 1)")
        return first, second

    @property
    def lr(self) -> float | None:
        """The learning rate in force, None where the group has none. Raises InputError where it is no number."""
        return None if self.options.get("lr") is None else self.number("lr")


@dataclass(frozen=True)
class OptimizerView:
    """Optimizer state by parameter name, its entries named as in torch.optim whoever wrote them.

    bitsandbytes' moments (state1, state2) become exp_avg and exp_avg_sq, in float32; a step that is counted for a whole
    group, as fused Adams do, becomes each parameter's; a list of tensors (SOAP's Q) becomes entries Q_0, Q_1.

    Attributes:
        name: the class, where it is known.
        vouched: the class is certain: torch's own in memory, or named by the user. Options that are not known cannot
            change its update then.
        findings: what was done to the options on the way here.
        clip: what clipping left of a gradient of late, a share of its norm; None where it is not known.
        emptied: the state has been read, and is gone.
    """

    groups: tuple[Group, ...]
    state: Mapping[str, State]
    name: str | None = None
    vouched: bool = False
    findings: tuple[Finding, ...] = ()
    clip: float | None = None
    emptied: bool = False

    def __post_init__(self) -> None:
        keys, name = self.keys, self.name
        plain = [optimi.are_adams(group.options, keys, name) for group in self.groups]
        corrected = {n for group, one in zip(self.groups, plain, strict=True) if one for n in group.names}
        if any(plain):
            groups = (
                Group(group.names, optimi.as_torch_options(group.options)) if one else group
                for group, one in zip(self.groups, plain, strict=True)
            )
            object.__setattr__(self, "groups", tuple(groups))
            object.__setattr__(self, "findings", (*self.findings, *(() if name else (optimi.ASSUMED,))))
        options = {n: g.options for g in self.groups for n in g.names}
        state = {name: _as_torch(entry, options.get(name, {})) for name, entry in self.state.items()}
        state |= {name: optimi.Uncorrected(state[name], options[name]) for name in corrected & state.keys()}
        object.__setattr__(self, "state", state)

    def empty(self) -> None:
        """Lets go of the state, for whoever holds it, so that it makes room."""
        cast("dict[str, State]", self.state).clear()
        object.__setattr__(self, "emptied", True)

    @property
    def keys(self) -> frozenset[str]:
        """Names of the state entries that parameters carry."""
        return frozenset(key for entry in self.state.values() for key in entry)

    @property
    def step(self) -> int | None:
        """Steps taken, or None where the optimizer does not count them."""
        counted = [scalar(entry.get("step")) for entry in self.state.values()]
        return max((int(step) for step in counted if abs(step) < float("inf")), default=None)


class Rule:
    """How one family of optimizers turns curvature into stability; formulas in docs/explanation/method.md.

    A family is a subclass in a file of its own and a line in `optimizers.RULES`. All that the rest of the package knows of
    it is declared here. What is not declared is not ignored: `options.scrutinise` refuses it, or doubts the result.

    Attributes:
        names: classes that follow it.
        state: entries that every parameter has after a step.
        extra: entries that a parameter may have besides.
        counts: those of them that are numbers and no tensors.
        unset: those of them that are None while an option is off.
        shaped_otherwise: those of them whose shape is not the parameter's, as factors are.
        by_shape: those of them that a parameter has or has not by its shape.
        second: the entry that averages or sums squared gradients entry by entry, by which state is told apart from that of
            other parameters; None where there is none.
        averages: the entries of the two moments that are averages of the same gradients with the group's betas, which
            bounds one by the other; None where there are none.
        options: group options that the rule honours.
        refusals: options that are known and harmless while off, and what on they do to the update: reason to refuse.
        defaults: options with which state that was not saved may be estimated from gradients; None where it may not.
    """

    names: frozenset[str] = frozenset()
    state: frozenset[str] = frozenset()
    extra: frozenset[str] = frozenset()
    counts: frozenset[str] = frozenset({"step"})
    unset: frozenset[str] = frozenset()
    shaped_otherwise: frozenset[str] = frozenset()
    by_shape: frozenset[str] = frozenset()
    second: str | None = None
    averages: tuple[str, str] | None = None
    options: frozenset[str] = frozenset()
    refusals: Mapping[str, str] = {
        "caution": _MASKED,
        "cautious": _MASKED,
        "corrected_weight_decay": "its decay follows the square of the learning rate",
        "selective_updates": "it leaves entries without a gradient as they are",
        "use_muon": "it orthogonalises the update",
        "alpha": _SLOW,
        "t_alpha": _SLOW,
        "t_beta3": _SLOW,
    }
    defaults: Options | None = None

    def name(self, view: OptimizerView) -> str:
        """The optimizer's name in torch.optim, for the report."""
        return view.name or min(self.names)

    def needed(self, group: Group, state: State) -> frozenset[str]:
        """The entries that a parameter has to have, where those are not the same for all."""
        return self.state

    def matches(self, view: OptimizerView) -> bool:
        """Whether state without a class's name is of this family. Of several that match the one with most state is taken."""
        return bool(self.state) and self.state <= view.keys

    def preconditioner(self, group: Group, state: State) -> InverseRoot:
        """P of one parameter by its inverse root, without the learning rate: the update is -lr P^(-1) m."""
        raise NotImplementedError

    def ball(self, group: Group, state: State, weight: Tensor) -> Ball | None:
        """The unit ball of the norm in which the optimizer's normalised step is steepest, without the learning rate.

        None where the step is preconditioned instead. A parameter with one has no P and no threshold of lambda: its edge
        is that of sharpness in this norm (`curvature.steepest`).
        """
        return None

    def transfer(self, group: Group, state: State) -> float:
        """Momentum filter's transfer function at z = -1, g(-1)."""
        return 1.0

    def lr(self, group: Group, state: State) -> float:
        """Learning rate that multiplies P^(-1) at this step."""
        return group.number("lr")

    def edge(self, lr: float, decay: float, transfer: float) -> float:
        """Threshold of lambda, (2/lr - wd)/g(-1); wd is the decoupled weight decay."""
        return (2 / lr - decay) / transfer

    def decay(self, group: Group, state: State) -> float:
        """Decoupled weight decay, per learning rate."""
        return group.number("weight_decay", 0.0)

    def completed(self, view: OptimizerView, parameters: Mapping[str, Tensor]) -> OptimizerView:
        """The view with what the rule has to know of the weights; asked for twice, it stays as it is."""
        return view

    def gradient_at(self, group: Group, state: State, weight: Tensor) -> Tensor | None:
        """Where the optimizer takes gradients, if that is not at the weights as they are."""
        return None

    def decoupled(self, group: Group, name: str | None) -> bool:
        """Whether weight decay acts on the weights alone rather than as part of the gradient.

        Args:
            name: the optimizer's class, where it is known.
        """
        return False

    def momentum(self, group: Group, state: State) -> Tensor | None:
        """m such that the update is -lr P^(-1) m, or steepest along m; None where the gradient itself is used."""
        return None

    def expected(self, mean: Tensor, square: Tensor) -> State | None:
        """State after many steps of gradients with this mean and mean square; None where that does not tell it."""
        return None

    def findings(self, view: OptimizerView) -> list[Finding]:
        """What the rule had to assume."""
        return []


def moment(state: State, key: str) -> Tensor:
    """A second moment as stored, at least in float32, in the parameter's shape.

    Raises:
        InputError: it is missing, or has negative entries.
        UnsupportedError: it is quantised.
    """
    value = state.get(key)
    if not isinstance(value, Tensor):
        raise InputError(f"the optimizer state has no {key!r}", hint="it is damaged: use another checkpoint")
    if not value.is_floating_point():
        raise UnsupportedError(
            f"second moment {key!r} is stored as {str(value.dtype).removeprefix('torch.')}: quantised; not supported",
            hint=NO_OPTIMIZER,
        )
    value = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if bool((value < 0).any()):
        raise InputError(
            f"second moment {key!r} has negative entries (least {float(value.min()):.3g})",
            hint="the optimizer state is damaged: use another checkpoint",
        )
    return value


def steps(state: State) -> float:
    """Steps that a parameter took, 1 or more. Raises InputError where the state does not say."""
    value = state.get("step")
    number = scalar(value)
    if not 1 <= number < float("inf"):
        raise InputError(
            f"the optimizer counts {'no' if value is None else str(value)[:40]} steps, so its bias correction is unknown",
            hint="use a checkpoint with the step in the optimizer's state or groups, or pass --optimizer none",
        )
    return number


def product(state: State, key: str) -> float:
    """A running product of numbers below 1. Raises InputError where the state has none."""
    number = scalar(state.get(key))
    if not 0 <= number < 1:
        raise InputError(f"optimizer state {key!r} is {str(state.get(key))[:40]}", hint="use another checkpoint")
    return number


def scalar(value: Any) -> float:
    """A number, NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return float("nan")


def fetched(state: Mapping[str, State]) -> dict[str, State]:
    """State with the counters that fused and capturable optimizers keep on a GPU on the CPU; it is waited for once."""
    there = [
        (name, key, value)
        for name, entry in state.items()
        for key, value in entry.items()
        if isinstance(value, Tensor) and not value.dim() and value.device.type != "cpu" and not hasattr(value, "to_local")
    ]
    if not there:
        return dict(state)
    found: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in state.items()}
    for (name, key, value), number in zip(there, numbers([value for _, _, value in there]), strict=True):
        found[name][key] = torch.tensor(number, dtype=value.dtype)
    return {**found}


def unlisted(entry: State) -> State:
    """State with the tensors of a list each by its place: Q_0, Q_1, where torch.distributed.checkpoint says Q.0, Q.1."""
    dotted = {key: key.replace(".", "_") for key in entry if _DOTTED.fullmatch(key)}
    if dotted:
        return Renamed(entry, {new: old for old, new in dotted.items()})
    # What is read when it is asked for has no lists.
    listed = [k for k, v in entry.items() if isinstance(v, (list, tuple))] if isinstance(entry, dict) else []
    placed = {f"{k}_{i}": v for k in listed for i, v in enumerate(entry[k]) if isinstance(v, Tensor)}
    if not placed:
        return entry
    empty = {k for k in listed if not any(isinstance(v, Tensor) for v in entry[k])}
    return {**{k: v for k, v in entry.items() if k not in listed or k in empty}, **placed}


def _counted(options: Options) -> Any:
    """Steps that are counted for a whole group: as fused Adams do, and Schedule-Free."""
    return options.get("k") if "weight_sum" in options else options.get("step")


def _as_torch(entry: State, options: Options) -> State:
    entry, step = unlisted(as_torch(entry, options)), _counted(options)
    return entry if step is None or "step" in entry else ChainMap({"step": step}, entry)  # type: ignore[arg-type]


def _override(key: str) -> str:
    if key in ("lr", "eps", "weight_decay", "momentum"):
        return f"pass --{key.replace('_', '-')} to override it"
    return f"use another checkpoint, or {NO_OPTIMIZER}"


def innermost(optimizer: Any) -> Any:
    """An optimizer without the wrappers of accelerate and Lightning, which have its groups and state and another class."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
