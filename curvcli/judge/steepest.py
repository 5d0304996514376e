"""What Z says, the distance of a normalised optimizer from its edge: a reading, on a scale of its own, and no verdict."""

from __future__ import annotations

from curvcli.documents import SteepestReading, SteepestStatus

# Full-batch Muon and Lion on convex quadratics settle at medians from 0.60 (momentum 0.9, exact polar factors) to 1.34
# (torch.optim.Muon, whose polar factors are shorter than 1): docs/explanation/method.md#normalised.
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
    if z > EDGE_TO:
        return "past"
    if status == "unsettled":
        return "unresolved"
    return "edge" if z >= EDGE_FROM else "below"
