"""Cost of one exact Hessian-vector product in gradients, by mode: `python benchmarks/hvp_cost.py`."""

from __future__ import annotations

import torch
from common import arguments, machine, problem, save, seconds

from curvcli.curvature.hvp import MODES, build
from curvcli.curvature.problem import gradient
from curvcli.models.blocks import find_blocks


def main() -> None:
    options = arguments(__doc__ or "")
    task = problem(options)
    names = list(task.parameters)
    blocks = find_blocks(task.model)
    assert blocks is not None
    last = [n for n in names if n.startswith(f"{blocks.prefix}.{len(blocks.modules) - 1}.")]
    base = seconds(lambda: gradient(task, names), options.repeats)
    result: dict[str, dict[str, float]] = {}
    for mode in MODES:
        engine = build(task, mode)
        row = {}
        for part, chosen in (("full", names), ("last block", last)):
            vectors = [torch.randn_like(task.parameters[n]) for n in chosen]
            row[part] = round(seconds(lambda e=engine, c=chosen, v=vectors: e.product(c, v), options.repeats) / base, 2)
        result[mode] = row
    save("hvp_cost", {"gradients_per_hvp": result, "gradient_seconds": base, **machine(options)})


if __name__ == "__main__":
    main()
