"""How often does the curvature of the data lie within the bracket that a shard of it gives? The claim is 90 %.

`python benchmarks/coverage.py` trains the 25 small networks of `networks.py`, measures each at four steps on a shard of 512
predictions (64 images) in 8 batches, as `curv analyze` does, and then on 20 times as many that were drawn anew, with the
same weights and preconditioner: that is called the truth, and overstates the data's own a little. The truth of a `body` has
no rows of the embedding that the shard looks up fewer than ten times. The bracket of before went from v.Gv on the second
half of the shard, for the top vector v of the first, to the shard's own eigenvalue; it is formed of the same products. This
can be stopped at any moment and goes on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import product
from statistics import median
from time import process_time
from typing import Any

import networks
import torch
from common import HERE
from torch import Tensor

from curvcli.analysis.solve import Measurement
from curvcli.analysis.whole import RARE_MASS
from curvcli.curvature.folds import Folds
from curvcli.curvature.hvp import build
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.operator import Operator
from curvcli.curvature.problem import Problem, measurable
from curvcli.curvature.ritz import Extremes
from curvcli.optimizers.preconditioner import live, prepare

POINTS = (30, 200, 80, 8)
BATCHES, TIMES = 8, 20
SOLVER = Lanczos(tolerance=1e-2, margin=3e-2, max_products=100)
TRUTH = Lanczos(tolerance=2e-2, margin=1e-1, max_products=100)


def work_on(task: networks.Task, batches: list[Any], optimizer: torch.optim.Optimizer) -> Measurement:
    """An analysis without layers."""
    problem = Problem.create(task.model, task.loss, batches)
    preconditioner = prepare(live(optimizer, problem.parameters), problem.parameters)
    return Measurement(problem, preconditioner, None, SOLVER, "kept", lambda stage, done: None)


def solve(solver: Lanczos, operator: Operator, mask: Tensor | None) -> Extremes:
    """The full model, or what `mask` leaves of it."""
    found = solver.extremes(operator, support=mask)
    assert found.top is not None
    return found


def without(work: Measurement, rare: dict[str, Tensor]) -> Tensor:
    """True on the entries of a flat vector that are in no row of `rare`."""
    parameters = ((n, work.problem.parameters[n]) for n in work.names)
    return torch.cat(
        [
            (~rare[n])[:, None].expand_as(p).flatten() if n in rare else torch.ones(p.numel(), dtype=torch.bool)
            for n, p in parameters
        ]
    )


def quotient(folds: Folds) -> float:
    """v.Gv on the second half of the folds, for the top vector v of the first."""
    half = len(folds.weights) // 2
    vector = torch.linalg.eigh(folds.matrices[:half].mean(dim=0)).eigenvectors[:, -1]
    return float(vector @ folds.matrices[half:].mean(dim=0) @ vector)


def reading(shard: Measurement, mask: Tensor | None, data: Operator, common: Tensor | None) -> tuple[dict[str, Any], Any]:
    """One bracket and what it should hold, over the threshold; and the top vector on the shard.

    The truth is that of the entries that `mask` leaves; `common`, that of those that are in no rare row.
    """
    whole = shard.folded(build(shard.problem, "kept"))
    found, truths = solve(SOLVER, whole, mask), [solve(TRUTH, data, mask)]
    folds = Folds([weight for weight, _ in whole.folds], whole.projected())
    truths.append(truths[0] if common is None or mask is common else solve(TRUTH, data, common))
    spread, top, scale = folds.spread(), found.top, shard.preconditioner.threshold
    low, high = spread.bracket(top.value, max(top.residual, found.ceiling - top.value))
    numbers = {"rho": top.value, "low": low, "high": high, "error": spread.error, "held_out": spread.held_out}
    numbers |= {"truth": truths[0].top.value, "common": truths[1].top.value}
    numbers |= {"before_low": quotient(folds), "before_high": top.value + top.residual}
    row: dict[str, Any] = {"of": "full model" if mask is None else "body"}
    row["converged"] = all(e.status == "converged" for e in (found, *truths))
    return row | {name: float(f"{number / scale:.6g}") for name, number in numbers.items()}, found.vector


def checkpoint(case: networks.Case, step: int, task: networks.Task, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The bracket of the full model; of the body, too, where a report has one, which then is what it judges."""
    start, seed = process_time(), 1000 * case.seed + step  # of a shard of its own: all of one draw would share one luck
    draw = torch.Generator().manual_seed(seed)
    rows = task.rows // 4
    batches = [task.draw(rows, draw) for _ in range(BATCHES)]
    with measurable(task.model):
        shard = work_on(task, batches, optimizer)
        many = work_on(task, [task.draw(2 * rows * BATCHES, draw) for _ in range(TIMES // 2)], optimizer)
        data = many.operator(build(many.problem, "kept"), many.names)
        rare = task.rare(networks.joined(batches))
        common = without(shard, rare) if rare else None
        full, vector = reading(shard, None, data, common)
        readings = [full]
        if common is not None and float(vector[~common].double().square().sum()) >= RARE_MASS:
            readings.append(reading(shard, common, data, common)[0])
    return {**asdict(case), "step": step, "draw": seed, "seconds": round(process_time() - start, 2), "readings": readings}


def count(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """How many brackets hold the truth, how many truths lie below or above, and how wide brackets are, over rho."""
    sure = [r for r in readings if r["converged"]]
    counts: dict[str, Any] = {"readings": len(sure)}
    for name, low, high, truth in (
        ("", "low", "high", "truth"),
        ("common ", "low", "high", "common"),
        ("before ", "before_low", "before_high", "truth"),
        ("before common ", "before_low", "before_high", "common"),
    ):
        below, above = sum(r[truth] < r[low] for r in sure), sum(r[truth] > r[high] for r in sure)
        held = sum(r[low] <= r[truth] <= r[high] for r in sure)  # an end of before may lie beyond the other
        counts |= {f"{name}held": held, f"{name}below": below, f"{name}above": above}
    for name in ("", "before "):
        ends = ("before_low", "before_high") if name else ("low", "high")
        counts[f"{name}width"] = round(median((r[ends[1]] - r[ends[0]]) / r["rho"] for r in sure), 3) if sure else None
    return counts


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a report judges, as a whole, by kind, by network and by optimizer; and the full models that have a body."""
    groups: dict[str, list[dict[str, Any]]] = {"judged": []}
    for row in rows:
        judged = row["readings"][-1]
        kind = "body" if judged["of"] == "body" else "full model, no body"
        for key in ("judged", kind, row["family"], row["optimizer"], "draw 7" if row["draw"] == 7 else "own draws"):
            groups.setdefault(key, []).append(judged)
        if kind == "body":
            groups.setdefault("full model of these", []).append(row["readings"][0])
    return {name: count(readings) for name, readings in groups.items()}


def show(table: dict[str, dict[str, Any]]) -> None:
    for key in table["judged"]:
        print(f"{key:20}" + " ".join(f"{row[key] if row[key] is not None else '-':>8}" for row in table.values()))
    print("\n".join(f"{i}: {name}" for i, name in enumerate(table)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=10**9, help="stop after so many checkpoints")
    most = parser.parse_args().most
    torch.set_num_threads(1)
    store = HERE / "results" / "coverage.jsonl"
    rows = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    done = {(row["seed"], row["step"]) for row in rows}
    points = list(product(POINTS, networks.cases()))
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = (points[i] for i in order)  # so that half a result is not of half the networks
    wanted = [(step, case) for step, case in mixed if (case.seed, step) not in done]
    for step, case in wanted[: max(most - len(rows), 0)]:
        ((_, task, optimizer),) = networks.train(case, (step,))
        rows.append(checkpoint(case, step, task, optimizer))
        with store.open("a") as stream:
            stream.write(json.dumps(rows[-1]) + "\n")
    table = summary(rows)
    document = {"checkpoints": len(rows), "torch": torch.__version__, "counts": table}
    (HERE / "results" / "coverage.json").write_text(json.dumps(document, indent=1) + "\n")
    show(table)


if __name__ == "__main__":
    main()
