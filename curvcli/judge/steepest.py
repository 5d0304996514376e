"""What Z says, how far a normalised optimizer is from its edge: a reading, on a scale of its own, and no verdict."""

from __future__ import annotations

from collections.abc import Sequence

from curvcli.documents import Finding, ModelSteepest, Report, Severity, SteepestReading, SteepestStatus
from curvcli.judge.limits import certified, classify

# Full-batch Muon and Lion on convex quadratics settle at medians from 0.60 (momentum 0.9, exact polar factors) to 1.34
# (torch.optim.Muon, whose polar factors are shorter than 1): docs/explanation/method.md#normalised-optimizers.
EDGE_FROM, EDGE_TO = 0.6, 1.4


def read(z: float | None, status: SteepestStatus, *, early: bool = False) -> SteepestReading:
    """Past the edge, at it, or below it; S is a lower bound, so "past" is what can be relied on.

    Below proves nothing: with noise in its gradients training settles at 0.2 to 0.7, and S may be larger than was found.

    Args:
        z: None where there is none.
        early: the optimizer is young, and the momentum that it steps along is that of a few gradients.
    """
    if early:
        return "early"
    if z is None or status not in ("settled", "unsettled"):
        return "unresolved"
    # Also of an S that still rose: the true one is larger.
    if z > EDGE_TO:
        return "past"
    if status == "unsettled":
        return "unresolved"
    return "edge" if z >= EDGE_FROM else "below"


def alone(report: Report) -> bool:
    """Whether no parameter has a rho: all that move step along the steepest direction of a norm."""
    return report.steepest is not None and report.steepest.rest == 0


def words(found: ModelSteepest) -> str:
    """What the reading means, in a few words."""
    return {
        "past": "past the edge of normalised descent",
        "edge": "at the edge of normalised descent, where training on full batches settles",
        "below": "below the edge of normalised descent, which proves nothing",
        "early": "too early to say anything",
        "unresolved": _unresolved(found),
    }[found.reading]


def part_is_stable(report: Report) -> bool:
    """Whether the verdict is unresolved for no other reason than that a stable rho is that of some parameters alone."""
    ends = report.generalisation.rho_low, report.generalisation.rho_high
    if report.steepest is None or alone(report) or not certified(report.judged) or report.verdict != "unresolved":
        return False
    return all(end is not None and classify(end) == "stable" for end in ends)


def steepest_findings(report: Report, doubts: Sequence[str] = ()) -> list[Finding]:
    """What Z is and says, first; and what it is not good for.

    Args:
        doubts: the optimizer's options and state that may change its update.
    """
    found = report.steepest
    if found is None:
        return []
    norm = {"spectral": "the spectral norm of each matrix", "max": "the max-norm"}[found.norm]
    z = "no Z" if found.z is None else f"Z {found.z:.3g}"
    told = {
        "past": f"steps of this length overshoot by more than they gain along the sharpest direction of {norm}: lower the "
        "learning rate, or lengthen warm-up",
        "edge": "it can go on so for long, and has no reserve against a larger learning rate",
        "below": "S is a lower bound, and with noise in its gradients training settles at 0.2 to 0.7",
        "early": f"the momentum is that of a few gradients, and {z} says nothing yet",
        "unresolved": f"the optimizer has {', '.join(doubts[:4])}, which may change its update; pass --optimizer "
        f"{report.optimizer.name.split()[0].lower()} if it does not"
        if doubts
        else "no reading",
    }[found.reading]
    severity: Severity = "warning" if found.reading in ("past", "unresolved") else "info"
    of = "" if not found.rest else f" of the {found.parameters:,} parameters that {report.optimizer.name.split()[0]} moves"
    message = f"{z}{of}, {words(found)}; {told}; advisory, on a scale of its own: {report.optimizer.name} has no verdict"
    if found.rest:
        message = message.replace(
            f"{report.optimizer.name} has no verdict", "the verdict is on rho, which these have none of"
        )
    findings = [Finding(code=f"norm-{found.reading}", severity=severity, message=message)]
    if found.rest and report.judged.rho is not None:
        findings.append(
            Finding(
                code="rho-of-a-part",
                severity="info",
                message=f"rho is that of the {found.rest:,} parameters that are preconditioned, with the others held "
                "still; the next update is of all",
            )
        )
    return findings


def headline(report: Report, doubts: Sequence[str] = ()) -> Finding | None:
    """The first finding where rho is not, or is that of a part and says too little; None where rho's own does."""
    if alone(report):
        return steepest_findings(report, doubts)[0]
    if doubts or not part_is_stable(report) or report.steepest is None:
        return None
    return Finding(
        code="unresolved-part",
        severity="warning",
        message=f"rho {report.judged.rho or 0:.3g} is below the edge of stability for the {report.steepest.rest:,} "
        f"parameters that it is of; the other {report.steepest.parameters:,} have no rho, and a Z below the edge proves "
        "nothing: no verdict on all",
    )


def _unresolved(found: ModelSteepest) -> str:
    return {
        "unsettled": "S still rose when its products were spent, so it is larger; raise the time budget or measure again",
        "flat": "no positive curvature was found in that norm",
        "no-gradient": "the gradient is 0 on this shard",
        "non-finite": "a product with the Hessian is not finite",
        "skipped": "it was not measured",
    }.get(found.status, "no learning rate is known" if found.lr is None else "its update is not known in full")
