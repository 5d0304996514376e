"""What an analysis costs in products of the full model, by depth of the network: `python benchmarks/cost.py`.

Llamas of 8, 16 and 32 blocks after 60 steps of AdamW, 2,048 tokens in four batches, one thread. A stage's cost is its CPU
seconds over those of one product of the full model by the same kept graphs, which is the median of five taken right before.
"""

from __future__ import annotations

import time
from collections import Counter
from statistics import median
from typing import Any

import torch
from common import save
from runs import SEQUENCE, Run, loss, text, train, windows

import curvcli
from curvcli.curvature.hvp import build, random_direction
from curvcli.curvature.problem import Problem

DEPTHS, STEP, ROWS, BATCHES = (8, 16, 32), 60, 8, 4
# Stages that come before the verdict; what is neither one of them nor of a curve is of the profile of layers.
VERDICT = ("choosing", "gradient", "full", "next")


def product_seconds(problem: Problem) -> float:
    """CPU seconds of a product of the full model."""
    engine, names, tangents = build(problem, "kept"), list(problem.parameters), random_direction(problem)
    taken = []
    for _ in range(6):
        started = time.process_time()
        engine.product(names, tangents)
        taken.append(time.process_time() - started)
    return median(taken[1:])


def stages(model: Any, optimizer: Any, batches: list[Any]) -> tuple[curvcli.Report, Counter[str]]:
    """A report, and the CPU seconds of each stage by the first word of its name."""
    seconds: Counter[str] = Counter()
    now = ["choosing", time.process_time()]

    def progress(stage: str, done: float) -> None:
        moment = time.process_time()
        seconds[now[0]] += moment - now[1]
        now[:] = stage.partition(" ")[0].strip(","), moment

    def verdict(report: curvcli.Report) -> None:  # the companions that follow are of the same stage
        progress("companions", 0.0)

    report = curvcli.analyze(model, loss, batches, optimizer, progress=progress, on_verdict=verdict, truncated=True)
    progress("", 1.0)
    return report, seconds


def measure(depth: int) -> dict[str, Any]:
    """The costs of one depth, in products of the full model."""
    found: dict[str, Any] = {}

    def observe(step: int, model: Any, optimizer: Any, probe: Any) -> None:
        if step != STEP:
            return
        ids, _ = text()
        starts = torch.randint(len(ids) - SEQUENCE - 1, (ROWS * BATCHES,), generator=torch.Generator().manual_seed(7))
        batches = list(windows(ids, starts).split(ROWS))
        model.eval()
        unit = product_seconds(Problem.create(model, loss, batches))
        report, seconds = stages(model, optimizer, batches)
        model.train()
        cost = {stage: round(taken / unit, 1) for stage, taken in seconds.items() if stage}
        verdict = sum(cost.get(stage, 0.0) for stage in VERDICT)
        layers, curve = cost["layer"] + cost["embedding"], cost["restricted"]
        statuses = [e.status for e in (report.full, *report.layers, *report.cumulative.restricted)]
        found.update(
            depth=depth, product_cpu_seconds=round(unit, 4), verdict=round(verdict, 1), layers=round(layers, 1),
            restricted=curve, truncated=cost.get("truncated"), companions=cost.get("companions"),
            profile_per_layer=round((layers + curve) / depth, 2),
            converged=f"{statuses.count('converged')} of {len(statuses)}",
        )  # fmt: skip

    train(Run(layers=depth, lr=3e-3, steps=STEP + 1), observe=observe)
    return found


def main() -> None:
    torch.set_num_threads(1)
    save("cost", {"torch": torch.__version__, "depths": [measure(depth) for depth in DEPTHS]})


if __name__ == "__main__":
    main()
