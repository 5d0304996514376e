"""Gradient clipping as a run's own record has it: what it was clipped to, and what that left of a gradient."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from curvcli.checkpoints.arguments import arguments
from curvcli.optimizers.base import OptimizerView, scalar

ROUNDED = 1.1  # a norm over the one that it was clipped to, by rounding in low precision
RECENT, LEAST = 20, 5  # logged norms that the share is a mean over, at most; and from how many on there is one
SMALLEST = 1e-9  # share that a record is believed of: less is a damaged file, and would make any rho safe


@dataclass(frozen=True)
class Clipping:
    """What gradients were clipped to, and their norms before, in step order.

    Args:
        limit: the largest norm, finite, 0 where nothing is clipped; None where the record does not say.
        norms: of logged steps; one may be no number.
    """

    limit: float | None = None
    norms: tuple[float, ...] = ()

    @property
    def share(self) -> float | None:
        """Mean of min(1, limit / norm) over the newest norms: what was left of a gradient. None where it is not known."""
        if self.limit == 0:
            return 1.0
        recent = [norm for norm in self.norms if isfinite(norm) and norm > 0][-RECENT:]
        if self.limit is None or len(recent) < LEAST:
            return None
        share = fmean(min(1.0, self.limit / norm) for norm in recent)
        return share if share >= SMALLEST else None

    @property
    def notes(self) -> dict[str, str]:
        """For reports, by code: that the moments are of clipped gradients, and what was left of these."""
        limit = 1.0 if self.limit is None else self.limit
        over = sum(norm > limit for norm in self.norms)
        if limit == 0 or (self.norms and not over) or not (self.norms or self.limit):
            return {}
        moments = "the second moment is of clipped gradients"
        if not self.norms:
            said = f"gradients were clipped to a norm of {limit:.3g}: {moments}"
        elif self.limit is None:
            said = (
                f"{over} of {len(self.norms)} logged gradient norms exceed 1.0, the Trainer's default max_grad_norm: "
                f"with clipping on, {moments}"
            )
        else:
            said = f"{over} of {len(self.norms)} logged gradient norms exceed {limit:.3g}, to which the run clipped them: "
            said += moments
        share = self.share
        raises = ", which raises lambda as the optimizer sees it"
        if share is None:
            return {"clipped-moments": said + raises}
        late = "of late nothing was clipped" if f"{share:.2g}" == "1" else f"{share:.2g} of a gradient was left of late"
        return {"clipped-moments": f"{said}{raises}; {late}"}

    def counted(self, view: OptimizerView, given: float | None = None) -> tuple[OptimizerView, dict[str, str]]:
        """An optimizer that knows what share of a gradient was left, and a note where that is not what the record says.

        Args:
            given: the share, by the user, which goes before the record.
        """
        if given is not None:
            said = f"clipping leaves {given:.2g} of a gradient, as was said"
            return replace(view, clip=given), {"clipped-moments": said}
        # What was clipped to a norm is no longer than that, nor is what the second moment averages.
        if self.share is not None and self.limit and (seen := remembered(view)) > ROUNDED * self.limit:
            said = (
                f"the run's files say that gradients were clipped to a norm of {self.limit:.3g}, and the second moment has "
                f"seen {seen:.3g}: rho does not count with clipping"
            )
            return view, {"clipped-moments": said}
        return replace(view, clip=self.share), {}


def remembered(view: OptimizerView) -> float:
    """Norm of the gradients that second moments average, as the root mean square, or less; 0 where there is none.

    Less where a moment is that of a part, or a mean over entries. Raises InputError where betas are no numbers.
    """
    total = 0.0
    for group in view.groups:
        for entry in (view.state.get(name, {}) for name in group.names):
            second, step = entry.get("exp_avg_sq", entry.get("square_avg")), scalar(entry.get("step"))
            if isinstance(second, Tensor):
                averages = group.options.get("betas") is not None and step >= 1
                total += float(second.double().sum()) / (1 - group.betas[1] ** step if averages else 1.0)
    return sqrt(total) if 0 < total < inf else 0.0


def clipping(path: Path, log: Mapping[str, Any] | None, limit: float | None = None) -> Clipping:
    """Of a directory of the Trainer's.

    Args:
        path: where its arguments lie, beside its log.
        log: its trainer_state.json; None where it has none.
        limit: the norm that gradients were clipped to, 0 for not at all, where something else than the arguments says it.
    """
    history = (log or {}).get("log_history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    # An integer of JSON may be larger than any float.
    found = [e.get("grad_norm") for e in entries]
    norms = tuple(float(n) for n in found if isinstance(n, (int, float)) and not (isinstance(n, int) and abs(n) > 2**53))
    if limit is None and log is not None:
        limit = _max_grad_norm(path)
    return Clipping(limit, norms)


def largest_norm(value: Any) -> float | None:
    """A limit as files have it, 0 for one that no norm is over; None where it is no number."""
    if not isinstance(value, (int, float)):
        return None
    # An integer may be larger than any float.
    return float(value) if 0 < value <= sys.float_info.max else 0.0


def _max_grad_norm(path: Path) -> float | None:
    """What the Trainer clipped gradients to, 0 for not at all; None where its arguments are not there or not to be read."""
    found = arguments(path)
    if "max_grad_norm" not in found:
        return None
    value = found["max_grad_norm"]
    return 0.0 if value is None else largest_norm(value)
