"""Optimizer state to preconditioner, threshold and next update; one file per family."""

from __future__ import annotations

from curvcli.errors import UnsupportedError
from curvcli.optimizers.adam import Adam, NAdam
from curvcli.optimizers.adaptive import Adagrad, RMSprop
from curvcli.optimizers.base import OptimizerView, Rule
from curvcli.optimizers.refused import refuse
from curvcli.optimizers.sgd import SGD

RULES: tuple[Rule, ...] = (Adam(), NAdam(), SGD(), RMSprop(), Adagrad())


def rule_for(view: OptimizerView) -> Rule:
    """The rule of the optimizer that wrote this state. Raises UnsupportedError, with what was seen."""
    refuse(view)
    for rule in RULES:
        if rule.matches(view):
            return rule
    options = sorted({key for group in view.groups for key in group.options})
    raise UnsupportedError(
        f"no rule for optimizer {view.name or 'of unknown name'} with state {sorted(view.keys)} and options {options}",
        hint="name it with --optimizer, or pass --optimizer none",
    )
