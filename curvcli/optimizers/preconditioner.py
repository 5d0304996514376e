"""The preconditioner and the threshold of a whole model, any mix of parameter groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from curvcli.curvature.balls import Ball
from curvcli.curvature.gathering import sliced, sliced_ball
from curvcli.curvature.inverse_root import InverseRoot, ModelRoot, Multiple
from curvcli.curvature.scratch import Put
from curvcli.curvature.shards import Shards
from curvcli.documents import Finding
from curvcli.errors import InputError, UnsupportedError, UsageError
from curvcli.optimizers import rule_for
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule, State, fetched, innermost
from curvcli.optimizers.given import lead as lead_of
from curvcli.optimizers.muon import beside, unstacked
from curvcli.optimizers.options import scrutinise
from curvcli.optimizers.projected import class_name
from curvcli.optimizers.said import of_groups, of_moments

Kind = Literal["checkpoint", "estimated", "none"]


@dataclass(frozen=True)
class Preconditioner:
    """P of a whole model: the metric in which an optimizer sees curvature.

    With per-parameter thresholds T_p = (2/lr_p - wd_p)/g_p(-1), instability along an eigenvector
    of period two begins where the largest eigenvalue of (T P)^(-1/2) H (T P)^(-1/2) is 1, whatever
    the mix of groups: that eigenvalue is rho. `root` is that of T_p P_p / T with T, `threshold`,
    that of the largest group, so that operator eigenvalues are lambda and rho = lambda / threshold.

    Where clipping leaves a share s of each gradient, a move d of the weights changes what the optimizer is given by s H d,
    but for the part along the gradient, which is less: the threshold is 1/s times as high, and rho s times as large.

    Parameters whose normalised step is steepest in a norm (Muon's matrices, all of Lion's) have a ball of it instead, and no
    part in P, lambda and rho: those are of the other parameters, with these held still.

    Attributes:
        root: inverse root of the preconditioner, of the parameters that move and have no ball.
        balls: by name, with the radius of lr_p/lr steps, lr being `ball_lr`; empty for most optimizers.
        ball_lr: learning rate of the largest group among them, None when unknown or where there are none.
        decay: coupled weight decay by name, which belongs to the Hessian.
        direction: the optimizer's own step direction lr_p/lr P^(-1) m by name, or lr_p/lr times the steepest one along m;
            None without state.
        threshold: of lambda, of the largest group with a P; None without a learning rate, or such a group.
        lr: learning rate of the largest group that moves, None when unknown.
        idle: dimensions along which nothing moves: of a diagonal P, entries that never got a gradient (second moment
            exactly 0).
        left_out: parameters in no group, without state, or whose second moment is 0 throughout.
        ascends: the optimizer maximises, so the curvature in this preconditioner is that of minus the loss.
        doubts: options and state that no rule knows and that may change the update: no verdict can rest on it.
        findings: what the report has to say of the groups.
        relative: T_p / T by name, that the rule's own P_p is in `root` times; empty where that is 1 throughout.
        clip: s, which `threshold` counts with; None where it is not known, and counts for nothing.
    """

    kind: Kind
    name: str
    root: ModelRoot
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
    balls: Mapping[str, Ball] = field(default_factory=dict)
    ball_lr: float | None = None
    relative: Mapping[str, float] = field(default_factory=dict)
    clip: float | None = None

    @property
    def moving(self) -> frozenset[str]:
        """The parameters that move, in P's metric or in a norm."""
        return frozenset(self.root) | frozenset(self.balls)

    def aside(self, put: Put) -> Preconditioner:
        """With what `put` gives in the place of the direction, which is needed once, and of P where that is diagonal."""
        step = self.direction
        if step is not None:
            step = dict(zip(step, put(list(step.values())), strict=True))
        return replace(self, root=self.root.aside(put), direction=step)

    def without(self, names: Collection[str]) -> Preconditioner:
        """With these parameters held still. Raises ValueError where none is left."""
        if not self.moving & set(names):
            return self
        left, balls = [n for n in self.root if n not in names], {n: b for n, b in self.balls.items() if n not in names}
        if not left and not balls:
            raise ValueError("an operator needs at least one parameter")
        return replace(self, root=self.root.restrict(left) if left else self.root.none(), balls=balls)


def identity(parameters: Mapping[str, Tensor], shards: Shards | None = None) -> Preconditioner:
    """The Hessian itself: no preconditioner and no threshold."""
    root = ModelRoot(dict.fromkeys(parameters, Multiple()), parameters, shards)
    return Preconditioner("none", "none", root, {}, None, None, None, {}, None)


def prepare(
    view: OptimizerView, parameters: Mapping[str, Tensor], *, kind: Kind = "checkpoint", shards: Shards | None = None
) -> Preconditioner:
    """Metric and threshold from optimizer state.

    Args:
        shards: of which slices are kept, of one parameter after the other, where processes divide them.

    Raises:
        InputError: a state tensor does not fit its parameter, or is not finite or negative.
        UnsupportedError: the optimizer has no rule, no threshold exists for it, or its options change its update.
        UsageError: every learning rate is 0, or one is negative, or clipping leaves no share between 0 and 1.
    """
    rule = rule_for(view)
    doubts = scrutinise(view, rule)
    view = rule.completed(view, parameters)
    frozen = _frozen(view, parameters)
    members = _members(view, parameters, frozen, rule)
    balls, ball_lr = _balls(rule, view, members, parameters)
    lead_name, lead = _lead(view, members, parameters)
    lr = _rate(rule, view, lead_name, lead)
    ascends = _ascends([group for _, group in members])
    if ascends and not view.vouched:
        doubts = (*doubts, "option maximize=True, of a loss that may be minus the one measured")
    preconditioned = [(name, group) for name, group in members if name not in balls]
    reference = (
        _threshold(rule, view, *_lead(view, preconditioned, parameters)) if lr is not None and preconditioned else None
    )
    roots: dict[str, InverseRoot] = {}
    direction: dict[str, Tensor] = {}
    decay: dict[str, float] = {}
    relatives: dict[str, float] = {}
    idle = 0
    preconditions = False
    for name, group in members:
        entry, parameter = view.state.get(name, {}), parameters[name]
        if name in balls:
            if lr is not None and (m := rule.momentum(group, entry)) is not None:
                ball = balls[name].scaled((ball_lr or lr) / lr)
                direction[name] = _held(ball.steepest(m.to(parameter)), name, shards)
            continue
        root = _root(rule, group, entry, name, parameter)
        relative = _threshold(rule, view, name, group) / reference if reference is not None else 1.0
        plain = isinstance(root, Multiple)
        preconditions = preconditions or not plain
        if rule.gradient_at(group, entry, parameter) is not None:
            raise InputError(
                f"{rule.name(view)} is in evaluation mode: the weights are not those at which it takes gradients",
                hint="call optimizer.train() first",
            )
        idle += root.idle
        if root.idle == parameter.numel() and not plain:
            continue  # a tensor that never moved has no curvature to report, and 0 would read as safe
        roots[name], relatives[name] = sliced(root.scaled(relative), name, shards), relative
        if not rule.decoupled(group, view.name):
            decay[name] = group.number("weight_decay", 0.0)
        # An estimate's is no step that the optimizer takes.
        m = rule.momentum(group, entry) if entry and kind == "checkpoint" else None
        if m is not None and lr is not None:
            direction[name] = _held(root.solve(m.to(parameter)) * (rule.lr(group, entry) / lr), name, shards)
    if not roots and not balls:
        raise InputError(
            "the second moment of every weight is 0",
            hint="the optimizer state is damaged or was saved before its first step: use another checkpoint",
        )
    clip, said = _clip(view, kind, decay)
    return Preconditioner(
        kind=kind if preconditions else "none",
        name=rule.name(view),
        root=ModelRoot(roots, parameters, shards),
        decay=decay,
        direction=direction if direction and len(direction) == len(roots) + len(balls) else None,
        threshold=reference / clip if reference is not None and clip else reference,
        lr=lr,
        options=lead.options,
        step=view.step if kind == "checkpoint" else None,
        idle=idle,
        left_out=tuple(n for n in parameters if n not in roots and n not in balls and n not in frozen),
        ascends=ascends,
        doubts=doubts,
        findings=(*view.findings, *of_groups(view, frozen, ascends), *of_moments(view), *rule.findings(view), *said),
        balls={name: sliced_ball(ball, name, shards) for name, ball in balls.items()},
        ball_lr=ball_lr,
        relative=relatives,
        clip=clip,
    )


def _lead(view: OptimizerView, members: Sequence[tuple[str, Group]], parameters: Mapping[str, Tensor]) -> tuple[str, Group]:
    """A parameter and the group of the largest one among these, which are not none."""
    largest = lead_of(view, {name: parameters[name] for name, _ in members})
    return next((name, group) for name, group in members if group is largest)


def _rate(rule: Rule, view: OptimizerView, name: str, group: Group) -> float | None:
    return rule.lr(group, view.state.get(name, {})) if group.options.get("lr") is not None else None


def _held(tensor: Tensor, name: str, shards: Shards | None) -> Tensor:
    return tensor if shards is None else shards.part(name, tensor)


def _balls(
    rule: Rule, view: OptimizerView, members: Sequence[tuple[str, Group]], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Ball], float | None]:
    """The balls of the parameters whose step is steepest in a norm, and the learning rate that their radii are over.

    Raises UsageError where one of their learning rates is not above 0.
    """
    found = {name: rule.ball(group, view.state.get(name, {}), parameters[name]) for name, group in members}
    own = [(name, group) for name, group in members if found[name] is not None]
    if not own:
        return {}, None
    lr = _rate(rule, view, *_lead(view, own, parameters))
    balls: dict[str, Ball] = {}
    for name, group in own:
        rate, ball = _rate(rule, view, name, group), found[name]
        if rate is not None and not rate > 0:
            raise UsageError(f"the learning rate of a parameter group is {rate}", hint="pass the one in force with --lr")
        if ball is not None:
            balls[name] = ball.scaled(rate / lr) if rate is not None and lr is not None else ball
    return balls, lr


def _frozen(view: OptimizerView, parameters: Mapping[str, Tensor]) -> set[str]:
    """Parameters of groups at learning rate 0. Raises UsageError where all groups are."""
    lrs = [group.lr for group in view.groups if group.names]
    if lrs and all(lr == 0 for lr in lrs):
        raise UsageError("the learning rate of every parameter group is 0", hint="pass the one in force with --lr")
    return {name for group in view.groups if group.lr == 0 for name in group.names if name in parameters}


def _members(
    view: OptimizerView, parameters: Mapping[str, Tensor], frozen: Collection[str], rule: Rule
) -> list[tuple[str, Group]]:
    """The parameters that move, with their groups. Raises InputError where there is none, or the state of one is damaged."""
    members = [
        (name, group)
        for group in view.groups
        for name in group.names
        if name in parameters and name not in frozen and (not view.state or name in view.state)
    ]
    if not members:
        raise InputError("the optimizer moves no parameter of this model", hint="check that model and state belong together")
    keys: dict[int, set[str]] = {}
    for name, group in members:
        keys.setdefault(id(group), set()).update(view.state.get(name, {}))
    for name, group in members:
        entry = view.state.get(name, {})
        if missing := sorted(keys[id(group)] - set(entry) - rule.by_shape):
            raise InputError(
                f"optimizer state of {name} has no {missing[0]!r}, which other parameters of its group have",
                hint="the optimizer state is damaged: use another checkpoint",
            )
        _check(name, parameters[name], entry, rule)
    return members


def _threshold(rule: Rule, view: OptimizerView, name: str, group: Group) -> float:
    """(2/lr - wd) / g(-1) of one parameter (arXiv 2207.14484). Raises InputError or UsageError where there is none."""
    entry = view.state.get(name, {})
    own = rule.lr(group, entry)
    wd = rule.decay(group, entry) if rule.decoupled(group, view.name) else 0.0
    if not own > 0:
        raise UsageError(f"the learning rate of a parameter group is {own}", hint="pass the one in force with --lr")
    transfer = rule.transfer(group, entry)
    if not 0 < transfer < float("inf"):
        raise InputError(
            f"the momentum of {name} has the transfer function {transfer:g}",
            hint=f"use another checkpoint, or {NO_OPTIMIZER}",
        )
    edge = rule.edge(own, wd, transfer)
    if not edge > 0:
        raise UsageError(
            f"at learning rate {own:g} the weight decay {wd:g} alone diverges", hint="check --lr and --weight-decay"
        )
    return edge


def _clip(view: OptimizerView, kind: Kind, decay: Mapping[str, float]) -> tuple[float | None, list[Finding]]:
    """The share of a gradient that the threshold counts with, and why not. Raises UsageError where it is no share."""
    if view.clip is None:
        return None, []
    if not 0 < view.clip <= 1:
        raise UsageError(
            f"clipping leaves {view.clip:g} of a gradient", hint="a share is above 0, and 1 where nothing is clipped"
        )
    if kind != "checkpoint":  # an estimate is made of gradients that nobody clips
        return None, []
    if view.clip == 1 or not any(decay.values()):
        return view.clip, []
    message = (
        "weight decay is added to what clipping leaves of a gradient: rho does not count with clipping, and is too high"
    )
    return None, [Finding(code="clipping-not-counted", severity="warning", message=message)]


def _ascends(groups: Sequence[Group]) -> bool:
    """Whether the optimizer maximises. Raises UnsupportedError where groups differ in it."""
    directions = {group.flag("maximize") for group in groups}
    if len(directions) > 1:
        raise UnsupportedError(
            "some parameter groups maximise and others minimise: their curvature is not symmetric", hint=NO_OPTIMIZER
        )
    return directions.pop()


def _root(rule: Rule, group: Group, entry: Mapping[str, Any], name: str, parameter: Tensor) -> InverseRoot:
    root = rule.preconditioner(group, entry).to(parameter)
    if not root.positive:
        raise InputError(
            f"the preconditioner of {name} is not positive: eps is {group.options.get('eps')!r}",
            hint="check --eps and --betas, or use another checkpoint",
        )
    return root


def live(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor]
) -> OptimizerView:
    """View of an optimizer in memory, by the identity of its parameters; of Muon and Adam beside each other, as one.

    torch's own classes are what they say, and read no options of a group but their own.

    Raises:
        UnsupportedError: there are several optimizers, and not Muon and Adam.
        UsageError: there is none.
    """
    if not isinstance(optimizer, Sequence):
        return _live(optimizer, parameters)
    views = [_live(each, parameters) for each in optimizer]
    if not views:
        raise UsageError("an empty list of optimizers was given", hint="pass the optimizer, or None")
    return views[0] if len(views) == 1 else beside(views)


def _live(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> OptimizerView:
    names, optimizer = {id(p): n for n, p in parameters.items()}, innermost(optimizer)
    mode = getattr(optimizer, "adam_w_mode", None)  # apex' and DeepSpeed's fused Adam, which say it nowhere else
    extra = {} if mode is None else {"adam_w_mode": bool(mode)}
    # pytorch_optimizer's, which no group of it says: lambda's sign hangs on it.
    if getattr(optimizer, "maximize", False) is True:
        extra["maximize"] = True
    groups = tuple(
        Group(
            tuple(names[id(p)] for p in group["params"] if id(p) in names),
            {**extra, **{k: v for k, v in group.items() if k != "params"}},
        )
        for group in optimizer.param_groups
    )
    state = {names[id(p)]: entry for p, entry in optimizer.state.items() if id(p) in names and entry}
    state = dict(unstacked([(group.names, group.options) for group in groups], fetched(state)))
    kind = type(optimizer)
    return OptimizerView(groups, state, class_name(kind), vouched=f"{kind.__module__}.".startswith("torch.optim."))


def _check(name: str, parameter: Tensor, entry: State, rule: Rule) -> None:
    known = rule.state | rule.extra
    for key, value in entry.items():
        if key in rule.counts and isinstance(value, Tensor) and value.numel() == 1:
            continue
        if not isinstance(value, Tensor):
            if key in known - rule.counts - rule.shaped_otherwise and (value is not None or key not in rule.unset):
                raise InputError(
                    f"optimizer state {key!r} of {name} is {str(value)[:40]}, no tensor",
                    hint="the optimizer state is damaged: use another checkpoint",
                )
            continue
        if key in known - rule.shaped_otherwise and value.shape != parameter.shape:
            raise InputError(
                f"optimizer state {key!r} of {name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}",
                hint="the state belongs to another model or another order of parameters",
            )
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"optimizer state {key!r} of {name} holds NaN or inf",
                hint="the run has already diverged or the file is damaged: use an earlier checkpoint",
            )
