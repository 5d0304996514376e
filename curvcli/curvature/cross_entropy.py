"""Mean cross-entropy of a linear head, twice differentiable, without its logits: over tokens in chunks.

The logits of a real vocabulary are the largest tensors of a model, and double backward through the plain loss holds
some ten of their size. Here each pass makes the logits of a few tokens anew, and what autograd keeps are the
hidden states and the weight. Written down per token, with z = W h + b, p = softmax(z) and y the label's unit vector:

    gradient in z:  k (p - y), k the incoming gradient over the number of tokens
    its derivative along dz:  k p * (dz - <p, dz>)

The second derivative is symmetric, so one formula serves backward mode (from cotangents) and forward mode (from tangents).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Logits at a time: 64 MiB in float32, of which two or three are held. With a quarter of it the chunks of a vocabulary of
# 50,000 are so few rows that adding up the weight's gradient takes as long as the products (1.5 times the time in all).
CHUNK = 2**24


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, chunk: int = CHUNK
) -> Tensor:
    """Mean over tokens of the cross-entropy of `hidden @ weight.T + bias`, in nats, a scalar.

    Its value, gradient, second derivative by double backward and Hessian-vector products by `jvp` of the gradient are those
    of the plain loss to rounding. A third derivative raises RuntimeError.

    Args:
        hidden: of shape (tokens, width).
        weight: of shape (vocabulary, width).
        bias: of shape (vocabulary,), or None.
        labels: of shape (tokens,), each below the vocabulary; at least one.
        chunk: logits that are held at once, at most; one token's at least.
    """
    rows = max(1, chunk // weight.shape[0])
    # Views, since of a leaf the engine does not say whether its gradient was asked for.
    inner = [None if t is None else t.view_as(t) for t in (hidden, weight, bias)]
    value: Tensor = _Loss.apply(*inner, labels, rows)  # type: ignore[no-untyped-call]
    return value


def _asked(ctx: Any, first: int, tensors: tuple[Tensor | None, ...]) -> tuple[bool, ...]:
    """Which of the inputs from `first` on lead to what autograd.grad was asked for.

    `needs_input_grad` says of a head whether it could be asked: the products of a layer alone would pay for it each time.
    """
    needs = ctx.needs_input_grad[first : first + len(tensors)]
    try:
        # Edges are there for inputs that are tensors; the engine's answer is what register_multi_grad_hook builds on.
        edges = iter(ctx.next_functions[first:])
        nodes = [None if tensor is None else next(edges)[0] for tensor in tensors]
        return tuple(node is not None and torch._C._will_engine_execute_node(node) for node in nodes)
    except (AttributeError, RuntimeError, StopIteration):  # within torch.func no engine runs
        return tuple(needs)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)


def _chunks(tokens: int, rows: int) -> Iterator[slice]:
    return (slice(i, i + rows) for i in range(0, tokens, rows))


def _softmax_(logits: Tensor) -> Tensor:
    return logits.sub_(logits.amax(dim=1, keepdim=True)).exp_().div_(logits.sum(dim=1, keepdim=True))


def _subtract_labels_(share: Tensor, labels: Tensor) -> Tensor:
    return share.scatter_add_(1, labels[:, None], share.new_full((len(labels), 1), -1.0))


class _Loss(torch.autograd.Function):
    """The value; its backward is a function of its own, which can be differentiated."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: int) -> Tensor:
        total = hidden.new_zeros(())
        for part in _chunks(len(hidden), rows):
            z = _logits(hidden[part], weight, bias)
            # The maximum cancels between the two terms, and keeps exp from overflowing.
            z -= z.amax(dim=1, keepdim=True)
            total -= z.gather(1, labels[part, None]).sum()
            total += z.exp_().sum(dim=1).log_().sum()
        return total / len(hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, weight, bias, labels, ctx.rows = inputs
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.save_for_forward(hidden, weight, bias, labels)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        wanted = _asked(ctx, 0, ctx.saved_tensors[:3])
        return *_Gradient.apply(scale, *ctx.saved_tensors, ctx.rows, wanted), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        hidden, weight, bias, labels = ctx.saved_tensors
        one = hidden.new_ones(())
        # Only for inputs with a tangent: each gradient costs a product with all logits.
        found = _Gradient.forward(one, hidden, weight, bias, labels, ctx.rows, tuple(t is not None for t in tangents[:3]))
        pairs = zip(found, tangents[:3], strict=True)
        return torch.stack([(g * t).sum() for g, t in pairs if g is not None and t is not None]).sum()


class _Gradient(torch.autograd.Function):
    """`scale` times the gradient in hidden states, weight and bias, of those that are wanted."""

    @staticmethod
    def forward(
        scale: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: int,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, of_bias = _room(hidden, weight, bias, wanted)
        k = scale / len(hidden)
        for part in _chunks(len(hidden), rows):
            share = _softmax_(_logits(hidden[part], weight, bias))
            rest = _subtract_labels_(share, labels[part]).mul_(k)
            if of_hidden is not None:
                torch.mm(rest, weight, out=of_hidden[part])
            if of_weight is not None:
                of_weight.addmm_(rest.T, hidden[part])
            if of_bias is not None:
                of_bias += rest.sum(dim=0)
        return of_hidden, of_weight, of_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.rows, ctx.wanted = inputs
        ctx.set_materialize_grads(False)  # a gradient that nobody differentiates costs no product
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # once_differentiable says nothing where the cotangents need no gradient, and derivatives would lack a part.
        if torch.is_grad_enabled():
            raise RuntimeError("the loss in chunks has no third derivative")
        wanted = _asked(ctx, 1, ctx.saved_tensors[1:4])
        slope, *found = _derivative(ctx.saved_tensors, ctx.rows, cotangents, None, wanted)
        return slope if ctx.needs_input_grad[0] else None, *found, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        scale, *others = tangents[:4]
        return _derivative(ctx.saved_tensors, ctx.rows, others, scale, ctx.wanted)[1:]


def _room(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight = torch.zeros_like(weight) if wanted[1] else None
    return of_hidden, of_weight, torch.zeros_like(bias) if wanted[2] and bias is not None else None


def _derivative(
    saved: tuple[Any, ...], rows: int, along: Any, along_scale: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Derivative of `_Gradient` along (hidden, weight, bias, scale), and of the value along the first three.

    Args:
        saved: scale, hidden, weight, bias, labels.
        along: a direction for hidden, weight and bias each; None is 0.
        along_scale: the direction of the scale, a scalar; None is 0.
        wanted: for which of hidden, weight and bias it is computed.

    Returns:
        The value's derivative (a scalar), then that of the gradient in hidden, weight and bias.
    """
    scale, hidden, weight, bias, labels = saved
    u_hidden, u_weight, u_bias = along
    of_hidden, of_weight, of_bias = _room(hidden, weight, bias, wanted)
    k = scale / len(hidden)
    slope = hidden.new_zeros(())
    for part in _chunks(len(hidden), rows):
        h = hidden[part]
        share = _softmax_(_logits(h, weight, bias))
        moved = _moved(h, weight, None if u_hidden is None else u_hidden[part], u_weight, u_bias)
        if moved is None:
            curved = torch.zeros_like(share)
        else:
            mean = torch.bmm(share[:, None], moved[:, :, None])[:, 0]  # a dot product a token, without their products
            slope += (mean - moved.gather(1, labels[part, None])).sum()
            curved = moved.sub_(mean).mul_(share).mul_(k)
        rest = _subtract_labels_(share, labels[part])
        if along_scale is not None:
            curved.add_(rest * (along_scale / len(hidden)))
        rest.mul_(k)
        if of_hidden is not None:
            torch.mm(curved, weight, out=of_hidden[part])
            if u_weight is not None:
                of_hidden[part].addmm_(rest, u_weight)
        if of_weight is not None:
            of_weight.addmm_(curved.T, h)
            if u_hidden is not None:
                of_weight.addmm_(rest.T, u_hidden[part])
        if of_bias is not None:
            of_bias += curved.sum(dim=0)
    return slope / len(hidden), of_hidden, of_weight, of_bias


def _moved(
    hidden: Tensor, weight: Tensor, u_hidden: Tensor | None, u_weight: Tensor | None, u_bias: Tensor | None
) -> Tensor | None:
    """How the logits move along a direction, of shape (tokens, vocabulary); None where they do not."""
    found = None if u_hidden is None else u_hidden @ weight.T
    if u_weight is not None:
        found = hidden @ u_weight.T if found is None else found.addmm_(hidden, u_weight.T)
    if u_bias is not None:
        found = u_bias.expand(len(hidden), -1).clone() if found is None else found.add_(u_bias)
    return found
