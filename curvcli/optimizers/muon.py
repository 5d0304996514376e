"""Muon, alone or for the matrices of a model whose other parameters have Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from curvcli.curvature.balls import Spectral
from curvcli.curvature.inverse_root import InverseRoot
from curvcli.documents import Finding
from curvcli.errors import InputError, UnsupportedError
from curvcli.optimizers.adam import Adam
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Options, Rule, State, scalar
from curvcli.optimizers.soap import SOAP

_VARIANTS = frozenset({"NorMuon", "SingleDeviceNorMuon", "NorMuonWithAuxAdam", "SingleDeviceNorMuonWithAuxAdam", "MuonH"})
_FLAGS = ("algorithm", "kind", "optimizer", "optim")  # options whose value may be "muon"
# What the radius is when the learning rate is adjusted to a matrix of so many rows and columns.
_RADII: Mapping[str, Callable[[int, int], float]] = MappingProxyType(
    {
        "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
        "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
        "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
    }
)


class Muon(Rule):
    """Jordan et al., kellerjordan.github.io/posts/muon: -lr r polar(m) for a matrix, steepest descent in its spectral norm.

    No Euclidean threshold exists for those matrices. Their edge is that of sharpness in the joint spectral norm, Z = lr S /
    (2 ||g||_dual) = 1 (arXiv 2603.05002), the dual norm being the sum of r times nuclear norms. r is what the step is scaled
    by: sqrt(max(1, rows/columns)), or as `adjust_lr_fn` says. What is left of the iteration by which Muon approximates polar
    factors, singular values between 0.7 and 1.2, is not counted, and neither is weight decay.

    Parameters with Adam's moments follow Adam, with P and threshold of their own.
    """

    names = _VARIANTS | {
        "Muon", "SingleDeviceMuon", "MuonWithAuxAdam", "SingleDeviceMuonWithAuxAdam", "DistMuon", "DistributedMuon",
        "MuonAdamW", "DistMuonAdamW",
    }  # fmt: skip
    extra = frozenset({"momentum_buffer", "second_momentum_buffer", "use_muon"}) | Adam.state | Adam.extra
    counts = frozenset({"step", "use_muon"})
    unset = Adam.unset
    by_shape = extra
    shaped_otherwise = frozenset({"second_momentum_buffer"})
    options = (
        frozenset({"momentum", "nesterov", "ns_steps", "ns_coefficients", "backend", "backend_steps", "adjust_lr_fn"})
        | {
            "use_muon",
            "wd",
            "adamw_betas",
            "adamw_eps",
            "adamw_wd",
            "adamw_lr_ratio",
            "beta2",
            "rank",
            "world_size",
            *_FLAGS,
        }
        | Adam.options
    )
    refusals = MappingProxyType({key: why for key, why in Rule.refusals.items() if key != "use_muon"})
    _adam = Adam()

    def name(self, view: OptimizerView) -> str:
        """Muon, or "Muon with AdamW" where some parameters follow that."""
        others = [g for g in view.groups if any(n in view.state and not _normalised(g, view.state[n]) for n in g.names)]
        if not others:
            return "Muon"
        return "Muon with AdamW" if all(self.decoupled(group, None) for group in others) else "Muon with Adam"

    def matches(self, view: OptimizerView) -> bool:
        """Whether a group says that it orthogonalises: `use_muon`, `ns_steps`, an algorithm of that name."""
        known = view.keys <= self.extra
        return known and any(
            orthogonalises(group) or any(_flag(view.state.get(n, {})) for n in group.names) for group in view.groups
        )

    def needed(self, group: Group, state: State) -> frozenset[str]:
        """The momentum of a matrix, or Adam's moments."""
        return frozenset({"momentum_buffer"}) if _normalised(group, state) else Adam.state

    def ball(self, group: Group, state: State, weight: Tensor) -> Spectral | None:
        """The spectral norm's, with the radius of the weight's shape. None where the parameter follows Adam.

        Raises:
            InputError: the weight is no matrix.
            UnsupportedError: how the learning rate is adjusted to the shape is not known.
        """
        if not _normalised(group, state):
            return None
        if weight.dim() < 2:
            raise InputError(
                f"Muon moves a parameter of shape {tuple(weight.shape)}, which is no matrix",
                hint="the state belongs to another model or another order of parameters",
            )
        return Spectral(_radius(group, weight))

    def preconditioner(self, group: Group, state: State) -> InverseRoot:
        """Adam's. Raises as it does."""
        return self._adam.preconditioner(_as_adam(group), state)

    def transfer(self, group: Group, state: State) -> float:
        """Adam's. Raises as it does."""
        return self._adam.transfer(_as_adam(group), state)

    def lr(self, group: Group, state: State) -> float:
        """The group's; for the parameters that follow Adam in a group of Muon's, times `adamw_lr_ratio`."""
        return group.number("lr") * (1.0 if _normalised(group, state) else group.number("adamw_lr_ratio", 1.0))

    def decay(self, group: Group, state: State) -> float:
        """Weight decay as the parameter's own optimizer has it, under any of its names."""
        own = group.number("weight_decay", group.number("wd", 0.0))
        return own if _normalised(group, state) else group.number("adamw_wd", own)

    def decoupled(self, group: Group, name: str | None) -> bool:
        """Always for matrices; as Adam's group says for others, and yes where it does not."""
        return self._adam.decoupled(group, None)

    def momentum(self, group: Group, state: State) -> Tensor:
        """The momentum buffer as stored, Nesterov's too, without the gradient that it adds; Adam's first moment."""
        return state["momentum_buffer"] if _normalised(group, state) else state["exp_avg"]  # type: ignore[no-any-return]

    def findings(self, view: OptimizerView) -> list[Finding]:
        """`muon-scale` where no option says how steps follow a matrix's shape, `muon-variant` where the class does more."""
        found = []
        matrices = [g for g in view.groups if any(n in view.state and _normalised(g, view.state[n]) for n in g.names)]
        if any("adjust_lr_fn" not in g.options and "adamw_betas" not in g.options for g in matrices):
            found.append(
                Finding(
                    code="muon-scale",
                    severity="info",
                    message="no option says how Muon's steps follow a matrix's shape: they are taken to be scaled by "
                    "sqrt(max(1, rows/columns)), as its author's and torch's are; Z follows that scale",
                )
            )
        if view.name in _VARIANTS or "second_momentum_buffer" in view.keys:
            found.append(
                Finding(
                    code="muon-variant",
                    severity="warning",
                    message=f"{view.name or 'this optimizer'} scales the orthogonalised update once more; it is measured as "
                    "Muon, and Z is approximate",
                )
            )
        return found


def _normalised(group: Group, state: State) -> bool:
    """Whether a parameter's step is orthogonalised, by what its state or its group says, else by its state's entries."""
    if "use_muon" in state:
        return _flag(state)
    if group.options.get("use_muon") is not None:
        return group.flag("use_muon")
    said = [group.options[key] for key in _FLAGS if isinstance(group.options.get(key), str)]
    if said:
        return any(word.lower() in ("muon", "normuon") for word in said)
    # What keeps a momentum alone and has options of SGD's or Lion's is no part of Muon.
    other = any(group.options.get(key) is not None for key in ("dampening", "betas"))
    return "exp_avg_sq" not in state and not other


def beside(views: Sequence[OptimizerView]) -> OptimizerView:
    """Muon's or SOAP's view and those of Adams for the other parameters, as one. Raises UnsupportedError for others."""
    names = [view.name or "one of unknown name" for view in views]
    leads = [family for family in (Muon.names, SOAP.names) if family & set(names)]
    if len(leads) != 1 or set(names) - leads[0] - Adam.names:
        raise UnsupportedError(
            f"there are {len(views)} optimizers ({', '.join(names)})",
            hint="pass one, or Muon or SOAP and the AdamW of the other parameters",
        )
    return OptimizerView(
        tuple(group for view in views for group in view.groups),
        {name: entry for view in views for name, entry in view.state.items()},
        next(name for name in names if name in leads[0]),
        vouched=all(view.vouched for view in views),
        findings=tuple(finding for view in views for finding in view.findings),
    )


def unstacked(groups: Sequence[tuple[Sequence[Any], Options]], state: Mapping[Any, State]) -> Mapping[Any, State]:
    """State by parameter where nanochat's MuonAdamW keeps that of a group on top of each other, with its first parameter.

    Args:
        groups: what each group's parameters are called, in order, and its options.
        state: by the same names.
    """
    found = dict(state)
    for names, options in groups:
        if "kind" not in options or not names or not orthogonalises(Group((), options)):
            continue
        entry = found.get(names[0], {})
        stacks = {key: value for key, value in entry.items() if isinstance(value, Tensor) and value.dim() > 2}
        alone = not any(name in found for name in names[1:])
        if not alone or not stacks or any(len(stack) != len(names) for stack in stacks.values()):
            continue
        rest = {key: value for key, value in entry.items() if key not in stacks}
        found |= {name: {**rest, **{key: stack[k] for key, stack in stacks.items()}} for k, name in enumerate(names)}
    return found


def orthogonalises(group: Group) -> bool:
    """Whether a group's options say that it is Muon's. Raises InputError where one is damaged."""
    options = group.options
    said = any(isinstance(options.get(key), str) and options[key].lower() in ("muon", "normuon") for key in _FLAGS)
    return said or options.get("ns_steps") is not None or group.flag("use_muon")


def _flag(state: State) -> bool:
    return scalar(state.get("use_muon")) == 1


def _as_adam(group: Group) -> Group:
    """The group as Adam's, where it keeps the options of parameters that follow Adam beside Muon's own."""
    if "adamw_betas" not in group.options:
        return group
    own = {new: group.options[old] for old, new in (("adamw_betas", "betas"), ("adamw_eps", "eps")) if old in group.options}
    # Like transformers' it adds eps to the root before that is corrected.
    return Group(group.names, {**group.options, **own, "correct_bias": True})


def _radius(group: Group, weight: Tensor) -> float:
    options = group.options
    # Moonlight's has no other option that tells it from those of its author: "wd".
    usual = "match_rms_adamw" if "adamw_betas" in options and "wd" in options else "original"
    said = options.get("adjust_lr_fn") or usual
    if said not in _RADII:
        raise UnsupportedError(
            f"Muon's option adjust_lr_fn is {str(said)[:40]!r}: how it scales a step is not known (known are "
            f"{', '.join(_RADII)})",
            hint=NO_OPTIMIZER,
        )
    return _RADII[said](weight.shape[-2], weight.shape[-1])
