"""Fit the coefficients of the verdict on the zoo's runs that are not held out, and hold them against those that are.

`python benchmarks/instability/fit.py` writes `curvcli/judge/calibration.json` and results/instability_fit.json. The edge is
rho at which training broke in ramps, had lambda stood still: breaking lr * rho / lr at each point before the break whose rho
is over 0.1. The odds are a logistic in ln(rho) of "ends badly", of single points before anything has broken. Each family
counts once, the four of full batches together as one, and within it each run. The edge's ends are those of nine in ten of
the points fitted on; the confidence that is written down is the share of held-out points within them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from common import HERE
from labels import label
from score import auc
from signals import points
from zoo import Run, stored

PACKAGE = HERE.parent / "curvcli" / "judge" / "calibration.json"
CONFIDENCE, EARLY_STEPS = 0.9, 16
NEAR = 0.1  # rho from which on the edge is fitted: below it curvature still grows by decades, with SGD most of all
STABLE_ODDS, HOT_ODDS, UNSTABLE_ODDS = 1 / 3, 1 / 2, 2 / 3  # conventions: one in three, one in two, two in three
GROUPS = ("adaptive", "sgd")
Weighted = tuple[float, float]  # value, weight


def known(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Points whose rho can be relied on, after the first steps."""
    return [
        p for p in points(row) if p["step"] >= EARLY_STEPS and p.get("status") == "converged" and (p.get("rho") or 0) > 0
    ]


def kind(row: dict[str, Any]) -> str:
    """Families that differ in beta2 alone are one."""
    return "mlp-full-batch" if row["family"].startswith("mlp-full-batch") else str(row["family"])


def even(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Weights of runs, so that each family weighs as much as any other; they sum to the number of runs."""
    counts = Counter(kind(row) for row in rows)
    return [len(rows) / len(counts) / counts[kind(row)] for row in rows]


def edges(rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]]) -> list[list[Weighted]]:
    """ln of breaking lr * rho / lr, at the points before the break: a list a ramp, whose weights sum to that of the run."""
    ramps = [
        (r, s["break"]) for r, s in zip(rows, labels, strict=True) if r["protocol"] == "ramp" and s["break"] is not None
    ]
    found = []
    for (row, step), weight in zip(ramps, even([r for r, _ in ramps]), strict=True):
        broke = Run(row["family"], "ramp", row["lr"], row["seed"]).lr_at(step)
        mine = [float(np.log(broke * p["rho"] / p["lr"])) for p in known(row) if p["step"] < step and p["rho"] >= NEAR]
        if mine:
            found.append([(v, weight / len(mine)) for v in mine])
    return found


def quantiles(weighted: Sequence[Weighted], at: Sequence[float]) -> list[float]:
    """Of weighted values."""
    ordered = sorted(weighted)
    sums = np.cumsum([w for _, w in ordered]) / sum(w for _, w in ordered)
    return [ordered[min(int(np.searchsorted(sums, q)), len(ordered) - 1)][0] for q in at]


def chances(rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]]) -> list[tuple[float, bool, float]]:
    """ln rho, whether the run ends badly, weight: of points before anything has broken."""
    found = []
    steady = [(r, s) for r, s in zip(rows, labels, strict=True) if r["protocol"] in ("constant", "warmup", "cosine")]
    for (row, said), weight in zip(steady, even([r for r, _ in steady]), strict=True):
        mine = [p for p in known(row) if said["break"] is None or p["step"] <= said["break"]]
        # Of a schedule that has nearly ended rho says what is left of it, and not how it will end.
        mine = [p for p in mine if p["lr"] >= 0.3 * row["lr"]]
        found += [(float(np.log(p["rho"])), bool(said["badly"]), weight / len(mine)) for p in mine]
    return found


def logistic(points: Sequence[tuple[float, bool, float]]) -> tuple[float, float]:
    """Intercept and slope by Newton's method, with a faint prior (one half of a run at slope 1) that keeps them finite."""
    x = np.array([[1.0, v] for v, _, _ in points])
    y, w = np.array([float(b) for _, b, _ in points]), np.array([w for _, _, w in points])
    beta, centre, prior = np.zeros(2), np.array([0.0, 1.0]), np.diag([0.05, 0.5])
    for _ in range(100):
        p = 1 / (1 + np.exp(-(x @ beta)))
        slope = x.T @ (w * (y - p)) - prior @ (beta - centre)
        curvature = (x * (w * p * (1 - p))[:, None]).T @ x + prior
        step = np.linalg.solve(curvature, slope)
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            break
    return float(beta[0]), float(beta[1])


def fitted(rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]], group: str) -> dict[str, Any]:
    """Edge and odds of one group."""
    mine = [(r, s) for r, s in zip(rows, labels, strict=True) if r["group"] == group]
    chosen, said = [r for r, _ in mine], [s for _, s in mine]
    ramps = edges(chosen, said)
    tail = (1 - CONFIDENCE) / 2
    low, middle, high = np.exp(quantiles([v for ramp in ramps for v in ramp], (tail, 0.5, 1 - tail)))
    odds = chances(chosen, said)
    intercept, slope = logistic(odds)
    return {
        "edge": {"low": _digits(low), "middle": _digits(middle), "high": _digits(high), "ramps": len(ramps)},
        "odds": {"intercept": _digits(intercept), "slope": _digits(slope), "runs": round(sum(w for *_, w in odds))},
    }


def checked(
    rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]], fit: dict[str, Any], group: str
) -> dict[str, Any]:
    """Coefficients against runs that they were not fitted on: coverage of the edge, and what odds of so much came to."""
    mine = [(r, s) for r, s in zip(rows, labels, strict=True) if r["group"] == group]
    chosen, said = [r for r, _ in mine], [s for _, s in mine]
    low, high = np.log(fit["edge"]["low"]), np.log(fit["edge"]["high"])
    ramps = edges(chosen, said)
    weight = sum(w for ramp in ramps for _, w in ramp)
    inside = sum(w for ramp in ramps for v, w in ramp if low <= v <= high)
    odds = chances(chosen, said)
    told = [1 / (1 + np.exp(-(fit["odds"]["intercept"] + fit["odds"]["slope"] * x))) for x, _, _ in odds]
    bins = []
    for start, end in ((0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 0.8), (0.8, 1.01)):
        here = [(p, y, w) for p, (_, y, w) in zip(told, odds, strict=True) if start <= p < end]
        share = sum(w for *_, w in here)
        if share:
            bins.append(
                {
                    "odds": [start, min(end, 1)],
                    "runs": round(share, 1),
                    "said": _digits(sum(p * w for p, _, w in here) / share),
                    "came": _digits(sum(y * w for _, y, w in here) / share),
                }
            )
    area = auc([(x, y) for x, y, _ in odds])
    return {
        "ramps": len(ramps),
        "edge_held": _digits(inside / weight) if ramps else None,
        "auc": None if area is None else _digits(area),
        "brier": _digits(sum(w * (p - y) ** 2 for p, (_, y, w) in zip(told, odds, strict=True)) / sum(w for *_, w in odds))
        if odds
        else None,
        "calibration": bins,
    }


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    rows = stored()
    labels = label(rows)
    sets = {held: [k for k, r in enumerate(rows) if r["held_out"] == held] for held in (False, True)}
    groups, checks = {}, {}
    for group in GROUPS:
        groups[group] = fitted([rows[k] for k in sets[False]], [labels[k] for k in sets[False]], group)
        checks[group] = {
            name: checked([rows[k] for k in sets[held]], [labels[k] for k in sets[held]], groups[group], group)
            for name, held in (("fitted on", False), ("held out", True))
        }
        # What outputs say is what came of runs that nothing was fitted on.
        groups[group]["edge"]["confidence"] = checks[group]["held out"]["edge_held"]
    train = [rows[k] for k in sets[False]]
    calibration = {
        "source": {
            "command": "python benchmarks/instability/fit.py",
            "runs": len(train),
            "ramps": sum(r["protocol"] == "ramp" for r in train),
            "families": sorted({r["family"] for r in train}),
            "parameters": [min(r["parameters"] for r in train), max(r["parameters"] for r in train)],
            "tokens_per_batch": [8, 256],
            "optimizers": sorted({r["optimizer"] for r in train}),
        },
        "edge": {g: groups[g]["edge"] for g in GROUPS},
        "odds": {g: groups[g]["odds"] for g in GROUPS},
        "edge_from": NEAR,
        "stable_below": _digits(STABLE_ODDS),
        "hot_from": HOT_ODDS,
        "unstable_from": _digits(UNSTABLE_ODDS),
        "early_steps": EARLY_STEPS,
    }
    document = {"coefficients": groups, "checks": checks}
    print(json.dumps(document, indent=1))
    if not options.dry:
        PACKAGE.write_text(json.dumps(calibration, indent=1) + "\n")
        (HERE / "results" / "instability_fit.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
