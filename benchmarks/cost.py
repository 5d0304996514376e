"""What an analysis costs in products of the full model, by depth of the network: `python benchmarks/cost.py`.

Llamas of 8, 16 and 32 blocks of width 16 after 60 steps of AdamW, 512 tokens in two batches, one thread. A stage's cost is
its CPU seconds over those of one product of the full model by the same kept graphs: the median of five that are taken
right before and five right after, since other work on a machine moves even CPU seconds.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from math import log
from statistics import median
from typing import Any

import torch
from common import save
from runs import SEQUENCE, Run, loss, text, train, windows

import curvcli
from curvcli.curvature.hvp import build, random_direction
from curvcli.curvature.problem import Problem

STEP, ROWS, BATCHES = 60, 4, 2
# Stages that come before the verdict; what is neither one of them nor of a curve is of the profile of layers.
VERDICT = ("choosing", "gradient", "full", "next")


def product_seconds(problem: Problem) -> list[float]:
    """CPU seconds of products of the full model."""
    engine, names, tangents = build(problem, "kept"), list(problem.parameters), random_direction(problem)
    taken = []
    for _ in range(6):
        started = time.process_time()
        engine.product(names, tangents)
        taken.append(time.process_time() - started)
    return taken[1:]


def stages(model: Any, optimizer: Any, batches: list[Any], *, truncated: bool) -> tuple[curvcli.Report, Counter[str]]:
    """A report, and the CPU seconds of each stage by the first word of its name."""
    seconds: Counter[str] = Counter()
    now = ["choosing", time.process_time()]

    def progress(stage: str, done: float) -> None:
        moment = time.process_time()
        seconds[now[0]] += moment - now[1]
        # What is left of the full model's solve where its verdict did not need it comes after the verdict.
        now[:] = "rest" if stage.endswith("with rare rows") else stage.partition(" ")[0].strip(","), moment

    def verdict(report: curvcli.Report) -> None:  # the companions that follow are of the same stage
        progress("companions", 0.0)

    report = curvcli.analyze(model, loss, batches, optimizer, progress=progress, on_verdict=verdict, truncated=truncated)
    progress("", 1.0)
    return report, seconds


def measure(depth: int, width: int, *, truncated: bool) -> dict[str, Any]:
    """The costs of one depth, in products of the full model."""
    found: dict[str, Any] = {}

    def observe(step: int, model: Any, optimizer: Any, probe: Any) -> None:
        if step != STEP:
            return
        ids, _ = text()
        starts = torch.randint(len(ids) - SEQUENCE - 1, (ROWS * BATCHES,), generator=torch.Generator().manual_seed(7))
        batches = list(windows(ids, starts).split(ROWS))
        model.eval()
        problem = Problem.create(model, loss, batches)
        taken = product_seconds(problem)
        report, seconds = stages(model, optimizer, batches, truncated=truncated)
        unit = median(taken + product_seconds(problem))
        model.train()
        cost = {stage: round(taken / unit, 1) for stage, taken in seconds.items() if stage}
        verdict = sum(cost.get(stage, 0.0) for stage in VERDICT)
        layers, curve = cost["layer"] + cost["embedding"], cost["restricted"]
        parts, depths = [report.ends, *report.layers], report.cumulative.restricted
        statuses = [e.status for e in (report.full, *report.layers, *depths) if e]
        found.update(
            depth=depth, product_cpu_seconds=round(unit, 4), verdict=round(verdict, 1), layers=round(layers, 1),
            restricted=curve, truncated=cost.get("truncated"), companions=cost.get("companions"),
            profile_per_layer=round((layers + curve) / depth, 2),
            products_of_a_layer=round(sum(e.hvps for e in report.layers) / depth, 1),
            cold_depths=sum(e.hvps > 4 for e in depths[1:-1]),
            converged=f"{statuses.count('converged')} of {len(statuses)}",
            values={"full": report.full.eigenvalue, "parts": [e and e.eigenvalue for e in parts],
                    "restricted": [e.eigenvalue for e in depths]},
        )  # fmt: skip

    train(Run(layers=depth, width=width, lr=3e-3, steps=STEP + 1), observe=observe)
    return found


def exponent(rows: list[dict[str, Any]]) -> float:
    """Slope of log (cost of layers and restricted depths) over log depth, by least squares."""
    x = [log(row["depth"]) for row in rows]
    y = [log(row["layers"] + row["restricted"]) for row in rows]
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--truncated", action="store_true", help="networks cut short, too")
    parser.add_argument("--name", default="cost")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for depth in options.depths:
        rows.append(measure(depth, options.width, truncated=options.truncated))
        slope = round(exponent(rows), 2) if len(rows) > 1 else None
        save(options.name, {"torch": torch.__version__, "width": options.width, "exponent": slope, "depths": rows})


if __name__ == "__main__":
    main()
