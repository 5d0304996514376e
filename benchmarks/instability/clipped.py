"""What rho is worth where gradients are clipped hard: `python benchmarks/instability/clipped.py`.

Families of the zoo are trained again with gradients clipped to a share of their usual norm, as ramps of the learning rate
and at their middle rate. Clipped by s = clip / norm, a step is as long as ever under Adam, whose moments shrink alike, but
it answers to a move of the weights by s H: lambda as the optimizer's state has it is too high by 1/s. So rho s should be
at the edge where rho of a run that is not clipped is. Runs are kept in results/clipped.jsonl; results/clipped.json has,
for each family and share, the learning rate that broke it, rho there had lambda stood, the same times s, and how the runs
at the middle rate ended.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import HERE
from families import FAMILIES, build, optimizer_of
from fit import GROUPS, checked, fitted
from labels import breaks, final, label
from torch import nn
from zoo import Run, measured, play, stored

STORE = HERE / "results" / "clipped.jsonl"
CLIPPED = ("llama", "pre-norm-deep", "post-norm", "gru-adam", "vit-adam", "conv-sgd", "pre-norm-sgd", "mlp-sgd")
SHARES = (math.inf, 0.3, 0.1, 0.03, 0.01)  # of the usual norm; infinite clips nothing
RECENT = 20  # steps that the mean of s is over
NEAR, EARLY = 0.1, 16  # as in fit.py


def usual(family: str, seed: int, rows: Sequence[dict[str, Any]]) -> float:
    """Median gradient norm of the zoo's ramp, while its learning rate is low."""
    row = next(r for r in rows if (r["family"], r["protocol"], r["seed"]) == (family, "ramp", seed))
    return median(n for n in row["norms"][:60] if n is not None)


def shrunk(row: dict[str, Any], step: int) -> float:
    """Mean of s = min(1, clip / norm) over the steps up to one."""
    recent = [n for n in row["norms"][max(0, step - RECENT) : step] if n]
    return fmean(min(1.0, (row["clip"] or math.inf) / n) for n in recent)


def wanted(seeds: int) -> Iterator[tuple[Run, float]]:
    for seed, family, protocol, share in product(range(seeds), CLIPPED, ("ramp", "warmup"), SHARES):
        rates = FAMILIES[family].rates
        lr = rates[0] if protocol == "ramp" else rates[1]
        if FAMILIES[family].optimizer == "SGD":
            lr /= min(share, 1.0)  # its steps are shorter by as much, and Adam's are not
        yield Run(family, protocol, lr, seed), share


def edges(row: dict[str, Any]) -> tuple[float | None, list[tuple[float, float]]]:
    """The learning rate that broke a ramp, and at each point before it the edge and s."""
    step = breaks(row["losses"], row["constant"])
    if step is None:
        return None, []
    broke = Run(row["family"], "ramp", row["lr"], row["seed"]).lr_at(step)
    points = [
        (broke * p["rho"] / p["lr"], shrunk(row, p["step"]))
        for p in row["probes"]
        if EARLY <= p["step"] < step and p.get("status") == "converged" and p["rho"] * shrunk(row, p["step"]) >= NEAR
    ]
    return broke, points


def mean(values: Sequence[float]) -> float | None:
    """Geometric, to three digits."""
    return float(f"{math.exp(fmean(map(math.log, values))):.3g}") if values else None


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each family and share, over seeds, and how far shares of one family lie apart with s and without."""
    table: list[dict[str, Any]] = []
    spread: dict[str, list[float]] = {"rho": [], "rho s": []}
    for family in CLIPPED:
        bands: list[tuple[float, float]] = []
        for share in SHARES:
            mine = [r for r in rows if r["family"] == family and r["share"] == (share if share < math.inf else None)]
            ramps = [edges(r) for r in mine if r["protocol"] == "ramp"]
            points = [p for _, found in ramps for p in found]
            still = [r for r in mine if r["protocol"] == "warmup"]
            late = [(p["rho"], shrunk(r, p["step"])) for r in still for p in r["probes"][-1:] if p.get("rho") is not None]
            raw, corrected = mean([e for e, _ in points]), mean([e * s for e, s in points])
            if raw and corrected:
                bands.append((math.log(raw), math.log(corrected)))
            table.append(
                {
                    "family": family,
                    "share": share if share < math.inf else None,
                    "ramps": len(ramps),
                    "broke": sum(lr is not None for lr, _ in ramps),
                    "breaking lr": mean([lr for lr, _ in ramps if lr is not None]),
                    "s": mean([s for _, s in points]),
                    "edge": raw,
                    "edge s": corrected,
                    "points": len(points),
                    "final loss at the middle rate": round(fmean(final(r["losses"]) for r in still), 3) if still else None,
                    "rho there at the end": mean([rho for rho, _ in late if rho > 0]),
                    "times s": mean([rho * s for rho, s in late if rho > 0]),
                }
            )
        if len(bands) > 1:
            for name, values in zip(spread, zip(*bands, strict=True), strict=True):
                spread[name].append(pstdev(values))
    spreads = {name: round(math.exp(fmean(found)), 2) for name, found in spread.items() if found}
    return {"runs": len(rows), "factor between shares of a family": spreads, "table": table}


def at_rest(clip: float) -> dict[str, float]:
    """Full-batch Adam, which comes to rest where rho is 1 (arXiv 2207.14484): medians over the last half of 2,000 steps."""
    family = FAMILIES["mlp-full-batch-0.99"]
    task = build(family, 0)
    optimizer = optimizer_of(family, task.model, 3e-3)
    batch, norms, found = task.draw(0, torch.Generator()), [], []
    for step in range(1, 2001):
        optimizer.zero_grad()
        task.loss(task.model, batch).backward()
        norms.append(float(nn.utils.clip_grad_norm_(task.model.parameters(), clip)))
        optimizer.step()
        if step > 1000 and step % 100 == 0:
            optimizer.zero_grad(set_to_none=True)
            rho = measured(task, [batch], optimizer)["rho"]
            s = fmean(min(1.0, clip / norm) for norm in norms[-RECENT:])
            found.append((s, rho, s * rho))
    names = ("s", "rho", "rho s")
    return {"clip": clip} | {n: float(f"{median(v):.3g}") for n, v in zip(names, zip(*found, strict=True), strict=True)}


def refitted(zoo: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The calibration's edge by rho s, s being what clipping at the zoo's own norms left; nothing uses it."""
    scaled = []
    for row in zoo:
        family = FAMILIES[row["family"]]
        own = {**row, "clip": family.clip if family.rows else math.inf}
        probes = [p | {"rho": p["rho"] * shrunk(own, p["step"])} if p.get("rho") is not None else p for p in row["probes"]]
        scaled.append({**row, "probes": probes})
    labels, found = label(zoo), {}
    for group in GROUPS:
        sets = [[(r, s) for r, s in zip(scaled, labels, strict=True) if r["held_out"] == held] for held in (False, True)]
        (rows, said), (others, theirs) = (tuple(map(list, zip(*pairs, strict=True))) for pairs in sets)
        fit = fitted(rows, said, group)
        found[group] = fit["edge"] | {"edge_held": checked(others, theirs, fit, group)["edge_held"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="sum up what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    zoo = stored()
    rows = [json.loads(line) for line in STORE.read_text().splitlines()] if STORE.exists() else []
    done = {(r["family"], r["protocol"], r["seed"], r["share"]) for r in rows}
    for run, share in wanted(0 if options.report else options.seeds):
        named = share if share < math.inf else None
        if (run.family, run.protocol, run.seed, named) in done:
            continue
        clip = share * usual(run.family, run.seed, zoo)
        row = play(run, clip=clip)
        row |= {"share": named, "clip": float(f"{clip:.4g}") if named else None}
        rows.append(row)
        with STORE.open("a") as stream:
            stream.write(json.dumps(row, separators=(",", ":")) + "\n")
        print(f"{run.family} {run.protocol} clipped to {share:g}, seed {run.seed}: {row['seconds']} s", flush=True)
    rest = [at_rest(clip) for clip in (1e9, 0.003, 0.001)]
    document = summary(rows) | {"at rest": rest, "calibration refitted with s": refitted(zoo)}
    (HERE / "results" / "clipped.json").write_text(json.dumps(document, indent=1) + "\n")
    for entry in document["table"]:
        print(*entry.values())
    print(document["factor between shares of a family"], *document["at rest"], sep="\n")
    print(json.dumps(document["calibration refitted with s"], indent=1))


if __name__ == "__main__":
    main()
