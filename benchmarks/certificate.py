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
from dataclasses import asdict
from statistics import median
from time import process_time
from typing import Any

import networks
import spectra
import torch
from common import HERE
from oracle import Oracle, Truth

import curvcli
from curvcli.curvature.davidson import Davidson
from curvcli.errors import CurvError

LIMIT = 0.03
CERTAIN = 1e-3  # relative residual of the oracle above which a comparison is not counted

# Full model and restricted depths; layers, truncated networks and parts of the shard.
SOLVERS = (Davidson(tolerance=1e-2, max_products=100), Davidson(tolerance=3e-2, bottom_tolerance=2e-1, max_products=100))


def digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.7g}")


def truths(oracle: Oracle, seed: int) -> Iterator[tuple[str, Truth]]:
    """Everything that a report holds, by the name that `entries` gives it."""
    layers = len(oracle.blocks)
    yield "full", (full := oracle.top(oracle.names(), seed=seed))
    yield "ends", (ends := oracle.top(oracle.names(depth=0), seed=seed))
    for layer in range(layers):
        yield f"layer {layer}", oracle.top(oracle.names(layer=layer), seed=seed)
    for depth in range(layers + 1):
        known = {0: ends, layers: full}
        yield f"restricted {depth}", known.get(depth) or oracle.top(oracle.names(depth=depth), seed=seed)
    for depth in range(layers):
        yield f"truncated {depth}", oracle.top(oracle.names(depth=depth), truncated=depth, seed=seed)


def entries(report: Any) -> dict[str, Any]:
    """A report's estimates by name; the last truncated network is the full model and not named again."""
    found = {"full": report.full, "ends": report.ends, **{f"layer {e.index}": e for e in report.layers}}
    found |= {f"restricted {e.depth}": e for e in report.cumulative.restricted}
    return found | {f"truncated {e.depth}": e for e in report.cumulative.truncated[:-1]}


def checkpoint(case: networks.Case, step: int, task: networks.Task, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One checkpoint, measured and compared."""
    row: dict[str, Any] = {**asdict(case), "step": step}
    draw = torch.Generator().manual_seed(7)
    batches = [task.draw(task.rows // 2, draw) for _ in range(2)]
    whole = torch.cat(batches) if isinstance(batches[0], torch.Tensor) else tuple(map(torch.cat, zip(*batches, strict=True)))
    start = process_time()
    try:
        report = curvcli.analyze(task.model, task.loss, batches, optimizer)
    except CurvError as error:  # a run that has diverged
        return {**row, "refused": str(error)[:200], "readings": []}
    row |= {"parameters": report.checkpoint.parameters, "loss": digits(report.data.loss), "products": report.cost.hvps}
    row["seconds"] = [round(process_time() - start, 2)]
    start = process_time()
    oracle, found = Oracle(task.model, task.loss, whole, optimizer, task.stack), entries(report)
    row["readings"] = [reading(name, found[name], truth) for name, truth in truths(oracle, seed=100 + step)]
    row["seconds"].append(round(process_time() - start, 2))
    return row


def reading(name: str, entry: Any, truth: Truth) -> dict[str, Any]:
    return {
        "name": name,
        "status": entry.status,
        "value": digits(entry.eigenvalue),
        "residual": digits(entry.residual),
        "ceiling": digits(getattr(entry, "ceiling", None)),
        "products": entry.hvps,
        "truth": digits(truth.value),
        "truth_residual": digits(truth.residual),
    }


def solved(family: str, index: int) -> Iterator[dict[str, Any]]:
    """Synthetic operator by synthetic operator, at the two tolerances of an analysis in turn."""
    task = spectra.sample(family, index)
    for found, truth in spectra.solve(task, SOLVERS[index % 2], index):
        top = found.top
        ceiling = getattr(found, "ceiling", getattr(top, "ceiling", None))
        yield {
            "name": family,
            "index": index,
            "size": task.operator.space.size,
            "status": found.status,
            "value": top.value if top else None,
            "residual": top.residual if top else None,
            "ceiling": ceiling,
            "products": found.products,
            "truth": truth,
            "truth_residual": 0.0,
            "norm": task.norm,
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
    }


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


def checkpoints(name: str, most: int) -> None:
    """Measure what the store does not hold yet, then count."""
    store = HERE / "results" / f"{name}_checkpoints.jsonl"
    rows = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    done = {(row["seed"], row["step"]) for row in rows}
    for case in networks.cases():
        wanted = [step for step in networks.POINTS if (case.seed, step) not in done][: max(most - len(rows), 0)]
        for step, task, optimizer in networks.train(case, tuple(wanted)) if wanted else ():
            rows.append(checkpoint(case, step, task, optimizer))
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
        rows[family] = [row for index in range(number) for row in solved(family, index)]
        seconds[family] = round(process_time() - start, 1)
    every = [row for found in rows.values() for row in found]
    table = {"all": count(every), **{family: count(found) for family, found in rows.items()}}
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.checkpoints:
        checkpoints(options.name, options.most)
    else:
        synthetic(options.name)


if __name__ == "__main__":
    main()
