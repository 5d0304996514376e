"""Residual gates: what a block adds to the residual stream is multiplied by a number that rises from 0 to 1 in the run.

After arXiv 2603.05369, where each branch of a block (attention, MLP) is multiplied; here the block as a whole is, which
takes any block that maps hidden states to hidden states, also one with a norm behind the sum: x + alpha (block(x) - x). In a
pre-norm block the two differ by what the MLP sees of the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.errors import UnsupportedError


class Gate:
    """The gate of one block, which is the identity at 0, exactly, and the block itself at 1, exactly.

    Args:
        index: of the block, for messages.
        block: gives its hidden states, alone or first, in the shape in which it takes them.
    """

    part_of_model = True  # measurements go through it, as through a module's own hooks

    def __init__(self, index: int, block: nn.Module) -> None:
        self.index, self.block, self.value = index, block, -1.0  # no alpha: the first `set` writes
        # A tensor, so that compiled code does not bake it in.
        self._alpha = torch.zeros((), device=next(block.parameters()).device)
        self._version: tuple[Tensor, int] | None = None
        self._handles = [block.register_forward_hook(self.mix, with_kwargs=True)]
        self._first = block.register_forward_pre_hook(self.enter, with_kwargs=True)

    def set(self, value: float) -> None:
        """alpha from now on, 0 to 1; not between a forward pass and its backward pass, unless it is as it was."""
        if value != self.value:
            self.value = value
            self._alpha.fill_(value)

    def remove(self) -> None:
        """Lets go of the block."""
        for handle in (*self._handles, self._first):
            handle.remove()

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        """Once: which states come in, so that a block that writes into them is found out."""
        if (states := _states(args, kwargs)) is not None:
            self._version = states, states._version  # which torch raises at each write in place

    def mix(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The gated output in the place of the block's. Raises UnsupportedError for a block that cannot be gated."""
        before = _states(args, kwargs)
        # Exact types only: a namedtuple or a ModelOutput cannot be rebuilt from its members.
        after = output[0] if type(output) in (tuple, list) and output else output
        if not isinstance(after, Tensor) or before is None or before.shape != after.shape:
            raise UnsupportedError(
                f"block {self.index}, a {type(block).__name__}, cannot be gated: it does not give hidden states, alone or "
                "first, in the shape in which it takes them",
                hint="use a schedule without lock residual-gate",
            )
        if self._version is not None:
            states, version = self._version
            self._version = None
            self._first.remove()
            if states._version != version:
                raise UnsupportedError(
                    f"block {self.index}, a {type(block).__name__}, cannot be gated: it writes into the states it is given",
                    hint="let it add out of place",
                )
        # lerp gives its ends exactly, at 0 and at 1.
        mixed = torch.lerp(before.to(after.dtype), after, self._alpha.to(after))
        return mixed if isinstance(output, Tensor) else type(output)((mixed, *output[1:]))


def _states(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states among a block's arguments: the first tensor of floating point, by position or by name."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()), None)
