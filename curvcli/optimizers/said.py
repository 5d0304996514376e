"""What a report has to say of an optimizer's groups and of how its moments are stored."""

from __future__ import annotations

from curvcli.documents import Finding
from curvcli.errors import are, counted
from curvcli.optimizers.base import OptimizerView
from curvcli.optimizers.bitsandbytes import unseen


def of_groups(view: OptimizerView, frozen: set[str], ascends: bool) -> list[Finding]:
    """Of groups that are left out as frozen, and of an optimizer that maximises."""
    found = []
    if frozen:
        groups = sum(group.lr == 0 and bool(group.names) for group in view.groups)
        found.append(
            Finding(
                code="frozen-groups",
                severity="info",
                message=f"{groups} of {len(view.groups)} parameter groups have learning rate 0: their "
                f"{counted(len(frozen), 'tensor')} {are(len(frozen))} left out as frozen",
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
    return found


def of_moments(view: OptimizerView) -> list[Finding]:
    """Of second moments that 8 bits have rounded."""
    if (found := unseen(view.state)) is None:
        return []
    total, small = found
    message = (
        f"{total:,} second moments are stored in 8 bits, which rounds P by some percent, and {small:,} of them as 0 though "
        "their weights move: too small beside the largest of their block, and left out"
    )
    return [Finding(code="quantised-moments", severity="warning" if small else "info", message=message)]
