"""What became of a run, told from its loss alone.

These rules were written before any curvature was looked at. One was mended afterwards, while the first 70 runs were read
with their rho beside: twins are of the same protocol, as a cosine ends higher than a constant rate by being slow.

A loss is judged in windows of 15 steps by their medians; sigma is the noise of single steps, from the median of the absolute
differences of neighbours. What was won is what the best window lies below the loss of a constant prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

WINDOW, LASTING = 15, 0.15  # a break gives back this share of what was won
WORSE = 0.1  # ends badly: this share of what was won is missing
SPIKE, BACK = 0.1, 24  # a spike: this share above the median before, and gone after so many steps
INF = float("inf")


def finite(losses: Sequence[float | None]) -> list[float]:
    """A loss that is no number is an infinite one."""
    return [v if v is not None and math.isfinite(v) else INF for v in losses]


def noise(losses: Sequence[float]) -> float:
    """Standard deviation of single losses around their course."""
    steps = [abs(b - a) for a, b in pairwise(losses) if b < INF and a < INF]
    return 1.4826 * median(steps) / math.sqrt(2) if steps else 0.0


def windows(losses: Sequence[float]) -> list[float]:
    """Medians of windows, each beginning at its step; the last ones are of what is left."""
    return [median(losses[i : i + WINDOW]) for i in range(len(losses))]


def breaks(losses: Sequence[float | None], constant: float) -> int | None:
    """The step from which on, for a window, a part of what had been won is lost; None where none is."""
    course = finite(losses)
    medians = windows(course)
    best = INF
    for step in range(WINDOW, len(course)):
        best = min(best, medians[step - WINDOW])
        if len(course) - step < WINDOW and course[-1] < INF:
            break  # not seen for long enough
        spread = 3 * noise(course[max(0, step - 4 * WINDOW) : step]) / math.sqrt(WINDOW)
        # Before much is won a run that only begins slowly has nothing to lose.
        limit = best + LASTING * max(constant - best, 0.05 * constant) + spread
        if medians[step] > limit and median(course[step : step + 5]) > limit:
            return step
    return None


def final(losses: Sequence[float | None]) -> float:
    """Median of the last 20 losses; infinite where the run has ended early in no number."""
    course = finite(losses)
    return INF if course[-1] == INF else median(course[-20:])


def spikes(losses: Sequence[float | None], constant: float) -> list[int]:
    """Steps at which the loss leaps out of its course and comes back."""
    course, found = finite(losses), []
    step = BACK
    while step < len(course):
        before = course[step - BACK : step]
        usual, sigma = median(before), noise(before)
        limit = usual + max(5 * sigma, SPIKE * max(constant - usual, 0.05 * constant))
        if course[step] > limit:
            back = next((k for k in range(step + 1, min(step + BACK, len(course))) if course[k] <= usual + 2 * sigma), None)
            if back is not None:
                found.append(step)
            step = (back or step + BACK) + 1
        else:
            step += 1
    return found


def collapsed(losses: Sequence[float | None], constant: float, best: float) -> bool:
    """It ends at what a constant reaches, where its twins learn."""
    return 0.98 * constant <= final(losses) < 1.1 * constant and best < 0.9 * constant


def plain(protocol: str) -> str:
    """The protocol of the twins of a run."""
    return protocol if protocol in ("constant", "cosine") else "warmup"


def label(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Labels of all runs, in their order: break (step), badly, collapse, spikes (steps).

    A run ends badly where a twin (same family, seed and protocol; of an injected event, the warmed-up run without it) of no
    higher learning rate ends lower by a share of what that has won: a run that is merely slow does not.
    """
    ends = [final(row["losses"]) for row in rows]
    found = []
    for row, end in zip(rows, ends, strict=True):
        twins = [
            (other["lr"], e)
            for other, e in zip(rows, ends, strict=True)
            if (other["family"], other["seed"], other["protocol"]) == (row["family"], row["seed"], plain(row["protocol"]))
        ]
        best = min((e for lr, e in twins if lr <= row["lr"]), default=end)
        margin = WORSE * max(row["constant"] - best, 0.05 * row["constant"]) + 3 * noise(finite(row["losses"])) / math.sqrt(
            20
        )
        found.append(
            {
                "break": breaks(row["losses"], row["constant"]),
                "badly": None if row["protocol"] == "ramp" else end > best + margin,
                "collapse": collapsed(row["losses"], row["constant"], min((e for _, e in twins), default=end)),
                "spikes": spikes(row["losses"], row["constant"]),
            }
        )
    return found
