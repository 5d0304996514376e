"""What the eigensolver itself takes where products are cheap: 10 M parameters and 64 tokens, beside PyHessian.

    pip install -e '.[bench]' && python benchmarks/solver.py

CPU seconds of one thread for the top eigenvalue of the bare Hessian, set-up and ten products, the least of three runs that
take turns; and the seconds of a product. The rest is the solver's: inner products, a basis, Ritz values, a bound from above.
Ten steps of Lanczos are worth more than ten of PyHessian's power iteration, so the same is asked until 1 % of the truth
too, beside hessian-eigenthings: each is told how many products bring it there, and run again three times with those.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import save
from peers import COUNTS, Logits, climb, eigenthings, operator
from peers import curv as lanczos
from peers import pyhessian as power
from runs import SEQUENCE, Run, build, loss, text, windows
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.problem import Problem

PRODUCTS, RUNS = 10, 3


def curv(problem: Problem) -> dict[str, float]:
    """Seconds of all, and of the products in it."""
    started = time.process_time()
    made = operator(problem)
    inner, taken = made.hvp, []

    class Timed:
        def product(self, *given: Any) -> list[torch.Tensor]:
            before = time.process_time()
            found = inner.product(*given)
            taken.append(time.process_time() - before)
            return found

    made.hvp = Timed()  # type: ignore[assignment]
    Lanczos(tolerance=0.0, max_products=PRODUCTS).extremes(made)
    return {"all": time.process_time() - started, "products": sum(taken)}


def pyhessian(problem: Problem) -> dict[str, float]:
    """The same of PyHessian."""
    from pyhessian import hessian

    class Loss(nn.Module):
        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs, targets.flatten())

    found = torch.cat(list(problem.batches))
    started = time.process_time()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative; curv sees to that itself
        tool = hessian(Logits(problem.model), Loss(), data=(found, found[:, 1:]), cuda=False)
    tool.eigenvalues(maxIter=PRODUCTS, tol=0.0, top_n=1)
    return {"all": time.process_time() - started}


def told(problem: Problem) -> dict[str, Any]:
    """Products until 1 % of the truth, and CPU seconds of each library with these, set-up included."""
    truth = Lanczos(tolerance=1e-5, margin=1e-4, max_products=300).extremes(operator(problem)).top
    assert truth is not None
    found: dict[str, Any] = {"truth": truth.value}
    tools = {"curv": lanczos, "hessian-eigenthings": eigenthings, "PyHessian": power}
    for name, tool in tools.items():
        with sdpa_kernel(SDPBackend.MATH):
            row = climb(lambda n, t=tool: t(problem, n), truth.value, COUNTS)
        found[name] = {"reached": row.get("reached", False), "products": row.get("hvps"), "runs": []}
    for _ in range(RUNS):
        for name, tool in tools.items():
            if found[name]["reached"]:
                with contextlib.redirect_stdout(io.StringIO()), sdpa_kernel(SDPBackend.MATH):
                    started = time.process_time()
                    tool(problem, found[name]["products"])
                    found[name]["runs"].append(round(time.process_time() - started, 3))
    for name in tools:
        found[name]["least"] = min(found[name]["runs"], default=None)
    return found


def main() -> None:
    torch.set_num_threads(1)
    ids, _ = text()
    model = build(Run(layers=8, width=352)).eval()
    problem = Problem.create(model, loss, [windows(ids, torch.tensor([1000]))])
    size = sum(p.numel() for p in problem.parameters.values())
    rows: dict[str, list[dict[str, float]]] = {"curv": [], "PyHessian": []}
    tools: dict[str, Callable[[Problem], dict[str, float]]] = {"curv": curv, "PyHessian": pyhessian}
    for _ in range(RUNS):
        for name, tool in tools.items():
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                rows[name].append(tool(problem))
            model.zero_grad(set_to_none=True)
    solver = [(row["all"] - row["products"]) / size / PRODUCTS * 1e9 for row in rows["curv"]]
    seconds = {name: [round(row["all"], 3) for row in found] for name, found in rows.items()}
    found = {name: {"least": min(values), "median": median(values), "runs": values} for name, values in seconds.items()}
    product = min(row["products"] for row in rows["curv"]) / PRODUCTS
    found |= {"curv's product": round(product, 4), "curv beside products, ns a parameter and product": round(min(solver), 1)}
    shape = {"parameters": size, "tokens": SEQUENCE, "products": PRODUCTS, "threads": 1, "torch": torch.__version__}
    save("solver", {**shape, "cpu_seconds": found, "to 1 %": told(problem)})


if __name__ == "__main__":
    main()
