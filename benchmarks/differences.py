"""How near do differences of gradients come to exact products, and what does the length of a step do to them?

`python benchmarks/differences.py` solves each part of some samples both ways, on 256 tokens, and multiplies each vector that
differences ended with exactly: that residual is the true one. `--lengths` makes the full model's on 2,048 tokens by
steps relative to the weights.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch
from common import SAMPLES

from curvcli.analysis.api import prepared
from curvcli.analysis.checkpoint import Options, open_for_analysis
from curvcli.analysis.solve import Measurement
from curvcli.curvature.differences import build
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.precision import norm
from curvcli.curvature.stepped import suited

RUNS = ("hot/checkpoint-60", "hot/checkpoint-600")
SOLVER = Lanczos(tolerance=1e-2, margin=3e-2, max_products=100)
LENGTHS = (1e-2, 1e-3, 1e-4, 3e-5)


def solves(work: Measurement, name: str) -> None:
    """Every part both ways."""
    solver, step = suited(work.solver, "differences")
    exactly, roughly = build(work.problem, "fresh", None), build(work.problem, "differences", step)
    rows: list[list[float]] = []
    for part in (work.names, work.outer, *work.layer_names):
        operator = work.operator(exactly, part)
        one, other = work.solver.extremes(operator), solver.extremes(work.operator(roughly, part))
        assert one.top is not None
        assert other.top is not None
        assert other.vector is not None
        assert one.status == other.status == "converged"
        value = other.top.value
        true = float((operator.matvec(other.vector) - value * other.vector).norm())
        rows.append([abs(value / one.top.value - 1), other.top.residual / value, true / value, one.products, other.products])
        assert true <= other.top.residual
    errors, said, true, spent, more = zip(*rows, strict=True)
    print(
        f"{name}: {len(rows)} solves, error {median(errors):.1e}, {max(errors):.1e}; residual {max(said):.1e}, "
        f"{max(true):.1e}; products {sum(spent):.0f}, {sum(more):.0f}",
        flush=True,
    )


def lengths(work: Measurement, name: str) -> None:
    """Products of the full model by steps relative to the weights."""
    exact = work.operator(build(work.problem, "fresh", None), work.names)
    found = work.solver.extremes(exact)
    _, step = suited(work.solver, "differences")
    assert step is not None
    assert found.top is not None
    assert found.vector is not None
    rough = work.operator(build(work.problem, "differences", step), work.names)
    start = exact.space.random(torch.Generator().manual_seed(0))
    for what, vector in (("random", start / start.norm()), ("top", found.vector)):
        image = exact.matvec(vector)
        size = norm([work.problem.parameters[n] for n in work.names]) / norm(rough.root.apply(rough.root.split(vector)))
        errors = []
        for relative in LENGTHS:
            with step.of(relative * size):
                errors.append(float((rough.matvec(vector) - image).norm()) / found.top.value)
        print(f"{name}, {what}: {', '.join(f'{error:.0e}' for error in errors)}", flush=True)


def main() -> None:
    """Of every sample named in RUNS."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", action="store_true")
    wanted = parser.parse_args().lengths
    for name in RUNS:
        options = Options(tokens=2048 if wanted else 256, device="cpu", depths=False)
        opened = open_for_analysis(SAMPLES / name, options)
        ready = opened.ready()

        def measure(work: Any, notes: dict[str, str], name: str = name) -> None:
            (lengths if wanted else solves)(work, name)

        prepared(
            ready.model, opened.loss, ready.batches, ready.optimizer, measure, weights=ready.weights, mode="fresh",
            solver=SOLVER, depths=False,
        )  # fmt: skip


if __name__ == "__main__":
    main()
