"""What attention does in a forward pass, by layer: largest logit and entropy, whatever the network calls its modules.

Seen where logits become probabilities: at softmax over four dimensions (batch, heads, queries, keys), as eager attention has
it in transformers' networks and in most written by hand, and at scaled_dot_product_attention, whose logits are made again.
So the logits are as the network has them: scaled, capped, with biases and after norms of queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from curvcli.curvature.precision import wide

# Additive masks are finfo.min, -inf, -1e9 or, in old networks, -1e4.
MASKED = -9e3
_SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)


@dataclass
class Attention:
    """Of one layer, over all heads, queries and uses in a forward pass.

    Attributes:
        logit: largest |q.k| as softmax takes it; masked pairs do not count. None where nothing was seen.
        entropy: mean over heads and queries of -sum p log p, in nats: not over the log of how many keys a query has, so that
            the first of a causal network's queries has 0. Queries all of whose keys are masked do not count.
    """

    logit: float | None = None
    total: float = 0.0
    queries: int = 0

    @property
    def entropy(self) -> float | None:
        """The mean; None where nothing was seen."""
        return self.total / self.queries if self.queries else None

    def add(self, logits: Tensor) -> None:
        """One call's logits, masks added, of shape (batch, heads, queries, keys)."""
        values = logits.detach().float()
        open_ = values > MASKED
        rows = open_.any(dim=-1)
        if not bool(rows.any()):
            return
        largest = float(values.abs().masked_fill(~open_, 0.0).max())
        chances = values.masked_fill(~open_, -math.inf)[rows].softmax(dim=-1)
        entropy = torch.special.entr(chances).sum(dim=-1)
        self.logit = largest if self.logit is None else max(self.logit, largest)
        self.total += float(wide(entropy).sum())
        self.queries += entropy.numel()


def attention(layers: Sequence[nn.Module], run: Callable[[], object]) -> list[Attention]:
    """What attention does in each layer, in one call of `run`, without gradients.

    Args:
        layers: whose calls are told apart; what runs outside of them does not count.
        run: a forward pass that calls them.

    Returns:
        One a layer; where no attention was seen in it, or values that are not finite, `logit` and `entropy` are None.
    """
    found = [Attention() for _ in layers]
    inside: list[int] = []
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(lambda *_, index=index: inside.append(index)).remove)
            # Also where the layer raises, or the next pass would count for it.
            stack.callback(layer.register_forward_hook(lambda *_: inside.clear(), always_call=True).remove)
        with torch.no_grad(), _Seen(lambda logits: found[inside[-1]].add(logits) if inside else None):
            run()
    return [one if one.logit is None or math.isfinite(one.logit + one.total) else Attention() for one in found]


class _Seen(TorchFunctionMode):
    """Calls `see` with the logits of every attention in it."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function as it is; before it runs, a look at what it is called with."""
        # While this runs the mode is off: a softmax called within functional.softmax is not seen a second time.
        kwargs = kwargs or {}
        if function in _SOFTMAX:
            value = args[0] if args else kwargs.get("input")
            axis = args[1] if len(args) > 1 else kwargs.get("dim")
            # Four dimensions with keys last: gates and routers take a softmax of fewer.
            if isinstance(value, Tensor) and value.dim() == 4 and axis in (-1, 3):
                self.see(value)
        elif function is functional.scaled_dot_product_attention:
            self.see(_logits(*args, **kwargs))
        return function(*args, **kwargs)


def _logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What scaled_dot_product_attention takes the softmax of, by its documentation."""
    if enable_gqa:
        # Grouped queries: each head of keys serves several of queries.
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    found = query @ key.transpose(-2, -1) * (scale if scale is not None else query.shape[-1] ** -0.5)
    if is_causal:
        seen = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).tril()
        found = found.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        found = found.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else found + attn_mask
    return found
