"""The optimizer's own next step against the curvature along it."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, isfinite

from torch import Tensor

from curvcli.curvature import precision
from curvcli.curvature.hvp import HVP
from curvcli.curvature.inverse_root import Diagonal
from curvcli.curvature.precision import norm, numbers
from curvcli.curvature.problem import Problem
from curvcli.curvature.ranks import ALONE, Ranks
from curvcli.curvature.scratch import let_go
from curvcli.curvature.spread import Spread
from curvcli.documents import Update
from curvcli.optimizers.preconditioner import Preconditioner


def next_update(
    problem: Problem, preconditioner: Preconditioner, hvp: HVP, names: Sequence[str], gradients: Sequence[Tensor]
) -> Update:
    """The learning rate at which u = P^(-1) m raises the loss to second order, 2 g.u / u.Hu (one product).

    Args:
        names: the parameters that move.
        gradients: of the mean loss, for `names`; as the step they are slices where processes divide them.
    """
    if preconditioner.direction is None or preconditioner.lr is None:
        return Update(critical_lr=None, ratio=None, status="unavailable")
    step = [preconditioner.direction[n] for n in names]
    decays = [preconditioner.decay.get(n, 0.0) for n in names]
    shards, holders = preconditioner.root.shards, preconditioner.root.holders
    with problem.gathered():
        weights = [problem.parameters[n] for n in names]
        weights = [w.detach() for w in weights] if shards is None else shards.parts(names, weights)
        image = hvp.product(names, step)
    # A coupled weight decay is part of the function that the optimizer descends.
    slope, bend = inner(gradients, step, holders), inner(image, step, holders)
    if any(decays):
        own = [d * u for d, u in zip(decays, step, strict=True)]
        slope, bend = slope + inner(weights, own, holders), bend + inner(step, own, holders)
    if not isfinite(slope + bend):
        return Update(critical_lr=None, ratio=None, status="unavailable")
    if slope <= 0:
        return Update(critical_lr=None, ratio=None, status="uphill")
    if bend <= 0:
        return Update(critical_lr=None, ratio=None, status="concave")
    critical = 2 * slope / bend
    return Update(critical_lr=critical, ratio=preconditioner.lr / critical, status="ok")


def update_rms(preconditioner: Preconditioner, names: Sequence[str]) -> float | None:
    """Root mean square of the next update u = P^(-1) m over the named parameters, in units of the learning rate.

    None where there is no momentum, nothing is named, or it is not finite.
    """
    step = preconditioner.direction
    if step is None or not names:
        return None
    each = preconditioner.root.holders.each
    size = sum(each(sum(step[n].numel() for n in names)))
    found = hypot(*each(norm([step[n] for n in names]))) / size**0.5
    let_go(step[names[0]])
    return found if found < float("inf") else None


def over_moments(preconditioner: Preconditioner, names: Sequence[str], gradients: Sequence[Tensor]) -> float | None:
    """Norm of a gradient over that of sqrt(v), on the entries that had gradients before.

    Of Adam and its like P is (sqrt(v) + eps) (1 - beta1^t) by bias correction, v's own made up for. Without that factor its
    norm is the root mean square of the norms that the optimizer was given, or more. The gradient of a mean over more data is
    no longer, unless gradients were clipped, the data are others or the loss has leapt.

    None where P is no such diagonal, or is not of optimizer state.
    """
    root, betas, step = preconditioner.root, preconditioner.options.get("betas"), preconditioner.step
    if preconditioner.kind != "checkpoint" or not root or not set(names) >= set(root):
        return None
    if not betas or not step:  # of RMSprop and others v is not corrected, or P is not its root
        return None
    given: list[float] = []
    known: list[float] = []
    for name, gradient in zip(names, gradients, strict=True):
        part = root.get(name)
        if part is None:
            continue
        if not isinstance(part, Diagonal):
            return None
        both = gradient, part.entries
        # Norms one by one: copies in float64 of a large embedding would be more than a product takes.
        mine, seen = both if part.never is None else (t.masked_fill(part.never, 0.0) for t in both)
        given.append(norm([mine]))
        known.append(norm([seen]) / preconditioner.relative.get(name, 1.0))
        for vector in both:
            let_go(vector)
    corrected, each = 1 - float(betas[0]) ** step, root.holders.each
    return over(hypot(*each(hypot(*given))) * corrected, hypot(*each(hypot(*known))))


def ratios(
    preconditioner: Preconditioner, names: Sequence[str], gradients: Sequence[Tensor], spread: Spread
) -> tuple[float, float] | None:
    """`over_moments` of the gradient that the batches are samples of, and of one batch's; None where that is None."""
    found = over_moments(preconditioner, names, gradients)
    whole = hypot(*preconditioner.root.holders.each(norm(gradients)))
    for gradient in gradients:
        let_go(gradient)
    # In proportion: what never had a gradient is left out of the first alone.
    return None if found is None or not whole else (found * spread.mean(whole) / whole, found * spread.batch / whole)


def gradient_quotient(hvp: HVP, names: Sequence[str], gradients: Sequence[Tensor], holders: Ranks = ALONE) -> float | None:
    """g'Hg / g'g, the curvature of the loss along its gradient (one product); None where g is 0 or it is not finite."""
    return over(inner(gradients, hvp.product(names, gradients), holders), inner(gradients, gradients, holders))


def inner(left: Sequence[Tensor], right: Sequence[Tensor], holders: Ranks = ALONE) -> float:
    """Inner product of two vectors, as tensors for each parameter.

    Args:
        holders: the processes that hold slices of them, where they are divided.
    """
    found = []
    for a, b in zip(left, right, strict=True):
        found.append(precision.inner(a.detach().reshape(1, -1), b.detach().reshape(-1))[0])
        for vector in (a, b):  # of vectors on disk no more than one tensor each is in memory
            let_go(vector)
    return sum(holders.each(sum(numbers(found))))


def over(above: float, below: float) -> float | None:
    """A quotient; None where it is not finite, or what is below is not positive."""
    found = above / below if below > 0 else float("nan")
    return found if abs(found) < float("inf") else None
