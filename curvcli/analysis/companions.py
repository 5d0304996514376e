"""Cheap numbers beside rho: what attention does, how large weights and steps are, curvature along the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot

from torch import Tensor

from curvcli.analysis.measured import Ongoing
from curvcli.curvature.hvp import HVP
from curvcli.curvature.norms import largest_spectral_norm
from curvcli.curvature.precision import norm
from curvcli.curvature.ranks import shared
from curvcli.curvature.scratch import let_go
from curvcli.documents import Companions, LayerCompanions
from curvcli.errors import exhausted
from curvcli.models.attention import Attention, attention
from curvcli.optimizers.update import gradient_quotient, inner, over, update_rms


def companions(work: Ongoing, hvp: HVP, gradients: Sequence[Tensor]) -> tuple[Companions, list[LayerCompanions]]:
    """Of the whole model and of each layer: two products, and a forward pass of the first batch.

    Args:
        hvp: that counts.
        gradients: of the mean loss, for `work.moving`.

    Raises:
        OutOfTime: the deadline has passed; a product is not begun.
    """
    work.in_time()
    modules = work.blocks.modules if work.blocks else ()
    seen: list[Attention] = []
    first = work.problem
    with first.gathered():
        try:
            seen = attention(modules, lambda: [first.batch_loss(i) for i in first.given[0]]) if modules else []
        except Exception as error:  # whatever a network raises where its functions are looked at: it has none of these
            if exhausted(error) or shared(error):  # what another process says is nothing of the network's
                raise
        norms = [largest_spectral_norm(module) for module in modules]
    layers = [
        LayerCompanions(
            attention_logit=seen[i].logit if seen else None,
            attention_entropy=seen[i].entropy if seen else None,
            spectral_norm=norms[i],
            update_rms=update_rms(work.preconditioner, work.layer_moving[i]),
        )
        for i in range(len(modules))
    ]
    raw, weighted = quotients(work, hvp, gradients)
    whole = Companions(
        gradient_norm=hypot(*work.preconditioner.root.holders.each(norm(gradients))),
        gradient_quotient=raw,
        preconditioned_quotient=weighted,
        update_rms=update_rms(work.preconditioner, work.moving),
    )
    return whole, layers


def quotients(work: Ongoing, hvp: HVP, gradients: Sequence[Tensor]) -> tuple[float | None, float | None]:
    """Curvature along the gradient, as it is and as the optimizer sees it: g'Hg / g'g, and w'Gw / w'w for w = P^(-1/2) g.

    None where the gradient is 0, or a value is not finite. The second is of the parameters that are preconditioned, None
    without one. No Rayleigh quotient of G lies above lambda.
    """
    names, root = work.names, work.preconditioner.root
    work.in_time()
    holders = root.holders
    raw = gradient_quotient(hvp, work.moving, gradients, holders)
    if not names:
        return raw, None
    work.in_time()
    gradients = [g for n, g in zip(work.moving, gradients, strict=True) if n in root]
    # P^(-1) g, and 0 where nothing moves.
    steps = [root[n].apply(root[n].apply(g)) for n, g in zip(names, gradients, strict=True)]
    decays = [work.preconditioner.decay.get(n, 0.0) for n in names]
    let_go(gradients[0])
    bend = inner(steps, hvp.product(names, steps), holders)
    bend += sum(d * inner([u], [u], holders) for d, u in zip(decays, steps, strict=True))
    return raw, over(bend, inner(steps, gradients, holders))
