"""The limits that verdicts, pictures, schedules and advice go by, and which numbers may be relied on."""

from __future__ import annotations

from typing import Protocol

from curvcli.documents import Estimate, Severity, VerdictName

# About 1, the edge, by a quarter each way. They are conventions: what became of runs there is in calibration.json.
STABLE_BELOW, UNSTABLE_ABOVE = 0.8, 1.25
# Shares of lambda: residuals that may be float32's rounding and no more, and how near a ceiling is near.
_ROUNDING, _NEAR = 3e-6, 0.03
# Verdicts that leave open whether the run is stable: more data, more products or more steps could say.
UNKNOWN: tuple[VerdictName, ...] = ("early", "unresolved")


class Solved(Protocol):
    """What the eigensolver made: an estimate of a report, or a record of a training job's log."""

    @property
    def status(self) -> str:
        """How the solve ended: "converged", or why the value is not to be relied on."""
        ...

    @property
    def eigenvalue(self) -> float | None:
        """Largest Ritz value, lambda; None where there is none."""
        ...

    @property
    def residual(self) -> float | None:
        """Norm of the Ritz pair's residual: some eigenvalue lies within it of `eigenvalue`. None where not known."""
        ...


def classify(rho: float) -> VerdictName:
    """Verdict of one exactly known rho."""
    return "stable" if rho < STABLE_BELOW else "edge" if rho <= UNSTABLE_ABOVE else "unstable"


def changed(after: VerdictName) -> Severity:
    """How severe it is that a verdict has become another one."""
    return "error" if after == "unstable" else "warning" if after == "hot" else "info"


def highest(found: Estimate) -> float | None:
    """What no eigenvalue lies above: the ceiling, and the end of the residual where that is higher or stands alone.

    None where one of the two numbers that it needs is missing. Documents of older versions have no ceiling.
    """
    if found.eigenvalue is None or found.residual is None:
        return None
    end = found.eigenvalue + found.residual
    return end if found.ceiling is None else max(end, found.ceiling)


def on_shard(value: float | None, estimate: Estimate, unit: float | None) -> tuple[float | None, float | None]:
    """From a Ritz value, which is a lower bound, to what no eigenvalue lies above; in units of so many eigenvalues."""
    if value is None or (most := highest(estimate)) is None or not unit or unit <= 0:
        return None, None
    return value, most / unit


def certified(found: Solved) -> bool:
    """Whether its value may be relied on: it has converged, and says how far off it may be."""
    return found.status == "converged" and found.eigenvalue is not None and found.residual is not None


def at_rounding(found: Estimate) -> bool:
    """Whether more products bring it no nearer: it is as near as float32's rounding lets it be."""
    value, top = found.eigenvalue, highest(found)
    if value is None or found.residual is None or top is None:
        return False
    return found.residual <= _ROUNDING * abs(value) and top - value <= _NEAR * abs(value)
