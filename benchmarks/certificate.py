"""Is what is called converged the top eigenvalue? Counts of false certificates.

A small residual proves an eigenvalue and not the largest one. `python benchmarks/certificate.py` gives the eigensolver 1,000
operators whose eigenvalues are known (`spectra.py`). With `--checkpoints` it trains 25 small networks, measures each at 8
points with `curvcli.analyze`, and compares every eigenvalue with one computed in float64 by other code (`oracle.py`); this
can be stopped at any moment and goes on.

A value is false where its status is "converged" and it is more than 3 % from the truth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from statistics import median
from time import process_time
from typing import Any

import networks
import spectra
import torch
from common import HERE
from oracle import Oracle, Truth

import curvcli
from curvcli.curvature.lanczos import Lanczos
from curvcli.errors import CurvError

LIMIT = 0.03
CERTAIN = 1e-3  # relative residual of the oracle above which a comparison is not counted

# As an analysis has them: the full model, for which the other end is waited for too; layers and truncated networks.
SOLVERS = (
    Lanczos(tolerance=1e-2, margin=3e-2, bottom_tolerance=1e-1, max_products=100),
    Lanczos(tolerance=3e-2, margin=10e-2, max_products=100),
)


def digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.7g}")


def truths(oracle: Oracle, rare: dict[str, torch.Tensor], known: dict[str, Truth], seed: int) -> Iterator[tuple[str, Truth]]:
    """Everything that a report holds, by the name that `entries` gives it; the body where there are rare rows.

    What is `known` by that name is not computed again.
    """

    def top(name: str, names: list[str], **how: Any) -> Truth:
        return known.get(name) or oracle.top(names, seed=seed, **how)

    layers = len(oracle.blocks)
    yield "full", (full := top("full", oracle.names()))
    if rare:
        yield "body", top("body", oracle.names(), still=rare)
    yield "ends", (ends := top("ends", oracle.names(depth=0)))
    for layer in range(layers):
        yield (name := f"layer {layer}"), top(name, oracle.names(layer=layer))
    for depth in range(layers + 1):
        same = {0: ends, layers: full}
        yield (name := f"restricted {depth}"), same.get(depth) or top(name, oracle.names(depth=depth))
    for depth in range(layers):
        yield (name := f"truncated {depth}"), top(name, oracle.names(depth=depth), truncated=depth)


def entries(report: Any) -> dict[str, Any]:
    """A report's estimates by name; the last truncated network is the full model and not named again."""
    found = {"full": report.full, "ends": report.ends, **{f"layer {e.index}": e for e in report.layers}}
    found |= {"body": report.body} if report.body else {}
    found |= {f"restricted {e.depth}": e for e in report.cumulative.restricted}
    return found | {f"truncated {e.depth}": e for e in report.cumulative.truncated[:-1]}


def checkpoint(
    case: networks.Case,
    step: int,
    task: networks.Task,
    optimizer: torch.optim.Optimizer,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One checkpoint, measured and compared; with the truths of `known`, a row of before, where the loss is the same."""
    row: dict[str, Any] = {**asdict(case), "step": step}
    draw = torch.Generator().manual_seed(7)
    batches = [task.draw(task.rows // 2, draw) for _ in range(2)]
    whole = networks.joined(batches)
    start = process_time()
    try:
        report = curvcli.analyze(task.model, task.loss, batches, optimizer, truncated=True)
    except CurvError as error:  # a run that has diverged
        return {**row, "refused": str(error)[:200], "readings": []}
    row |= {"parameters": report.checkpoint.parameters, "loss": digits(report.data.loss), "products": report.cost.hvps}
    row["seconds"] = [round(process_time() - start, 2)]
    start = process_time()
    oracle, found = Oracle(task.model, task.loss, whole, optimizer, task.stack), entries(report)
    rare = task.rare(whole) if report.body else {}
    same = known["readings"] if known and known.get("loss") == row["loss"] else []
    old = {r["name"]: Truth(r["truth"], r["truth_residual"], 0) for r in same}
    row["readings"] = [reading(name, found[name], truth) for name, truth in truths(oracle, rare, old, 100 + step)]
    row["seconds"].append(round(process_time() - start, 2))
    return row


def reading(name: str, entry: Any, truth: Truth) -> dict[str, Any]:
    return {
        "name": name,
        "status": entry.status,
        "value": digits(entry.eigenvalue),
        "residual": digits(entry.residual),
        "ceiling": digits(entry.ceiling),
        "products": entry.hvps,
        "truth": digits(truth.value),
        "truth_residual": digits(truth.residual),
    }


def solved(family: str, index: int) -> dict[str, Any]:
    """A synthetic operator, at one of the two settings of an analysis in turn."""
    task = spectra.sample(family, index)
    found = spectra.solve(task, SOLVERS[index % 2], index)
    top = found.top
    # As depths of the restricted curve, whose second eigenvalue serves those below them.
    told = spectra.solve(task, replace(SOLVERS[1], apart=0.9), index)
    return {
        "name": family,
        "setting": ("full", "coarse")[index % 2],
        "index": index,
        "size": task.operator.space.size,
        "status": found.status,
        "value": top.value if top else None,
        "residual": top.residual if top else None,
        "ceiling": found.ceiling if top else None,
        "products": found.products,
        "truth": task.top,
        "truth_residual": 0.0,
        "norm": task.norm,
        "second": told.second,
        "told": bool(told.top) and told.second < told.top.value,
        "truth_second": float(task.operator.values.sort().values[-2]),
    }


def error(row: dict[str, Any]) -> float:
    """Relative to the truth, beyond what float32 rounds off at the other end of the spectrum; at most 1e9."""
    beyond = abs(row["value"] - row["truth"]) - 1e-6 * row.get("norm", 0.0)
    return min(beyond / abs(row["truth"]) if row["truth"] else 1e9, 1e9) if beyond > 0 else 0.0


def is_false(row: dict[str, Any]) -> bool:
    return row["status"] == "converged" and row["truth_residual"] <= CERTAIN and error(row) > LIMIT


def is_below(row: dict[str, Any]) -> bool:
    """Whether the ceiling is no upper bound, by more than rounding."""
    return row["ceiling"] < row["truth"] - 1e-5 * abs(row["truth"]) - 1e-6 * row.get("norm", 0.0)


def is_above(row: dict[str, Any]) -> bool:
    """Whether the second eigenvalue lies above what none but the top should lie above, by more than rounding."""
    return bool(row["second"] < row["truth_second"] - 1e-5 * abs(row["truth_second"]) - 1e-6 * row["norm"])


def count(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of the readings converged, and how many of these are false; `products` is their mean."""
    sure = [r for r in readings if r["truth_residual"] <= CERTAIN]
    converged = [r for r in sure if r["status"] == "converged"]
    errors = [error(r) for r in converged]
    bounded = [r for r in sure if r["ceiling"] is not None]
    above = [r for r in bounded if r["truth"] > 0]
    return {
        "readings": len(readings),
        "without_truth": len(readings) - len(sure),
        "converged": len(converged),
        "false": sum(map(is_false, converged)),
        "worst": digits(max(errors, default=None)),
        "median": digits(median(errors)) if errors else None,
        "ceilings": len(bounded),
        "ceilings_below": sum(map(is_below, bounded)),
        "ceiling_over_truth": digits(median(r["ceiling"] / r["truth"] for r in above)) if above else None,
        "products": digits(sum(r["products"] for r in sure) / len(sure)) if sure else None,
    } | (seconds(sure) if "second" in readings[0] else {})


def seconds(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the second eigenvalue was told from the top, and how often it lies above the bound of it."""
    return {"told": sum(r["told"] for r in readings), "seconds_above": sum(map(is_above, readings))}


def show(table: dict[str, dict[str, Any]]) -> None:
    columns = list(next(iter(table.values())))
    print(" " * 22 + " ".join(f"{c[:14]:>14}" for c in columns))
    for name, row in table.items():
        print(f"{name:22}" + " ".join(f"{'-' if v is None else v:>14}" for v in row.values()), flush=True)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Counts over all checkpoints, by kind of reading, by network and by optimizer."""
    groups: dict[str, list[dict[str, Any]]] = {"all": []}
    for row in rows:
        for r in row["readings"]:
            for key in ("all", r["name"].split()[0], row["family"], row["optimizer"]):
                groups.setdefault(key, []).append(r)
    return {name: count(readings) for name, readings in groups.items()}


def stored(name: str) -> list[dict[str, Any]]:
    store = HERE / "results" / f"{name}_checkpoints.jsonl"
    return [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []


def checkpoints(name: str, most: int, truths_of: str | None) -> None:
    """Measure what the store does not hold yet, then count."""
    store, rows = HERE / "results" / f"{name}_checkpoints.jsonl", stored(name)
    before = {(row["seed"], row["step"]): row for row in (stored(truths_of) if truths_of else [])}
    done = {(row["seed"], row["step"]) for row in rows}
    for case in networks.cases():
        wanted = [step for step in networks.POINTS if (case.seed, step) not in done][: max(most - len(rows), 0)]
        for step, task, optimizer in networks.train(case, tuple(wanted)) if wanted else ():
            rows.append(checkpoint(case, step, task, optimizer, before.get((case.seed, step))))
            with store.open("a") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
    refused = sum("refused" in row for row in rows)
    table = summary(rows)
    false = [
        {k: row[k] for k in ("family", "optimizer", "lr", "seed", "step")} | r
        for row in rows
        for r in row["readings"]
        if is_false(r)
    ]
    document = {"checkpoints": len(rows), "refused": refused, "torch": torch.__version__, "counts": table, "false": false}
    (HERE / "results" / f"{name}_checkpoints.json").write_text(json.dumps(document, indent=1) + "\n")
    print(len(rows), "checkpoints,", refused, "refused")
    show(table)


def synthetic(name: str) -> None:
    """All operators, then counts by family."""
    rows: dict[str, list[dict[str, Any]]] = {}
    seconds: dict[str, float] = {}
    for family, (_, number) in spectra.FAMILIES.items():
        start = process_time()
        rows[family] = [solved(family, index) for index in range(number)]
        seconds[family] = round(process_time() - start, 1)
    every = [row for found in rows.values() for row in found]
    table = {"all": count(every), **{family: count(found) for family, found in rows.items()}}
    table |= {setting: count([row for row in every if row["setting"] == setting]) for setting in ("full", "coarse")}
    false = [{k: digits(v) if isinstance(v, float) else v for k, v in row.items()} for row in every if is_false(row)]
    samples = {family: number for family, (_, number) in spectra.FAMILIES.items()}
    document = {"torch": torch.__version__, "operators": samples, "seconds": seconds, "counts": table, "false": false}
    (HERE / "results" / f"{name}_spectra.json").write_text(json.dumps(document, indent=1) + "\n")
    print(sum(samples.values()), "operators,", round(sum(seconds.values())), "seconds")
    show(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts of false certificates.")
    parser.add_argument("--checkpoints", action="store_true", help="networks in training instead of synthetic operators")
    parser.add_argument("--name", default="certificate", help="of the result files")
    parser.add_argument("--most", type=int, default=10**9, help="stop after so many checkpoints")
    parser.add_argument("--truths", help="earlier result whose truths are taken where the loss is the same to 7 digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.checkpoints:
        checkpoints(options.name, options.most, options.truths)
    else:
        synthetic(options.name)


if __name__ == "__main__":
    main()
