"""The chunked loss of a linear head against autograd's own derivatives of the plain one, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from curvcli.curvature.cross_entropy import linear_cross_entropy

Loss = Callable[..., Tensor]


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight, bias), labels)


def _chunked(chunk: int) -> Loss:
    return lambda *inputs: linear_cross_entropy(*inputs, chunk=chunk)


def _apart(found: Any, wanted: Any) -> float:
    return max(float((a - b).detach().norm() / (1 + b.detach().norm())) for a, b in zip(found, wanted, strict=True))


class _Network:
    """A loss of three tensors: what makes the hidden states, the head's weight, which may look tokens up too, its bias."""

    def __init__(self, tokens: int, width: int, vocabulary: int, *, bias: bool, tied: bool, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        self.given = normal(tokens, width)
        self.ids = torch.randint(vocabulary, (tokens,), generator=draw) if tied else None
        self.labels = torch.randint(vocabulary, (tokens,), generator=draw)
        self.inputs = [normal(width, width), normal(vocabulary, width), *([normal(vocabulary)] if bias else [])]
        self.tangents = [normal(*t.shape) for t in self.inputs]

    def loss(self, kind: Loss, *inputs: Tensor) -> Tensor:
        inner, weight, *bias = inputs
        start = self.given if self.ids is None else self.given + weight[self.ids]
        value = kind(torch.tanh(start @ inner), weight, bias[0] if bias else None, self.labels)
        return value + value.square()  # so that the gradient that comes in depends on the inputs, too

    def derivatives(self, kind: Loss, asked: list[int]) -> list[Tensor]:
        """Value, gradient, and products: of a kept graph twice, of the same graph at the end, forward over reverse."""
        inputs = [t.clone().requires_grad_(i in asked) for i, t in enumerate(self.inputs)]
        chosen, along = [inputs[i] for i in asked], [self.tangents[i] for i in asked]
        value = self.loss(kind, *inputs)
        first = torch.autograd.grad(value, chosen, create_graph=True)
        products = [torch.autograd.grad(first, chosen, along, retain_graph=keep) for keep in (True, True, False)]

        def of_some(*some: Tensor) -> Tensor:
            every = [some[asked.index(i)] if i in asked else t for i, t in enumerate(self.inputs)]
            return self.loss(kind, *every)

        forward = jvp(grad(of_some, argnums=tuple(range(len(asked)))), tuple(t.detach() for t in chosen), tuple(along))[1]
        return [value, *first, *(t for product in products for t in product), *forward]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 9),
    width=st.integers(1, 5),
    vocabulary=st.integers(2, 12),
    bias=st.booleans(),
    tied=st.booleans(),
    chunk=st.integers(1, 120),
    asked=st.sets(st.integers(0, 2), min_size=1),
    seed=st.integers(0, 2**31),
)
def test_all_derivatives_are_those_of_the_plain_loss(
    tokens: int, width: int, vocabulary: int, bias: bool, tied: bool, chunk: int, asked: set[int], seed: int
) -> None:
    network = _Network(tokens, width, vocabulary, bias=bias, tied=tied, seed=seed)
    chosen = [i for i in sorted(asked) if i < len(network.inputs)] or [0]  # the others are frozen, as under LoRA
    assert _apart(network.derivatives(_chunked(chunk), chosen), network.derivatives(_plain, chosen)) < 1e-10


def test_backward_into_grad() -> None:
    """The plain `.backward()`, in which the engine knows of no inputs that were asked for."""
    network = _Network(6, 3, 7, bias=True, tied=True, seed=0)
    found = []
    for kind in (_chunked(14), _plain):
        inputs = [t.clone().requires_grad_() for t in network.inputs]
        network.loss(kind, *inputs).backward()  # type: ignore[no-untyped-call]
        found.append([t.grad for t in inputs])
    assert _apart(*found) < 1e-10


class _Sizes(TorchDispatchMode):
    """Shapes of all tensors that are made within."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, Tensor)}
        return found


def test_no_more_logits_than_a_chunk_and_no_gradient_that_nobody_asked_for() -> None:
    network = _Network(32, 3, 50, bias=False, tied=False, seed=0)
    inputs = [t.clone().requires_grad_() for t in network.inputs]
    with _Sizes() as whole:
        first = torch.autograd.grad(network.loss(_chunked(200), *inputs), inputs, create_graph=True)
        torch.autograd.grad(first, inputs, network.tangents)
    assert (50, 3) in whole.shapes
    assert max(torch.Size(shape).numel() for shape in whole.shapes) <= 200
    value = network.loss(_chunked(200), *inputs)
    with _Sizes() as part:  # of what lies before the head, though the head could be differentiated as well
        (first_part,) = torch.autograd.grad(value, inputs[:1], create_graph=True)
        torch.autograd.grad(first_part, inputs[:1], network.tangents[:1])
    assert (50, 3) not in part.shapes


def test_a_third_derivative_is_refused() -> None:
    network = _Network(4, 2, 5, bias=False, tied=False, seed=0)
    inputs = [t.clone().requires_grad_() for t in network.inputs]
    first = torch.autograd.grad(network.loss(_chunked(10), *inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative"):
        torch.autograd.grad(first, inputs, network.tangents, create_graph=True)
