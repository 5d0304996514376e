"""Optimizer state to preconditioner, threshold and next update; one file per family."""

from __future__ import annotations

from curvcli.errors import UnsupportedError
from curvcli.optimizers.adam import Adam, NAdam
from curvcli.optimizers.adaptive import Adagrad, RMSprop
from curvcli.optimizers.base import NO_OPTIMIZER, OptimizerView, Rule
from curvcli.optimizers.refused import refuse
from curvcli.optimizers.sgd import SGD

# NAdam before Adam, whose state is a part of NAdam's.
RULES: tuple[Rule, ...] = (NAdam(), Adam(), SGD(), RMSprop(), Adagrad())


def rule_for(view: OptimizerView) -> Rule:
    """The rule of the optimizer that wrote this state. Raises UnsupportedError, with what was seen."""
    refuse(view)
    for rule in RULES:
        if view.name not in rule.names if view.name is not None else not rule.matches(view):
            continue
        if rule.state and not view.state:
            raise UnsupportedError(
                f"{rule.name(view)} has no state yet, so there is no preconditioner",
                hint="measure after its first step, or pass --optimizer none (in Python optimizer=None)",
            )
        return rule
    options = sorted({key for group in view.groups for key in group.options})
    raise UnsupportedError(
        f"no rule for optimizer {view.name or 'of unknown name'} with state {sorted(view.keys)} and options {options}",
        hint=f"name it with --optimizer where its update is one of {', '.join(NAMES)}, or {NO_OPTIMIZER}",
    )


NAMES = ("Adam", "AdamW", "NAdam", "SGD", "RMSprop", "Adagrad")
