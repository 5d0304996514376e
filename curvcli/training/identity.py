"""The proof that a locked block is the identity, at its first forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.errors import UnsupportedError
from curvcli.training.locks import Lock


def prove(lock: Lock, model: nn.Module, locked: Callable[[], bool]) -> None:
    """At its next forward pass the block's output must be one of its inputs, or its projections were misjudged.

    The forward pass raises UnsupportedError where it is not, while `locked()` holds. Nothing is proven under
    torch.compile, where a hook would change the graph; `curv schedule verify` gives the same proof.
    """
    # torch.compile(model) wraps it, model.compile() leaves no wrapper.
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules()):
        return
    entered: list[Tensor] = []

    def keep(block: nn.Module, args: Any, kwargs: Any) -> None:
        # Copies: a block may add to its input in place. By position or by name, under whatever name.
        entered[:] = [x.detach().clone() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]

    def compare(block: nn.Module, args: Any, output: Any) -> None:
        for handle in handles:
            handle.remove()
        if not locked():
            return
        parts = output.values() if isinstance(output, Mapping) else output
        result = next(iter(parts), None) if isinstance(output, (Mapping, tuple, list)) else output
        if not isinstance(result, Tensor):
            raise UnsupportedError(
                f"block {lock.index}, a {type(block).__name__}, gives no tensor first: it cannot be proven an identity",
                hint="let it return its hidden states, alone or first",
            )
        alike = [x.to(result.dtype) for x in entered if x.shape == result.shape]
        entered.clear()
        if not any(torch.equal(x, result) for x in alike):
            raise UnsupportedError(
                f"block {lock.index}, a {type(block).__name__}, is no identity with {lock.resting[0][0]} at rest",
                hint="name what writes to its residual stream: outputs=['attn.proj', 'mlp.fc2']; "
                "a block that normalises the stream itself (BERT) cannot be one",
            )

    handles = [
        lock.block.register_forward_pre_hook(keep, with_kwargs=True),
        lock.block.register_forward_hook(compare),
    ]
