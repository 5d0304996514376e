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
import torch
from common import HERE
from oracle import Oracle, Truth

import curvcli
from curvcli.errors import CurvError

LIMIT = 0.03
CERTAIN = 1e-3  # relative residual of the oracle above which a comparison is not counted


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


def error(row: dict[str, Any]) -> float:
    return abs(row["value"] - row["truth"]) / abs(row["truth"])


def count(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of the readings converged, and how many of these are false."""
    sure = [r for r in readings if r["truth_residual"] <= CERTAIN]
    converged = [r for r in sure if r["status"] == "converged"]
    errors = [error(r) for r in converged]
    bounded = [r for r in sure if r["ceiling"] is not None]
    return {
        "readings": len(readings),
        "without_truth": len(readings) - len(sure),
        "converged": len(converged),
        "false": sum(e > LIMIT for e in errors),
        "worst": digits(max(errors, default=None)),
        "median": digits(median(errors)) if errors else None,
        "ceilings": len(bounded),
        "ceilings_below": sum(r["ceiling"] < r["truth"] - 1e-5 * abs(r["truth"]) for r in bounded),
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
        if r["status"] == "converged" and r["truth_residual"] <= CERTAIN and error(r) > LIMIT
    ]
    document = {"checkpoints": len(rows), "refused": refused, "torch": torch.__version__, "counts": table, "false": false}
    (HERE / "results" / f"{name}_checkpoints.json").write_text(json.dumps(document, indent=1) + "\n")
    print(len(rows), "checkpoints,", refused, "refused")
    show(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts of false certificates.")
    parser.add_argument("--checkpoints", action="store_true", help="networks in training instead of synthetic operators")
    parser.add_argument("--name", default="certificate", help="of the result files")
    parser.add_argument("--most", type=int, default=10**9, help="stop after so many checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoints(options.name, options.most)


if __name__ == "__main__":
    main()
