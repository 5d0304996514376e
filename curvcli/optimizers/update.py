"""The optimizer's own next step against the curvature along it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from curvcli.curvature.hvp import HVP
from curvcli.curvature.problem import Problem
from curvcli.documents import Update
from curvcli.optimizers.preconditioner import Preconditioner


def next_update(
    problem: Problem, preconditioner: Preconditioner, hvp: HVP, names: Sequence[str], gradients: Sequence[Tensor]
) -> Update:
    """The learning rate at which u = P^(-1) m raises the loss to second order, 2 g.u / u.Hu (one product).

    Args:
        names: the parameters that move.
        gradients: of the mean loss, for `names`.
    """
    if preconditioner.direction is None or preconditioner.lr is None:
        return Update(critical_lr=None, ratio=None, status="unavailable")
    step = [preconditioner.direction[n] for n in names]
    decays = [preconditioner.decay.get(n, 0.0) for n in names]
    weights = [problem.parameters[n].detach() for n in names]
    image = hvp.product(names, step)
    # A coupled weight decay is part of the function that the optimizer descends.
    slope = sum(float(((g + d * w) * u).sum()) for g, d, w, u in zip(gradients, decays, weights, step, strict=True))
    bend = sum(float(((h.detach() + d * u) * u).sum()) for h, d, u in zip(image, decays, step, strict=True))
    if slope <= 0:
        return Update(critical_lr=None, ratio=None, status="uphill")
    if bend <= 0:
        return Update(critical_lr=None, ratio=None, status="concave")
    critical = 2 * slope / bend
    return Update(critical_lr=critical, ratio=preconditioner.lr / critical, status="ok")
