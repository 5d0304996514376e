"""The head of a model, where it is plain: a Linear whose output the model gives back as it is.

Such a model's loss can be computed from the head's input without its logits. What models do besides (caps and scales of
logits, adapters, hooks) shows in what comes back, whatever the architecture is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvcli.curvature.cross_entropy import linear_cross_entropy
from curvcli.curvature.ranks import shared
from curvcli.curvature.standin import measured

# Looking takes two forward passes and a gradient; weak, so that a measured model can be freed.
_known: WeakKeyDictionary[nn.Module, list[nn.Linear]] = WeakKeyDictionary()


class Withheld:
    """What a head was called with, in place of the logits that it did not compute."""

    def __init__(self) -> None:
        # Input (..., width), its version, weight (vocabulary, width), bias (vocabulary,).
        self.calls: list[tuple[Tensor, int, Tensor, Tensor | None]] = []

    def loss(self, output: Tensor, labels: Tensor, select: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor | None:
        """Mean cross-entropy over the labels of what the model gave back; None where that is not the head's input untouched.

        Args:
            output: what stands in the place of the logits, of shape (..., width).
            labels: of any shape, each below the vocabulary, -100 where nothing is predicted.
            select: takes from (..., width) the positions that the labels are for.
        """
        if len(self.calls) != 1:
            return None
        hidden, version, weight, bias = self.calls[0]
        # torch counts changes in place in _version: logits.mul_(scale) gives the same tensor back with other values.
        if output is not hidden or output._version != version:
            return None
        chosen, flat = select(hidden).flatten(0, -2), labels.flatten()  # (positions, width), (positions,)
        counted = flat != -100
        # Indexing copies: not where every position counts.
        if not bool(counted.all()):
            chosen, flat = chosen[counted], flat[counted]
        return linear_cross_entropy(chosen, weight, bias, flat)


@contextmanager
def withheld(head: nn.Linear) -> Iterator[Withheld]:
    """Within it the head gives back its input and notes it, with the weight that it has at that moment."""
    seen = Withheld()

    def forward(hidden: Tensor) -> Tensor:
        seen.calls.append((hidden, hidden._version, head.weight, head.bias))
        return hidden

    # An instance's attribute goes before its class's method; deleting it leaves the module as it was.
    vars(head)["forward"] = forward
    try:
        yield seen
    finally:
        del vars(head)["forward"]


def plain_head(model: nn.Module, logits: Callable[[], Tensor]) -> nn.Linear | None:
    """The Linear whose output is the model's, looked for once in a model; None where there is none.

    Args:
        model: in evaluation mode: dropout would make the two passes differ that are compared.
        logits: a forward pass of a few tokens, which gives the model's logits, of shape (..., vocabulary).
    """
    behind = measured(model)
    # Within a transform of torch.func nothing can be compared: a stand-in has the head that was found before, or none.
    if behind is model and not model.training and model not in _known:
        _known[model] = _found(model, logits)
    return next((head for head in _known.get(behind, []) if _untouched(head) and not behind.training), None)


def widest(model: nn.Module) -> int:
    """The most outputs that a plain Linear of the model has: what its logits can be over; 0 where it has none."""
    return max((m.out_features for m in measured(model).modules() if type(m) is nn.Linear), default=0)


def _untouched(head: nn.Linear) -> bool:
    """Whether calling it is no more than its matrix: no hooks, no forward of somebody else's, no lower precision."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    kind = head.weight.dtype
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not any(hooks)
        and kind in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(head.weight.device.type)
    )


def _found(model: nn.Module, logits: Callable[[], Tensor]) -> list[nn.Linear]:
    """The head, if there is one and the loss without logits has the value and the gradient of the model's own."""
    try:
        with torch.enable_grad():
            seen = _watched(model, logits)
            if seen is None:
                return []
            head, hidden, output = seen
            flat = output.flatten(0, -2)
            # A prime step spreads labels over the vocabulary without touching anybody's random numbers.
            labels = torch.arange(len(flat), device=flat.device) * 7919 % flat.shape[-1]
            with withheld(head) as again:
                value = again.loss(logits(), labels)
            if value is None:
                return []
            # The gradient too: what scales or stops it behind the head leaves the value as it is.
            own = functional.cross_entropy(flat, labels)
            chunked = linear_cross_entropy(hidden.flatten(0, -2), head.weight, head.bias, labels)
            slope, own_slope = (torch.autograd.grad(loss, hidden)[0] for loss in (chunked, own))
    except Exception as error:  # whatever a model raises without its logits, or on few tokens, means that it needs them
        if shared(error):  # but not what another process says
            raise
        return []
    # Chunks differ from the whole by rounding alone; a cap or scale of logits moves the loss by more than 0.1 %.
    limit = 1e4 * torch.finfo(flat.dtype).eps
    return [head] if _close(value, own, limit) and _close(slope, own_slope, limit) else []


def _close(found: Tensor, wanted: Tensor, limit: float) -> bool:
    return bool((found - wanted).norm() <= limit * wanted.norm())  # False where one is NaN


def _watched(model: nn.Module, logits: Callable[[], Tensor]) -> tuple[nn.Linear, Tensor, Tensor] | None:
    """The Linear that ran last, its input as a leaf of the graph, and the logits that came of it."""
    last: list[tuple[nn.Linear, Tensor]] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
            return None
        leaf = inputs[0].detach().requires_grad_()
        last[:] = [(module, leaf)] if isinstance(module, nn.Linear) else []
        return (leaf,)

    with ExitStack() as stack:
        for module in model.modules():
            if type(module) is nn.Linear and _untouched(module):
                stack.callback(module.register_forward_pre_hook(before).remove)
        output = logits()
    if not last or not output.requires_grad or output.dim() < 2 or output.shape[-1] != last[0][0].out_features:
        return None
    head, leaf = last[0]
    return (head, leaf, output) if output.shape[:-1] == leaf.shape[:-1] else None
