"""Hyperparameters that the user gives in place of the checkpoint's, so that no group loses what it had of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from curvcli.documents import Finding
from curvcli.errors import InputError, UsageError
from curvcli.optimizers import rule_for
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule


def at_gradient(
    view: OptimizerView, parameters: Mapping[str, Tensor], put: Callable[[str, Tensor], object] | None = None
) -> OptimizerView:
    """The view as its rule completes it, with the weights moved, in place, to where the optimizer takes gradients.

    Most take them at the weights that are stored; Schedule-Free does where it was in training mode.

    Args:
        put: puts a tensor in the place of a parameter, where that takes more than to copy it.

    Raises:
        CurvError: no rule is known for the optimizer, or it does not say.
    """
    rule, groups = rule_for(view), []
    view = rule.completed(view, parameters)
    for group in view.groups:
        moved = False
        for name in group.names:
            where = rule.gradient_at(group, view.state[name], parameters[name]) if name in view.state else None
            if where is not None:
                put(name, where) if put else parameters[name].data.copy_(where)
                moved = True
        groups.append(Group(group.names, {**group.options, "train_mode": True}) if moved else group)
    return replace(view, groups=tuple(groups))


def lead(view: OptimizerView, parameters: Mapping[str, Tensor]) -> Group | None:
    """The group that a single learning rate is quoted of: the largest, in entries, of those that move.

    A group at learning rate 0 is frozen. Where all are, or none has one, the largest of all; None without parameters.
    """
    sizes = [sum(parameters[n].numel() for n in group.names if n in parameters) for group in view.groups]
    moving = [size if group.lr else 0 for group, size in zip(view.groups, sizes, strict=True)]
    chosen = moving if any(moving) else sizes
    return view.groups[max(range(len(chosen)), key=chosen.__getitem__)] if any(chosen) else None


def override(view: OptimizerView, **options: Any) -> OptimizerView:
    """The view with hyperparameters replaced in every group; None leaves the checkpoint's.

    Raises:
        UsageError: the optimizer has no such option, or groups differ in one and a single value would make them alike.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if given:
        check_known(rule_for(view), given)
    for key in given:
        own = {_plain(g.options[key]) for g in view.groups if g.names and g.lr != 0 and g.options.get(key) is not None}
        if len(own) > 1:
            raise UsageError(
                f"--{key.replace('_', '-')} would give one value to parameter groups that have {' and '.join(sorted(own))}",
                hint="leave it out: each group keeps its own",
            )
    return replace(view, groups=tuple(Group(g.names, {**g.options, **given}) for g in view.groups))


def check_known(rule: Rule, given: Iterable[str]) -> None:
    """Raises UsageError where the rule has no such option."""
    if unknown := sorted(set(given) - rule.options):
        option = unknown[0].replace("_", "-")
        raise UsageError(f"{sorted(rule.names)[0]} has no {option}", hint=f"leave --{option} out")


def scaled(view: OptimizerView, parameters: Mapping[str, Tensor], lr: float | None) -> OptimizerView:
    """All learning rates times one factor, by which that of the lead group becomes `lr`. None leaves them.

    Raises:
        UsageError: `lr` is not above 0.
        InputError: the groups' ratios are not in the checkpoint.
    """
    if lr is None:
        return view
    if not 0 < lr < float("inf"):
        raise UsageError(f"the learning rate given is {lr}", hint="pass the one in force, above 0")
    reference = lead(view, parameters)
    return view if reference is None else _rescaled(view, lr, view.groups.index(reference))


def at_logged(view: OptimizerView, lr: float) -> OptimizerView:
    """The view of a finished schedule, at the last learning rate logged, which trainers take from the first group."""
    return _rescaled(view, lr, 0)


def _rescaled(view: OptimizerView, lr: float, reference: int) -> OptimizerView:
    before = [group.lr for group in view.groups]
    known = [rate for rate in before if rate is not None]
    source = "lr"
    if not any(known):
        before, source = [_initial(group) for group in view.groups], "initial_lr"
        if any(rate is None for rate in before) or not any(before):
            if not _alike(view):
                raise InputError(
                    "all learning rates in the checkpoint are 0 or missing, and nothing in it says how those of its "
                    f"{len(before)} parameter groups differed",
                    hint=f"use a checkpoint from before the schedule ended, or {NO_OPTIMIZER}",
                )
            before = [1.0] * len(before)
    elif len(known) < len(before):
        raise InputError("some parameter groups have no learning rate", hint=f"use another checkpoint, or {NO_OPTIMIZER}")
    own = before[reference]
    if not own:
        raise InputError(
            f"the parameter group whose learning rate {lr:g} is has {source} {own} in the checkpoint",
            hint=f"pass the largest group's with --lr, or {NO_OPTIMIZER}",
        )
    moved = [lr * (rate or 0.0) / own for rate in before]
    groups = tuple(Group(group.names, {**group.options, "lr": rate}) for group, rate in zip(view.groups, moved, strict=True))
    if len(set(moved)) == 1:
        return replace(view, groups=groups)
    finding = Finding(
        code="scaled-rates",
        severity="info",
        message=f"{lr:g} is taken for the parameter group that has {source} {own:g}; the others keep their ratio to it: "
        f"{min(moved):g} to {max(moved):g} in force",
    )
    return replace(view, groups=groups, findings=(*view.findings, finding))


def _initial(group: Group) -> float | None:
    return None if group.options.get("initial_lr") is None else group.number("initial_lr")


def _alike(view: OptimizerView) -> bool:
    """Whether groups look as if nothing but the weight decay told them apart: then they had one learning rate."""
    decays = [_plain(group.options.get("weight_decay")) for group in view.groups]
    return len(set(decays)) == len(decays) <= 2


def _plain(value: Any) -> str:
    """A hyperparameter for comparison and for people."""
    number: Callable[[Any], float] = lambda part: float(f"{float(part):.9g}")  # noqa: E731
    try:
        return ",".join(f"{number(v):g}" for v in value) if isinstance(value, (tuple, list)) else f"{number(value):g}"
    except (TypeError, ValueError, RuntimeError):
        return str(value)[:40]
