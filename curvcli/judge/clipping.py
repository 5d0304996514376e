"""Gradients that may have been clipped so hard that rho is too high, and what may be said of it then."""

from __future__ import annotations

from collections.abc import Callable

from curvcli.documents import Finding, Optimizer, Report

FAR = 3.0  # of the gradient here over those that the second moment has seen, from which on it is remarkable


def longer(optimizer: Optimizer) -> float | None:
    """How many times longer the gradient is than the second moment and the clipping on record explain; None up to `FAR`."""
    ratio = optimizer.gradient_ratio
    if ratio is None:
        return None
    ratio *= 1.0 if optimizer.clip is None else optimizer.clip
    return ratio if ratio > FAR else None


def too_high(optimizer: Optimizer) -> float:
    """The factor that rho may be too high by, as far as is known: 1 where nothing says so, or clipping is on record.

    Clipped to a share s of its length, a gradient answers to a move of the weights by s H, while the second moment is that
    of what was left: rho is too high by 1/s. The mean gradient is no longer than those of batches of any size, so where it
    is much longer than what the moment has seen, they were clipped, or the loss has just leapt. By how much, batches say:
    those of training are as long as the shard's, which are small, or less.
    """
    found = longer(optimizer)
    return 1.0 if found is None or optimizer.clip is not None else max(found, optimizer.batch_ratio or 0.0)


def narrow(optimizer: Optimizer, otherwise: str) -> str:
    """What narrows a bracket of rho: where it may be too high, to know by how much."""
    return "find out how hard gradients were clipped" if too_high(optimizer) > 1 else otherwise


def unknown(optimizer: Optimizer, rho: float) -> Finding | None:
    """The headline where no verdict is given because rho may be too high; None where it is not."""
    times = too_high(optimizer)
    if times <= 1:
        return None
    return Finding(
        code="unresolved-clipping",
        severity="warning",
        message=f"rho is {rho:.3g}, or up to {times:.2g} times less: gradients here are longer than those that the second "
        "moment has seen, as where they are clipped, and no record says how hard; pass --clip, the share of a "
        "gradient that is left",
    )


def counted(optimizer: Optimizer) -> str:
    """What a note on clipping ends with: whether rho counts with it, which no reader of files can know."""
    return "" if optimizer.clip is None or f"{optimizer.clip:.2g}" == "1" else ", and rho is times that"


def alike(*reports: Report | None) -> Callable[[Report], float]:
    """What the rho of each is to be multiplied by to compare them: where one does not count with clipping, none may."""
    clips = [report.optimizer.clip for report in reports if report is not None]
    return lambda report: 1 / (report.optimizer.clip or 1.0) if None in clips else 1.0


def lowest(end: float, optimizer: Optimizer) -> float:
    """The lower end of a bracket of rho, where that may be too high; below 0 it is as low already."""
    return min(end, end / too_high(optimizer))


def clipping_findings(optimizer: Optimizer) -> list[Finding]:
    """A gradient that the second moment has not seen the like of."""
    times = longer(optimizer)
    if times is None:
        return []
    # What clipping on record explains is taken out of rho, and of this.
    clipped = (
        f"where gradients are clipped so hard, rho is up to {too_high(optimizer):.2g} times too high; else "
        if optimizer.clip is None
        else "clipping is not why: "
    )
    return [
        Finding(
            code="gradient-over-moments",
            severity="warning",
            message=f"the gradient here is {times:.2g} times as long as those that the second moment has seen: {clipped}"
            "data are not the run's, or the loss has just leapt",
        )
    ]
