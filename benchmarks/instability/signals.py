"""What could have told: a number for each point at which a run was measured, higher where it should be worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median, pstdev
from typing import Any

from families import FAMILIES
from labels import INF, finite

Point = Mapping[str, Any]  # a probe, with "earlier", the probes before, and the losses and norms up to it
Signal = Callable[[Point], float | None]


def _rho(point: Point) -> float | None:
    return point.get("rho") if point.get("status") == "converged" else None


def _surge(point: Point) -> float | None:
    before = [r for p in point["earlier"][-5:] if (r := _rho(p)) is not None and r > 0]
    now = _rho(point)
    return now / median(before) if now is not None and len(before) >= 2 else None


def _z(name: str) -> Signal:
    def of(point: Point) -> float | None:
        """The last value against the 50 before, in standard deviations of the logarithm."""
        course = [math.log(v) for v in finite(point[name]) if 0 < v < INF][-51:]
        if len(course) < 12:
            return None
        *before, now = course
        spread = pstdev(before)
        return (now - sum(before) / len(before)) / spread if spread else None

    return of


def _six(point: Point) -> float | None:
    """Standard deviations by which the largest gradient norm of the last 20 steps lies over the mean of the 100 before."""
    norms = [v for v in finite(point["norms"]) if v < INF]
    if len(norms) < 32:
        return None
    before, late = norms[-120:-20], norms[-20:]
    spread = pstdev(before)
    return (max(late) - sum(before) / len(before)) / spread if spread else None


def _quotient(point: Point) -> float | None:
    value = point.get("gradient_quotient")
    return None if value is None else value * point["lr"] / 2


SIGNALS: dict[str, Signal] = {
    "rho": _rho,
    "rho with rare rows": lambda p: p.get("rho_full"),
    "surge of rho": _surge,
    "lambda": lambda p: p.get("eigenvalue"),
    "update ratio": lambda p: p.get("update_ratio"),
    "lr g'Hg / 2 g'g": _quotient,
    "- most negative": lambda p: None if p.get("most_negative") is None else -p["most_negative"],
    "- participation": lambda p: None if p.get("participation") is None else -p["participation"],
    "gradient norm": lambda p: p.get("gradient_norm"),
    "gradient norm, z": _z("norms"),
    "gradient norm, 6 sigma": _six,
    "loss, z": _z("losses"),
    "RMS of g / sqrt v": lambda p: p.get("update_rms"),
    "attention logit": lambda p: p.get("attention_logit"),
    "- attention entropy": lambda p: None if p.get("attention_entropy") is None else -p["attention_entropy"],
    "spectral norm": lambda p: p.get("spectral_norm"),
    "lr": lambda p: p["lr"],
    "1 / (1 - b2)": lambda p: p["memory"],
}


def memory(family: str) -> float | None:
    """Steps that the second moment averages over; None of an optimizer that has none."""
    made = FAMILIES[family]
    b2 = {"SGD": None, "RMSprop": 0.99}.get(made.optimizer, made.options.get("betas", (0.9, 0.999))[1])
    return None if b2 is None else 1 / (1 - b2)


def points(row: Mapping[str, Any]) -> list[Point]:
    """The probes of a run with what was known by then."""
    return [
        {
            **probe,
            "earlier": row["probes"][:k],
            "memory": memory(row["family"]),
            "losses": row["losses"][: probe["step"]],
            "norms": row["norms"][: probe["step"]],
        }
        for k, probe in enumerate(row["probes"])
    ]
