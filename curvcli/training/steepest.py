"""Sharpness in the optimizer's norm inside a training job, from the gradient and from the direction found before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from curvcli.curvature.hvp import HVP
from curvcli.curvature.problem import Problem, gradient
from curvcli.curvature.steepest import FrankWolfe, distance, joint_dual
from curvcli.optimizers.preconditioner import Preconditioner


def in_norm(
    problem: Problem, engine: HVP, preconditioner: Preconditioner, near: Mapping[str, Tensor], solver: FrankWolfe
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of a record on the parameters that have a norm, and the sharpest direction of them by name.

    Args:
        near: directions by name, as the measurement before gave them; what has none, or of another shape, is not used.
        solver: products are over both starts.

    Returns:
        z, sharpness, dual_norm and settled; and the direction, empty where a product is not finite.
    """
    names = [n for n in problem.parameters if n in preconditioner.balls]
    balls = [preconditioner.balls[n] for n in names]
    gradients = gradient(problem, names)
    starts = {"gradient": gradients}
    if all(n in near and near[n].shape == g.shape for n, g in zip(names, gradients, strict=True)):
        starts["kept"] = [near[n].to(g) for n, g in zip(names, gradients, strict=True)]
    found = solver.sharpest(lambda d: engine.product(names, d), balls, starts)
    dual, lr = joint_dual(balls, gradients), preconditioner.ball_lr
    positive = found.value is not None and found.value > 0
    fields = {
        "sharpness": found.value,
        "dual_norm": dual,
        # Options that may change the update take the number away, as they do rho.
        "z": distance(lr, found.value or 0.0, dual) if lr is not None and positive and not preconditioner.doubts else None,
    }
    # A record has the eigensolver's words; flat has no Z either.
    status = {"settled": "converged", "non-finite": "non-finite"}.get(found.status, "unconverged")
    return {**fields, "status": status}, dict(zip(names, found.direction or (), strict=False))
