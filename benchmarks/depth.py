"""Curvature over depth: models of 4, 8, 16 and 32 blocks at initialisation and in lr warm-up.

`python benchmarks/depth.py`: top eigenvalue of the Hessian at initialisation, and of the preconditioned Hessian with rho
at steps of a linear lr warm-up, three seeds, same data. Estimates are converged to 1 % or null.
"""

from __future__ import annotations

import json
from statistics import mean, median, stdev
from typing import Any

import torch
from common import HERE
from matplotlib.figure import Figure
from runs import Run, build, loss, text, train, windows

from curvcli.curvature.davidson import Davidson
from curvcli.curvature.hvp import KeptGraph
from curvcli.curvature.operator import PreconditionedHessian
from curvcli.curvature.problem import Problem
from curvcli.optimizers.preconditioner import identity, live, prepare

DEPTHS, SEEDS, STEPS = (4, 8, 16, 32), (0, 1, 2), (10, 30, 60)
SOLVER = Davidson(tolerance=1e-2, bottom_tolerance=float("inf"), max_products=60)


def at_initialisation(depth: int, seed: int) -> float | None:
    model = build(Run(layers=depth, seed=seed))
    ids, _ = text()
    probe = windows(ids, torch.randint(len(ids) - 65, (16,), generator=torch.Generator().manual_seed(7)))
    problem = Problem.create(model, loss, [probe])
    metric = identity(problem.parameters)
    return top(problem, metric)[0]


def top(problem: Problem, metric: Any) -> tuple[float | None, float | None]:
    found = SOLVER.extremes(PreconditionedHessian(KeptGraph(problem), metric.root))
    if found.top is None or found.status != "converged":
        return None, None
    return found.top.value, found.top.value / metric.threshold if metric.threshold else None


def in_warmup(depth: int, seed: int) -> dict[int, float | None]:
    rho: dict[int, float | None] = {}

    def observe(step: int, model: Any, optimizer: Any, probe: Any) -> None:
        if step in STEPS:
            model.eval()
            problem = Problem.create(model, loss, [probe])
            rho[step] = top(problem, prepare(live(optimizer, problem.parameters), problem.parameters))[1]
            model.train()

    train(Run(lr=1e-2, layers=depth, seed=seed, steps=STEPS[-1] + 1, warmup=100), observe=observe)
    return rho


def main() -> None:
    rows: list[dict[str, Any]] = []
    for depth in DEPTHS:
        start = [at_initialisation(depth, s) for s in SEEDS]
        warm = [in_warmup(depth, s) for s in SEEDS]
        columns = {"lambda at initialisation": start} | {f"rho at step {t}": [w[t] for w in warm] for t in STEPS}
        row: dict[str, Any] = {"depth": depth}
        for name, values in columns.items():
            kept = [v for v in values if v is not None]
            row[name] = {
                "mean": mean(kept) if kept else None,
                "median": median(kept) if kept else None,
                "spread": stdev(kept) if len(kept) > 1 else None,
                "converged": len(kept),
                "values": values,
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    document = {"torch": torch.__version__, "width": Run().width, "lr": 1e-2, "seeds": len(SEEDS), "rows": rows}
    (HERE / "results" / "depth.json").write_text(json.dumps(document, indent=2) + "\n")
    plot(rows)


def plot(rows: list[dict[str, Any]]) -> None:
    """Every seed a point, the median a line. Seeds differ by decades in warm-up, so that a mean would be one seed's."""
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    pairs = [(left, "lambda at initialisation", "#1f4e9c")]
    pairs += [(right, f"rho at step {t}", c) for t, c in zip(STEPS, ("#c2641a", "#2e7d32", "#1f4e9c"), strict=True)]
    for axes, name, colour in pairs:
        points = [(r["depth"], v) for r in rows for v in r[name]["values"] if v is not None]
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=3, alpha=0.6)
        axes.plot(
            [r["depth"] for r in rows], [r[name]["median"] for r in rows], "-", color=colour, linewidth=1.2, label=name
        )
    for axes, title in ((left, "Hessian at initialisation"), (right, "lr warm-up, preconditioned")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(DEPTHS, [str(d) for d in DEPTHS])
        axes.set_xlabel("blocks")
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=0)
    right.set_yscale("log")
    left.set_ylabel("lambda")
    right.set_ylabel("rho")
    right.legend(frameon=False, fontsize=9, loc="upper left")
    figure.savefig(HERE / "results" / "depth.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
