"""Estimators of the top eigenvalue over a real training run, at equal Hessian-vector products.

`python benchmarks/tracking.py`: every fourth step of a run, each estimator gets the same number of products on the
same probe; the truth is curv's own solver run on to a relative residual of 1e-4 (at most 100 products), which a
dense test holds (tests/training/test_tracker.py). Power iteration is the paper's (arXiv 2606.16768), warm from the last
measured step, transported as curv's is. Also what the tracker costs beside a training step.
"""

from __future__ import annotations

import json
from statistics import median
from time import perf_counter
from typing import Any

import torch
from common import HERE, flatten
from matplotlib.figure import Figure
from runs import Run, loss, text, train, windows
from torch import Tensor

from curvcli.curvature.davidson import Davidson
from curvcli.curvature.hvp import KeptGraph
from curvcli.curvature.operator import Operator, PreconditionedHessian
from curvcli.curvature.problem import Problem
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.training import CurvatureTracker

RUN = Run(lr=1e-2, layers=8, width=64, steps=112, warmup=40)
BUDGETS = (1, 2, 3, 5, 8)
EVERY, FIRST = 4, 8


def krylov(operator: Operator, start: Tensor | None, products: int) -> tuple[float, Tensor]:
    solver = Davidson(tolerance=0, bottom_tolerance=float("inf"), max_products=products)
    top = solver.extremes(operator, [] if start is None else [start]).top
    assert top is not None
    return top.value, top.vector


def power(operator: Operator, start: Tensor | None, products: int) -> tuple[float, Tensor]:
    vector = torch.randn(operator.space.size, generator=torch.Generator().manual_seed(0)) if start is None else start
    value = float("nan")
    for _ in range(products):
        vector = vector / vector.norm()
        image = operator.matvec(vector)
        value = float(vector @ image)
        vector = image
    return value, vector / vector.norm()


ESTIMATORS = {
    "curv, warm": (krylov, True),
    "curv, cold": (krylov, False),
    "power, warm": (power, True),
    "power, cold": (power, False),
}


def compare() -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []
    chains: dict[tuple[str, int], Tensor] = {}  # eigenvectors in the weights' own coordinates
    truth: list[Tensor] = []

    def observe(step: int, model: Any, optimizer: Any, probe: Tensor) -> None:
        if step < FIRST or step % EVERY:
            return
        model.eval()
        problem = Problem.create(model, loss, [probe])
        metric = prepare(live(optimizer, problem.parameters), problem.parameters)
        operator = PreconditionedHessian(KeptGraph(problem), metric.root)
        scale = flatten(list(metric.root.lift(torch.ones(operator.space.size)).values()))
        inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
        exact = Davidson(tolerance=1e-4, bottom_tolerance=0.5, max_products=100, basis=60)
        found = exact.extremes(operator, [t * inverse for t in truth])
        assert found.top is not None
        assert found.bottom is not None
        truth[:] = [found.top.vector * scale]
        row: dict[str, Any] = {
            "step": step,
            "lambda": found.top.value,
            "most_negative": found.bottom.value,
            "residual": found.top.residual / abs(found.top.value),
            "errors": {},
        }
        for name, (estimate, warm) in ESTIMATORS.items():
            for budget in BUDGETS:
                before = chains.get((name, budget)) if warm else None
                start = None if before is None else before * inverse
                value, vector = estimate(operator, None if start is None else start / start.norm(), budget)
                chains[name, budget] = vector * scale
                row["errors"][f"{name}, {budget}"] = abs(value - found.top.value) / abs(found.top.value)
        points.append(row)
        print(
            step, f"{found.top.value:.4g}", {k: f"{v:.1e}" for k, v in row["errors"].items() if k.endswith(" 5")}, flush=True
        )
        model.train()

    train(RUN, observe=observe)
    return points


def costs() -> dict[str, float]:
    """Seconds of a tracked step over those of a training step, five products, probe and batch of equal size."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"train": [], "track": []}

    def observe(step: int, model: Any, optimizer: Any, probe: Tensor) -> None:
        if step < 5:
            return
        ids, _ = text()
        batch = windows(ids, torch.arange(len(probe)) * 100)
        start = perf_counter()
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        times["train"].append(perf_counter() - start)
        if "tracker" not in shared:
            shared["tracker"] = CurvatureTracker(
                model, optimizer, loss, probe=[probe], tolerance=1e-12, max_hvps=5, update_ratio=False
            )
            shared["tracker"].step(0)  # the first measurement checks the second derivative once
        start = perf_counter()
        record = shared["tracker"].step(step)
        times["track"].append(perf_counter() - start)
        assert record.hvps == 5

    shared: dict[str, Any] = {}
    train(Run(lr=1e-3, layers=8, width=64, steps=25), observe=observe)
    step, track = median(times["train"]), median(times["track"])
    return {"training_step_seconds": step, "tracked_step_seconds": track, "percent_of_a_training_step": 100 * track / step}


def plot(points: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colours = dict(zip(ESTIMATORS, ("#1f4e9c", "#8fb0e0", "#c2641a", "#e8b48a"), strict=True))
    for name in ESTIMATORS:
        middle = [100 * median(p["errors"][f"{name}, {b}"] for p in points) for b in BUDGETS]
        worst = [100 * max(p["errors"][f"{name}, {b}"] for p in points) for b in BUDGETS]
        axes.plot(BUDGETS, middle, "o-", color=colours[name], label=name, markersize=4)
        axes.plot(BUDGETS, worst, ":", color=colours[name], linewidth=1)
    axes.axhline(0.1, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("Hessian-vector products per measurement")
    axes.set_ylabel("relative error of lambda, %")
    axes.set_title("median (solid) and worst (dotted) over a training run", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(HERE / "results" / "tracking.png", metadata={"Software": None})


def main() -> None:
    points = compare()
    errors = {key: [100 * p["errors"][key] for p in points] for key in points[0]["errors"]}
    table = {key: {"median_percent": median(values), "worst_percent": max(values)} for key, values in errors.items()}
    document = {"torch": torch.__version__, "layers": RUN.layers, "width": RUN.width, "lr": RUN.lr, "points": len(points)}
    document |= {"errors": table, "cost": costs(), "rows": points}
    (HERE / "results" / "tracking.json").write_text(json.dumps(document, indent=2) + "\n")
    plot(points)
    print(json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=2))


if __name__ == "__main__":
    main()
