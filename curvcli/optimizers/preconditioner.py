"""The preconditioner and the threshold of a whole model, any mix of parameter groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from curvcli.curvature.problem import Problem
from curvcli.documents import Finding
from curvcli.errors import InputError, UnsupportedError, UsageError
from curvcli.optimizers import rule_for
from curvcli.optimizers.adam import Adam
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule
from curvcli.optimizers.given import lead as lead_of
from curvcli.optimizers.options import scrutinise

Kind = Literal["checkpoint", "estimated", "none"]

_COUNTS = {"step", "mu_product"}
_MAY_BE_NONE = {"momentum_buffer", "grad_avg", "max_exp_avg_sq"}  # of SGD before its first step; of an option that is off


@dataclass(frozen=True)
class Preconditioner:
    """P of a whole model: the metric in which an optimizer sees curvature.

    With per-parameter thresholds T_p = (2/lr_p - wd_p)/g_p(-1), instability along an eigenvector
    of period two begins where the largest eigenvalue of (T P)^(-1/2) H (T P)^(-1/2) is 1, whatever
    the mix of groups: that eigenvalue is rho. `scale` holds sqrt(T/(T_p P_p)) with T, `threshold`,
    that of the largest group, so that operator eigenvalues are lambda and rho = lambda / threshold.

    Attributes:
        scale: root of the inverse preconditioner by parameter name, in its shape; 0 where nothing moves.
        decay: coupled weight decay by name, which belongs to the Hessian.
        direction: the optimizer's own step direction lr_p/lr P^(-1) m by name, or None without state.
        threshold: of lambda; None without a learning rate.
        lr: learning rate of the largest group that moves, None when unknown.
        idle: entries of parameters that never got a gradient (second moment exactly 0).
        left_out: parameters in no group, without state, or whose second moment is 0 throughout.
        ascends: the optimizer maximises, so the curvature in this preconditioner is that of minus the loss.
        doubts: options and state that no rule knows and that may change the update: no verdict can rest on it.
        findings: what the report has to say of the groups.
    """

    kind: Kind
    name: str
    scale: Mapping[str, Tensor]
    decay: Mapping[str, float]
    direction: Mapping[str, Tensor] | None
    threshold: float | None
    lr: float | None
    options: Mapping[str, Any]
    step: int | None
    idle: int = 0
    left_out: tuple[str, ...] = ()
    ascends: bool = False
    doubts: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def identity(parameters: Mapping[str, Tensor]) -> Preconditioner:
    """The Hessian itself: no preconditioner and no threshold."""
    ones = {n: torch.ones_like(p) for n, p in parameters.items()}
    return Preconditioner("none", "none", ones, {}, None, None, None, {}, None)


def prepare(view: OptimizerView, parameters: Mapping[str, Tensor], *, kind: Kind = "checkpoint") -> Preconditioner:
    """Metric and threshold from optimizer state.

    Raises:
        InputError: a state tensor does not fit its parameter, or is not finite or negative.
        UnsupportedError: the optimizer has no rule, no threshold exists for it, or its options change its update.
        UsageError: every learning rate is 0, or one is negative.
    """
    rule = rule_for(view)
    doubts = scrutinise(view, rule)
    stateful = bool(view.state)
    lrs = [group.lr for group in view.groups if group.names]
    if lrs and all(lr == 0 for lr in lrs):
        raise UsageError("the learning rate of every parameter group is 0", hint="pass the one in force with --lr")
    frozen = {name for group in view.groups if group.lr == 0 for name in group.names if name in parameters}
    members = [
        (name, group)
        for group in view.groups
        for name in group.names
        if name in parameters and name not in frozen and (not stateful or name in view.state)
    ]
    if not members:
        raise InputError("the optimizer moves no parameter of this model", hint="check that model and state belong together")
    keys: dict[int, set[str]] = {}
    for name, group in members:
        keys.setdefault(id(group), set()).update(view.state.get(name, {}))
    for name, group in members:
        entry = view.state.get(name, {})
        if missing := sorted(keys[id(group)] - set(entry)):
            raise InputError(
                f"optimizer state of {name} has no {missing[0]!r}, which other parameters of its group have",
                hint="the optimizer state is damaged: use another checkpoint",
            )
        _check(name, parameters[name], entry, rule.state | rule.extra)
    moving = {name: parameters[name] for name, _ in members}
    largest = lead_of(view, moving)
    lead_name, lead = next((name, group) for name, group in members if group is largest)
    state = view.state.get(lead_name, {})
    lr = rule.lr(lead, state) if lead.options.get("lr") is not None else None

    def threshold(name: str, group: Group) -> float:
        entry = view.state.get(name, {})
        own = rule.lr(group, entry)
        wd = group.number("weight_decay", 0.0) if rule.decoupled(group, view.name) else 0.0
        if not own > 0:
            raise UsageError(f"the learning rate of a parameter group is {own}", hint="pass the one in force with --lr")
        if not 2 / own > wd:
            raise UsageError(
                f"learning rate {own:g} times weight decay {wd:g} is 2 or more: the decay alone diverges",
                hint="check --lr and --weight-decay",
            )
        transfer = rule.transfer(group, entry)
        if not 0 < transfer < float("inf"):
            raise InputError(
                f"the momentum of {name} has the transfer function {transfer:g}",
                hint=f"use another checkpoint, or {NO_OPTIMIZER}",
            )
        return (2 / own - wd) / transfer

    directions = {group.flag("maximize") for _, group in members}
    if len(directions) > 1:
        raise UnsupportedError(
            "some parameter groups maximise and others minimise: their curvature is not symmetric", hint=NO_OPTIMIZER
        )
    ascends = directions.pop()
    if ascends and not view.vouched:
        doubts = (*doubts, "option maximize=True, of a loss that may be minus the one measured")
    reference = threshold(lead_name, lead) if lr is not None else None
    scale: dict[str, Tensor] = {}
    direction: dict[str, Tensor] = {}
    decay: dict[str, float] = {}
    idle = 0
    for name, group in members:
        entry = view.state.get(name, {})
        parameter = parameters[name]
        preconditioner = rule.preconditioner(group, entry)
        relative = threshold(name, group) / reference if reference is not None else 1.0
        if preconditioner is None:
            scale[name] = torch.full_like(parameter, relative**-0.5)
        else:
            preconditioner = preconditioner.to(parameter)
            root = (preconditioner * relative).rsqrt()
            never = _second_moment(entry) == 0
            # An entry that never had a gradient divides by eps alone until its first one comes; the
            # optimizer has not moved along it, and its curvature would be 1/eps times anything.
            idle += int(never.sum())
            if not bool(((preconditioner > 0) & torch.isfinite(preconditioner) | never.to(preconditioner.device)).all()):
                raise InputError(
                    f"the preconditioner of {name} is not positive: eps is {group.options.get('eps')!r}",
                    hint="check --eps and --betas, or use another checkpoint",
                )
            if bool(never.all()):
                continue  # a tensor that never moved has no curvature to report, and 0 would read as safe
            scale[name] = torch.where(never.to(parameter.device), torch.zeros_like(root), root)
        if not rule.decoupled(group, view.name):
            decay[name] = group.number("weight_decay", 0.0)
        m = rule.momentum(group, entry) if entry else None
        if m is not None and lr is not None:
            u = m.to(parameter) if preconditioner is None else m.to(parameter) / preconditioner
            direction[name] = u * (rule.lr(group, entry) / lr)
    if not scale:
        raise InputError(
            "the second moment of every weight is 0",
            hint="the optimizer state is damaged or was saved before its first step: use another checkpoint",
        )
    return Preconditioner(
        kind="none" if rule.preconditioner(members[0][1], view.state.get(members[0][0], {})) is None else kind,
        name=rule.name(view),
        scale=scale,
        decay=decay,
        direction=direction if len(direction) == len(scale) and kind == "checkpoint" else None,
        threshold=reference,
        lr=lr,
        options=lead.options,
        step=view.step if kind == "checkpoint" else None,
        idle=idle,
        left_out=tuple(n for n in parameters if n not in scale and n not in frozen),
        ascends=ascends,
        doubts=doubts,
        findings=(*view.findings, *_said(view, rule, frozen, ascends)),
    )


def estimate(problem: Problem, options: Mapping[str, Any]) -> OptimizerView:
    """Adam's state as the shard's gradients suggest it: v is the mean over batches of squared gradients.

    A stand-in for state that was not saved: the true v averages the squares of (clipped) gradients
    of training batches, whose size differs, over past weights. Step is taken as large.
    """
    parameters = problem.parameters
    names, tensors = list(parameters), list(parameters.values())
    squares = [torch.zeros_like(p) for p in tensors]
    means = [torch.zeros_like(p) for p in tensors]
    for i, weight in enumerate(problem.weights):
        parts = torch.autograd.grad(problem.batch_loss(i), tensors, allow_unused=True)
        for square, mean, part in zip(squares, means, parts, strict=True):
            if part is not None:
                square.add_(part.square(), alpha=weight)
                mean.add_(part, alpha=weight)
    state = {n: {"step": 1e9, "exp_avg": m, "exp_avg_sq": s} for n, m, s in zip(names, means, squares, strict=True)}
    return OptimizerView((Group(tuple(names), options),), state, "AdamW")


def live(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> OptimizerView:
    """View of an optimizer in memory, by the identity of its parameters.

    torch's own classes are what they say, and read no options of a group but their own.
    """
    names = {id(p): n for n, p in parameters.items()}
    mode = getattr(optimizer, "adam_w_mode", None)  # apex' and DeepSpeed's fused Adam, which say it nowhere else
    extra = {} if mode is None else {"adam_w_mode": bool(mode)}
    groups = tuple(
        Group(
            tuple(names[id(p)] for p in group["params"] if id(p) in names),
            {**extra, **{k: v for k, v in group.items() if k != "params"}},
        )
        for group in optimizer.param_groups
    )
    state = {names[id(p)]: entry for p, entry in optimizer.state.items() if id(p) in names and entry}
    kind = type(optimizer)
    return OptimizerView(groups, state, kind.__name__, vouched=kind.__module__.startswith("torch.optim."))


def _said(view: OptimizerView, rule: Rule, frozen: set[str], ascends: bool) -> list[Finding]:
    found = []
    if frozen:
        groups = sum(group.lr == 0 and bool(group.names) for group in view.groups)
        found.append(
            Finding(
                code="frozen-groups",
                severity="info",
                message=f"{groups} of {len(view.groups)} parameter groups have learning rate 0: their {len(frozen)} tensors "
                "are left out as frozen",
            )
        )
    if ascends:
        found.append(
            Finding(
                code="ascends",
                severity="warning",
                message="the optimizer maximises (maximize=True): the curvature is that of minus the loss, which is right "
                "where it climbs the very loss that is measured",
            )
        )
    says = {"decoupled_weight_decay", "adam_w_mode", "correct_bias", "t_alpha"}
    unsaid = [group for group in view.groups if says.isdisjoint(group.options)]
    if view.name is None and type(rule) is Adam and any(g.number("weight_decay", 0.0) for g in unsaid):
        found.append(
            Finding(
                code="decay-assumed",
                severity="info",
                message="the checkpoint does not say whether weight decay is decoupled: it is taken as AdamW's; pass "
                "--optimizer adam where it is part of the gradient",
            )
        )
    return found


def _second_moment(entry: Mapping[str, Any]) -> Tensor:
    return next(entry[k] for k in ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum") if k in entry)  # type: ignore[no-any-return]


def _check(name: str, parameter: Tensor, entry: Mapping[str, Any], known: Collection[str]) -> None:
    for key, value in entry.items():
        if key in _COUNTS and isinstance(value, Tensor) and value.numel() == 1:
            continue
        if not isinstance(value, Tensor):
            if key in known and key not in _COUNTS and (value is not None or key not in _MAY_BE_NONE):
                raise InputError(
                    f"optimizer state {key!r} of {name} is {str(value)[:40]}, no tensor",
                    hint="the optimizer state is damaged: use another checkpoint",
                )
            continue
        if key in known and value.shape != parameter.shape:
            raise InputError(
                f"optimizer state {key!r} of {name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}",
                hint="the state belongs to another model or another order of parameters",
            )
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"optimizer state {key!r} of {name} holds NaN or inf",
                hint="the run has already diverged or the file is damaged: use an earlier checkpoint",
            )
