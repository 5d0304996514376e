"""How well each signal tells: AUC with bootstrap intervals, and lead time at fixed rates of false alarms.

`python benchmarks/instability/score.py`, after `fit.py`, reads the zoo's runs and writes results/instability_scores.json and
the picture of docs/explanation/rho.md. Runs are what is drawn again in the bootstrap; the AUC over families is the mean of
each family's own, as learning rates and scales of different families do not compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from common import HERE
from labels import label
from matplotlib.figure import Figure
from signals import SIGNALS, Signal, points
from zoo import EVENT_AT, EVENTS, PROBES, Run, stored

from curvcli.judge.calibration import calibration, odds
from curvcli.judge.limits import STABLE_BELOW
from curvcli.judge.verdict import verdict_at
from curvcli.training.outliers import LossWatch

EARLY, DRAWS, AHEAD = 16, 200, 40
Scored = tuple[str, float, bool]  # family, signal, whether it went wrong


def auc(pairs: Sequence[tuple[float, bool]]) -> float | None:
    """Chance that a bad one's signal is above a good one's; ties count half. None where one kind is missing."""
    bad = [v for v, y in pairs if y]
    good = sorted(v for v, y in pairs if not y)
    if not bad or not good:
        return None
    return sum(bisect_left(good, b) + bisect_right(good, b) for b in bad) / (2 * len(bad) * len(good))


def within(scored: Sequence[Scored]) -> float | None:
    """Mean of the families' own AUC, of those that have at least two of each kind."""
    families: dict[str, list[tuple[float, bool]]] = {}
    for family, value, bad in scored:
        families.setdefault(family, []).append((value, bad))
    sure = [pairs for pairs in families.values() if 2 <= sum(y for _, y in pairs) <= len(pairs) - 2]
    found = [a for pairs in sure if (a := auc(pairs)) is not None]
    return mean(found) if found else None


def interval(items: Sequence[Any], statistic: Callable[[list[Any]], float | None], seed: int = 0) -> list[float] | None:
    """5 % and 95 % of a statistic over items drawn again."""
    draw = np.random.default_rng(seed)
    found = [statistic([items[i] for i in draw.integers(len(items), size=len(items))]) for _ in range(DRAWS)]
    values = sorted(v for v in found if v is not None)
    return [round(values[int(q * (len(values) - 1))], 3) for q in (0.05, 0.95)] if len(values) > DRAWS // 2 else None


def history(row: dict[str, Any], signal: Signal, until: int | None) -> float | None:
    """Median of a signal over steps 16 to 100, before the run breaks."""
    values = [
        v
        for p in points(row)
        if EARLY <= p["step"] <= 100 and (until is None or p["step"] <= until) and (v := signal(p)) is not None
    ]
    return median(values) if values else None


def of_histories(rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]], signal: Signal) -> list[Scored]:
    """A run's history against whether it ends badly; ramps and injected events are another question."""
    found = []
    for row, said in zip(rows, labels, strict=True):
        if row["protocol"] in ("constant", "warmup", "cosine"):
            value = history(row, signal, said["break"])
            if value is not None:
                found.append((row["family"], value, bool(said["badly"])))
    return found


def of_checkpoints(rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]], signal: Signal) -> list[list[Scored]]:
    """Each point before a break against whether the run breaks within 40 steps: one list a run, those of events apart."""
    found = []
    for row, said in zip(rows, labels, strict=True):
        at = said["break"]
        if row["protocol"] in EVENTS:
            continue  # what comes from outside nothing can foresee
        mine = [
            (row["family"], v, at is not None and at <= p["step"] + AHEAD)
            for p in points(row)
            if p["step"] >= EARLY and (at is None or p["step"] <= at) and (v := signal(p)) is not None
        ]
        if mine:
            found.append(mine)
    return found


def lead(rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]], signal: Signal, rate: float) -> dict[str, Any]:
    """Breaks that a signal is before, and by how much, at the threshold that `rate` of a family's quiet runs cross."""
    caught, leads, all_of = 0, [], 0
    for family in sorted({row["family"] for row in rows}):
        mine = [(r, s) for r, s in zip(rows, labels, strict=True) if r["family"] == family and r["protocol"] not in EVENTS]
        quiet = [
            max((v for p in points(r) if p["step"] >= EARLY and (v := signal(p)) is not None), default=None)
            for r, s in mine
            if s["break"] is None and not s["badly"] and r["protocol"] != "ramp"
        ]
        quiet = sorted(v for v in quiet if v is not None)
        if len(quiet) < 3:
            continue
        limit = quiet[min(len(quiet) - 1, int((1 - rate) * len(quiet)))]
        for row, said in mine:
            if said["break"] is None:
                continue
            all_of += 1
            fired = next(
                (
                    p["step"]
                    for p in points(row)
                    if EARLY <= p["step"] <= said["break"] and (v := signal(p)) is not None and v > limit
                ),
                None,
            )
            if fired is not None:
                caught += 1
                leads.append(said["break"] - fired)
    return {"breaks": all_of, "caught": caught, "median_lead_steps": median(leads) if leads else None}


def score(rows: list[dict[str, Any]], labels: list[dict[str, Any]]) -> dict[str, Any]:
    """All numbers of one set of runs, by signal."""
    table: dict[str, Any] = {}
    for name, signal in SIGNALS.items():
        runs = of_histories(rows, labels, signal)
        clusters = of_checkpoints(rows, labels, signal)
        flat = [s for mine in clusters for s in mine]

        def pooled(items: list[list[Scored]]) -> float | None:
            return auc([(v, y) for mine in items for _, v, y in mine])

        table[name] = {
            "runs": len(runs),
            "ends badly": _digits(auc([(v, y) for _, v, y in runs])),
            "ends badly, interval": interval(runs, lambda items: auc([(v, y) for _, v, y in items])),
            "ends badly, within families": _digits(within(runs)),
            "ends badly, within families, interval": interval(runs, within),
            "points": len(flat),
            "breaks soon": _digits(auc([(v, y) for _, v, y in flat])),
            "breaks soon, interval": interval(clusters, pooled),
            "breaks soon, within families": _digits(within(flat)),
            **{f"lead at {rate:.0%} false alarms": lead(rows, labels, signal, rate) for rate in (0.05, 0.2)},
        }
    return table


def events(rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs with something injected after step 100: what became of each kind, and how well they were told at 100 and 150.

    At step 100 a signal can say no more than how much a run stands, at 150 whether it gets over it.
    """
    pairs = [(r, s) for r, s in zip(rows, labels, strict=True) if r["protocol"] in EVENTS]
    found: dict[str, Any] = {}
    for kind in EVENTS:
        mine = [(r, s) for r, s in pairs if r["protocol"] == kind]
        found[kind] = {
            "runs": len(mine),
            "break": sum(s["break"] is not None and s["break"] >= EVENT_AT - 15 for _, s in mine),
            "badly": sum(bool(s["badly"]) for _, s in mine),
            "loss past 6 sigma within 20 steps": sum(_noticed(r["losses"]) for r, _ in mine),
        }
    for name in ("rho", "lr", "update ratio", "gradient norm, z", "gradient norm, 6 sigma", "loss, z"):
        for step in (EVENT_AT, 150):
            at = [
                (v, bool(s["badly"]))
                for r, s in pairs
                for p in points(r)
                if p["step"] == step and (v := SIGNALS[name](p)) is not None
            ]
            found[f"{name} at {step}: AUC of a bad end"] = _digits(auc(at))
    return found


def _noticed(losses: Sequence[float | None]) -> bool:
    """Whether the tracker's rule on the loss fires in the 20 steps after the event."""
    watch = LossWatch()
    for step, loss in enumerate(losses[: EVENT_AT + 20]):
        watch.see(float("nan") if loss is None else loss)
        if step == EVENT_AT - 1:
            watch.told()  # and forget
    sigmas = watch.told()["loss_sigmas"]
    return sigmas is not None and sigmas > 6


def unflagged(rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Runs that broke by themselves after a measurement, and those with a rho below the edge at the rate that broke."""
    found = {"measured before a break": 0, "all of them below 0.8 at the rate that broke": 0}
    for row, said in zip(rows, labels, strict=True):
        if said["break"] is None or row["protocol"] in (*EVENTS, "ramp"):
            continue
        before = [p for p in row["probes"] if EARLY <= p["step"] < said["break"]]
        if not before:
            continue
        rate = Run(row["family"], row["protocol"], row["lr"], row["seed"]).lr_at(said["break"] - 1)
        known = [p["rho"] * rate / p["lr"] for p in before if p.get("status") == "converged" and p.get("rho") is not None]
        found["measured before a break"] += 1
        found["all of them below 0.8 at the rate that broke"] += bool(known) and max(known) < STABLE_BELOW
    return found


def _digits(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def by_family(rows: list[dict[str, Any]], labels: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of each family's runs, and rho's AUC within it."""
    found = {}
    for family in sorted({row["family"] for row in rows}):
        mine = [(r, s) for r, s in zip(rows, labels, strict=True) if r["family"] == family]
        only, said = [r for r, _ in mine], [s for _, s in mine]
        found[family] = {
            "runs": len(mine),
            "break": sum(s["break"] is not None for s in said),
            "badly": sum(bool(s["badly"]) for s in said),
            "collapse": sum(s["collapse"] for s in said),
            "with spikes": sum(bool(s["spikes"]) for s in said),
            **{
                f"AUC {name}": _digits(auc([(v, y) for _, v, y in of_histories(only, said, SIGNALS[name])]))
                for name in ("rho", "gradient norm", "lr")
            },
        }
    return found


def verdicts(rows: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What curv says of points before anything has broken, by today's coefficients, and how many of these runs end badly."""
    counts: dict[str, list[tuple[float, float]]] = {}  # of a verdict: a point's weight, and that where the run ends badly
    flagged = {True: 0, False: 0}
    runs = {True: 0, False: 0}
    for row, said in zip(rows, labels, strict=True):
        if row["protocol"] not in ("constant", "warmup", "cosine"):
            continue
        told = [verdict(p, row) for p in row["probes"] if said["break"] is None or p["step"] <= said["break"]]
        bad = bool(said["badly"])
        for name in told:
            counts.setdefault(name, []).append((1 / len(told), bad / len(told)))
        runs[bad] += 1
        flagged[bad] += any(name in ("hot", "unstable") for name in told)
    sums = {name: tuple(map(sum, zip(*found, strict=True))) for name, found in counts.items()}
    return {
        "points": {n: {"runs": round(all_of, 1), "end badly": round(bad / all_of, 3)} for n, (all_of, bad) in sums.items()},
        "runs that end badly": runs[True], "flagged before": flagged[True],
        "quiet runs": runs[False], "flagged at any point": flagged[False],
    }  # fmt: skip


def verdict(probe: dict[str, Any], row: dict[str, Any]) -> str:
    """As a report of this point would have it; its shard is one batch, so rho is its own bracket."""
    if probe["step"] < calibration().early_steps:
        return "early"
    if probe.get("status") != "converged" or probe.get("rho") is None:
        return "unresolved"
    return verdict_at(probe["rho"], probe["rho"], odds(probe["rho"], row["optimizer"]))


def draw(document: dict[str, Any], fit: dict[str, Any]) -> Figure:
    """AUC on what was held out, and odds against what came."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    table = document["held out"]
    names = sorted((n for n in table if table[n]["ends badly"] is not None), key=lambda n: table[n]["ends badly"])
    for y, name in enumerate(names):
        value, ends = table[name]["ends badly"], table[name]["ends badly, interval"]
        if ends:
            left.plot(ends, [y, y], color="#9db4d6", linewidth=4, solid_capstyle="butt")
        left.plot([value], [y], "o", color="#1f4e9c" if name != "rho" else "#b3261e")
    left.axvline(0.5, color="#888888", linewidth=0.8)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_xlabel("AUC of 'ends badly', held-out runs (5 to 95 %)")
    for group, colour in (("adaptive", "#1f4e9c"), ("sgd", "#c2641a")):
        for kind, marker in (("fitted on", "o"), ("held out", "s")):
            bins = fit["checks"][group][kind]["calibration"]
            label = f"{group}, {kind}"
            right.scatter([b["said"] for b in bins], [b["came"] for b in bins], s=[6 + 2 * b["runs"] for b in bins],
                          marker=marker, label=label, color=colour, alpha=0.45 if kind == "fitted on" else 1.0)  # fmt: skip
    right.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
    right.set_xlabel("odds of a bad end, as told")
    right.set_ylabel("share that ended badly")
    # Beside the panel, where no bin lies; of one size, since that of a marker says how many runs a bin has.
    legend = figure.legend(*right.get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside lower right", ncols=4)
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows = stored()
    labels = label(rows)
    sets = {"fitted on": False, "held out": True}
    document: dict[str, Any] = {"runs": len(rows), "probes": sorted(PROBES), "families": by_family(rows, labels)}
    for name, held in sets.items():
        chosen = [(r, s) for r, s in zip(rows, labels, strict=True) if r["held_out"] == held]
        document[name] = score([r for r, _ in chosen], [s for _, s in chosen])
        document[name]["verdicts"] = verdicts([r for r, _ in chosen], [s for _, s in chosen])
    document |= {"events": events(rows, labels), "unflagged": unflagged(rows, labels)}
    (HERE / "results" / "instability_scores.json").write_text(json.dumps(document, indent=1) + "\n")
    signals = {name: {k: v for k, v in document[name].items() if k != "verdicts"} for name in sets}
    fit = json.loads((HERE / "results" / "instability_fit.json").read_text())
    draw({**document, **signals}, fit).savefig(HERE.parent / "docs" / "images" / "instability.png", dpi=120)
    print(json.dumps({name: document[name] for name in ("events", "unflagged")}, indent=1))
    ends = sum(s["break"] is not None for s in labels), sum(bool(s["badly"]) for s in labels)
    print(f"{len(rows)} runs, {ends[0]} break, {ends[1]} end badly")
    for name in sets:
        print(
            f"\n{name}: AUC of 'ends badly', over all and within families; of 'breaks within {AHEAD} steps'; caught at 5 %"
        )
        for signal, numbers in signals[name].items():
            early = numbers["lead at 5% false alarms"]
            badly = [numbers[f"ends badly{of}"] for of in ("", ", interval", ", within families")]
            print(f"{signal:24} {badly[0]} {badly[1]}  {badly[2]}  "
                  f"{numbers['breaks soon']} {numbers['breaks soon, interval']}  {numbers['breaks soon, within families']}  "
                  f"{early['caught']}/{early['breaks']}, {early['median_lead_steps']} steps")  # fmt: skip
        print(json.dumps(document[name]["verdicts"], indent=1))


if __name__ == "__main__":
    main()
