"""Optimizer state to preconditioner, threshold and next update; one file per family.

A family is a subclass of `base.Rule` in a file here and one line in RULES. One that no number is given for is a line in
`refused.REFUSED`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from curvcli.errors import UnsupportedError

if TYPE_CHECKING:
    from curvcli.optimizers.base import OptimizerView, Rule

# Rule by module and class, and the names that --optimizer takes for it. Not imported here: the command line lists the names,
# and importing torch for that takes seconds.
RULES: dict[str, tuple[str, ...]] = {
    "curvcli.optimizers.adam:Adam": ("Adam", "AdamW"),
    "curvcli.optimizers.adam:NAdam": ("NAdam",),
    "curvcli.optimizers.adam:RAdam": ("RAdam",),
    "curvcli.optimizers.adam:Adamax": ("Adamax",),
    "curvcli.optimizers.sgd:SGD": ("SGD",),
    "curvcli.optimizers.adaptive:RMSprop": ("RMSprop",),
    "curvcli.optimizers.adaptive:Adagrad": ("Adagrad",),
    "curvcli.optimizers.adaptive:Adadelta": ("Adadelta",),
    "curvcli.optimizers.adam_mini:AdamMini": ("AdamMini",),
    "curvcli.optimizers.ademamix:AdEMAMix": ("AdEMAMix",),
    "curvcli.optimizers.adafactor:Adafactor": ("Adafactor",),
    "curvcli.optimizers.galore:GaLoreAdamW": ("GaLoreAdamW",),
    "curvcli.optimizers.soap:SOAP": ("SOAP",),
    "curvcli.optimizers.shampoo:Shampoo": ("Shampoo",),
    "curvcli.optimizers.schedule_free:ScheduleFreeAdamW": ("AdamWScheduleFree",),
    "curvcli.optimizers.schedule_free:ScheduleFreeSGD": ("SGDScheduleFree",),
    "curvcli.optimizers.lion:Lion": ("Lion",),
    "curvcli.optimizers.muon:Muon": ("Muon",),
}


def optimizer_names() -> tuple[str, ...]:
    """Names that a user may give."""
    return tuple(name for names in RULES.values() for name in names)


def rules() -> tuple[Rule, ...]:
    """All rules."""
    found = []
    for place in RULES:
        module, _, name = place.partition(":")
        rule: Rule = getattr(import_module(module), name)()
        found.append(rule)
    return tuple(found)


def rule_named(name: str) -> Rule:
    """The rule of one of `optimizer_names`."""
    return next(rule for rule in rules() if name in rule.names)


def rule_for(view: OptimizerView) -> Rule:
    """The rule of the optimizer that wrote this state. Raises UnsupportedError, with what was seen."""
    from curvcli.optimizers.base import NO_OPTIMIZER
    from curvcli.optimizers.refused import refuse

    known_rules = rules()
    refuse(view, frozenset().union(*(rule.names for rule in known_rules)))
    fits = [rule for rule in known_rules if (rule.matches(view) if view.name is None else view.name in rule.names)]
    if not fits:
        options = sorted({key for group in view.groups for key in group.options})
        known = ", ".join(optimizer_names())
        raise UnsupportedError(
            f"no rule for optimizer {view.name or 'of unknown name'} with state {sorted(view.keys)} and options {options}",
            hint=f"name it with --optimizer where its update is one of {known}, or {NO_OPTIMIZER}",
        )
    # The state of one may be part of another's, as Adam's of NAdam's: whose is most of what is there.
    rule = max(fits, key=lambda fit: len((fit.state | fit.extra) & view.keys))
    if rule.state and not view.state:
        raise UnsupportedError(
            f"{rule.name(view)} has no state yet, so there is no preconditioner",
            hint="measure after its first step, or pass --optimizer none (in Python optimizer=None)",
        )
    return rule


def second_moments() -> tuple[str, ...]:
    """State entries that average or sum squared gradients entry by entry, of any optimizer."""
    return tuple(dict.fromkeys(rule.second for rule in rules() if rule.second))


def averages() -> tuple[tuple[str, str], ...]:
    """State entries of two moments of the same gradients, averaged with the group's betas, of any optimizer."""
    return tuple(dict.fromkeys(rule.averages for rule in rules() if rule.averages))


def shaped_otherwise() -> frozenset[str]:
    """State entries whose shape is not the parameter's, of any optimizer."""
    return frozenset(key for rule in rules() for key in rule.shaped_otherwise)
