"""Products and seconds to 1 % of the true top eigenvalue, against three libraries, in one process.

    pip install -e '.[bench]' && python benchmarks/peers.py && python benchmarks/peers.py --profile

All see the same model, the same batch and the bare Hessian (none of them knows a preconditioner). The truth is curv's own
eigensolver run to a residual of 1e-5. Each library climbs its own effort until its answer is within 1 % of the truth; the
products and seconds of that call are reported, or what it said at its limit: the accuracy is the same for all, and no
nominal tolerance is. curvlinops hands ARPACK its operator, whose products are counted, and climbs ARPACK's tolerance. Nobody
is told the truth in use: "curv certified" is what `curv analyze` does, which goes on until a bound from above is within 3 %.

`--profile` asks the same of the full model, of embedding and head, and of each layer, and adds up. To peers a part is a
model whose other parameters need no gradient. curv is told no truth there: each part is solved as `curv analyze` does.
Beside what peers need when they are told, each is run as it comes, by its defaults: PyHessian stops by itself, and
hessian-eigenthings makes 20 products for the 10 eigenvalues that are largest in size, of which the first is taken.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
from common import SAMPLES, arguments, machine, problem, save
from torch import nn

from curvcli.curvature.davidson import Davidson
from curvcli.curvature.hvp import build
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.operator import PreconditionedHessian
from curvcli.curvature.problem import Problem
from curvcli.data.tasks import causal_loss
from curvcli.optimizers.preconditioner import identity

COUNTS = (*range(2, 13), 15, 20, 25, 30, 40)  # the same for all
FEW = (3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40)  # of a part


def operator(task: Problem) -> PreconditionedHessian:
    return PreconditionedHessian(build(task, "kept"), identity(task.parameters).root)


class Logits(nn.Module):
    """The model as a function of a tensor of windows, for libraries that call model(inputs)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=windows[:, :-1], use_cache=False).logits.flatten(0, 1)


def curv(task: Problem, count: int) -> tuple[float, int]:
    found = Lanczos(tolerance=1e-12, max_products=count).extremes(operator(task))
    assert found.top is not None
    return found.top.value, found.products


def curv_warm(task: Problem, count: int, start: torch.Tensor) -> tuple[float, int]:
    found = Davidson(tolerance=1e-12, bottom_tolerance=float("inf"), max_products=count).extremes(operator(task), [start])
    assert found.top is not None
    return found.top.value, found.products


def certified(task: Problem) -> dict[str, Any]:
    start = perf_counter()
    found = Lanczos().extremes(operator(task))
    took = perf_counter() - start
    assert found.top is not None
    return {
        "value": found.top.value,
        "ceiling": found.ceiling,
        "status": found.status,
        "hvps": found.products,
        "seconds": round(took, 3),
    }


def pyhessian(task: Problem, count: int, tolerance: float = 0.0) -> tuple[float, int]:
    from pyhessian import hessian

    class Loss(nn.Module):
        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs, targets.flatten())

    windows = torch.cat(list(task.batches))
    tool = hessian(Logits(task.model), Loss(), data=(windows, windows[:, 1:]), cuda=windows.is_cuda)
    values, _ = tool.eigenvalues(maxIter=count, tol=tolerance, top_n=1)
    return float(values[0]), count


def pyhessian_alone(task: Problem) -> dict[str, Any]:
    """PyHessian with its own defaults for when to stop; its products are counted."""
    module: Any = import_module("pyhessian.hessian")  # the package has a class of the same name
    product, made = module.hessian_vector_product, 0

    def counted(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        return product(*arguments)

    module.hessian_vector_product = counted
    try:
        start = perf_counter()
        value, _ = pyhessian(task, 100, 1e-3)
        return {"value": value, "hvps": made, "seconds": round(perf_counter() - start, 3)}
    finally:
        module.hessian_vector_product = product


def eigenthings(task: Problem, count: int) -> tuple[float, int]:
    from hessian_eigenthings import algorithms, operators

    windows = torch.cat(list(task.batches))
    made = operators.HessianOperator(
        model=task.model,
        dataloader=[windows],
        loss_fn=causal_loss,
    )
    result = algorithms.lanczos(made, k=1, max_iter=count, tol=0.0, which="LA", seed=0)
    return float(result.eigenvalues[0]), count


def eigenthings_alone(task: Problem) -> dict[str, Any]:
    """hessian-eigenthings with its own defaults: two products for each of ten eigenvalues, of which the first is taken."""
    from hessian_eigenthings import algorithms, operators

    made = operators.HessianOperator(model=task.model, dataloader=[torch.cat(list(task.batches))], loss_fn=causal_loss)
    start = perf_counter()
    result = algorithms.lanczos(made, seed=0)
    return {"value": float(result.eigenvalues[0]), "hvps": result.iterations, "seconds": round(perf_counter() - start, 3)}


def curvlinops(task: Problem, count: int) -> tuple[float, int]:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    windows = torch.cat(list(task.batches))
    made = HessianLinearOperator(
        Logits(task.model),
        nn.CrossEntropyLoss(),
        list(task.model.parameters()),
        [(windows, windows[:, 1:].flatten())],
    )
    inner, products = made.to_scipy(), 0

    def counted(vector: Any) -> Any:
        nonlocal products
        products += 1
        return inner.matvec(vector)

    # ARPACK's own restarts and stop; `count` climbs from a loose tolerance to a tight one.
    outer = LinearOperator(inner.shape, matvec=counted, dtype=inner.dtype)
    values = eigsh(outer, k=1, which="LA", tol=10.0 ** (-count / 4), return_eigenvectors=False)
    return float(values[0]), products


def climb(tool: Callable[[int], tuple[float, int]], truth: float, counts: tuple[int, ...]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for count in counts:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                start = perf_counter()
                value, products = tool(count)
                took = perf_counter() - start
        except Exception as error:  # a peer that cannot do it is a result
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        last = {"value": value, "hvps": products, "seconds": round(took, 3)}
        if abs(value - truth) <= 0.01 * abs(truth):
            return {"reached": True, **last}
    return {"reached": False, **last}


def profile(task: Problem) -> dict[str, Any]:
    """Products and seconds of each library over all parts of a model, and how often it did not come near the truth."""
    layers = [f"model.layers.{k}." for k in range(task.model.config.num_hidden_layers)]
    inside = {layer: [n for n in task.parameters if n.startswith(layer)] for layer in layers}
    every = list(task.parameters)
    ends = [n for n in every if not n.startswith("model.layers.")]
    start = perf_counter()
    whole = operator(task)
    spent: dict[str, Any] = {"curv": {"parts": [], "hvps": 0, "seconds": perf_counter() - start}}
    alone = {"hessian-eigenthings by its defaults": eigenthings_alone, "PyHessian by its defaults": pyhessian_alone}
    peers = ("hessian-eigenthings", "PyHessian", *alone)
    spent |= {label: {"parts": [], "hvps": 0, "seconds": 0.0} for label in peers}
    for names in (every, ends, *inside.values()):
        part = PreconditionedHessian(whole.hvp, whole.root.restrict(names))
        exact = Lanczos(tolerance=1e-4, margin=1e-3, max_products=300).extremes(part).top
        assert exact is not None
        solver = Lanczos() if names is every else Lanczos(tolerance=3e-2, margin=1e-1)
        start = perf_counter()
        found = solver.extremes(part)
        took = perf_counter() - start
        assert found.top is not None
        near = abs(found.top.value - exact.value) <= 0.01 * exact.value
        rows = {"curv": {"reached": near, "value": found.top.value, "hvps": found.products, "seconds": took}}
        for name, parameter in task.parameters.items():
            parameter.requires_grad_(name in names)
        for label, tool in (("hessian-eigenthings", eigenthings), ("PyHessian", pyhessian)):
            rows[label] = climb(lambda n, f=tool: f(task, n), exact.value, FEW)
        for label, untold in alone.items():
            said = untold(task)
            rows[label] = {"reached": abs(said["value"] - exact.value) <= 0.01 * exact.value, **said}
        for parameter in task.parameters.values():
            parameter.requires_grad_(True)
        for label, row in rows.items():
            total = spent[label]
            total["parts"].append({"truth": exact.value, **row})
            total["hvps"] += row["hvps"]
            total["seconds"] = round(total["seconds"] + row["seconds"], 3)
    for total in spent.values():
        total["missed"] = sum(not row["reached"] for row in total["parts"])
        total["wrong sign"] = sum(row["value"] < 0 for row in total["parts"])
    return spent


def profiles(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = {}
    for name in ("calm/checkpoint-60", "hot/checkpoint-600"):
        options.checkpoint = SAMPLES / name
        rows[name] = profile(problem(options))
    save("peers_profile", {"rows": rows, **machine(options)})
    for name, row in rows.items():
        for label, total in row.items():
            print(name, label, {key: value for key, value in total.items() if key != "parts"})


def main() -> None:
    options = arguments(__doc__ or "", profile=True)
    if options.profile:
        profiles(options)
        return
    rows = {}
    for name in ("calm/checkpoint-10", "calm/checkpoint-60", "hot/checkpoint-600", "nanogpt"):
        options.checkpoint = SAMPLES / name
        task = problem(options)
        truth = Lanczos(tolerance=1e-5, margin=1e-4, bottom_tolerance=1e-3, max_products=300).extremes(operator(task))
        assert truth.top is not None
        assert truth.bottom is not None
        value = truth.top.value
        row: dict[str, Any] = {"truth": value, "most_negative": truth.bottom.value, "curv certified": certified(task)}
        row["curv cold"] = climb(lambda n, t=task: curv(t, n), value, COUNTS)
        earlier = {"60": "10", "600": "60"}.get(name.rsplit("-", 1)[-1])
        if earlier:
            options.checkpoint = SAMPLES / name.replace(name.rsplit("-", 1)[1], earlier)
            before = Lanczos(tolerance=1e-3).extremes(operator(problem(options)))
            row["curv warm"] = climb(lambda n, t=task, s=before.vector: curv_warm(t, n, s), value, COUNTS)
        for label, tool in (("hessian-eigenthings", eigenthings), ("PyHessian", pyhessian), ("curvlinops", curvlinops)):
            row[label] = climb(lambda n, t=task, f=tool: f(t, n), value, COUNTS)
        rows[name] = row
    save("peers", {"rows": rows, **machine(options)})


if __name__ == "__main__":
    main()
