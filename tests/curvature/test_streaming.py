"""Weights that are gathered a block at a time, on threads in the place of processes: what is made of them is the whole's."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from streamed import divided, problem_of
from threads import counted_bytes, on_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvcli.analysis.engines import chosen
from curvcli.analysis.scale import scale
from curvcli.curvature.differences import Differences, Step, trusted
from curvcli.curvature.gathering import Weights
from curvcli.curvature.hvp import FreshGraph, graph_bytes
from curvcli.curvature.problem import Problem, gradient
from curvcli.curvature.slicewise import OnSlices, sliced_gradient
from curvcli.curvature.streaming import Streamed
from curvcli.errors import LostError, UnsupportedError
from curvcli.models.blocks import used_together


def _tied() -> nn.Module:
    model = models.Net()
    model.head.weight = model.embed.weight  # type: ignore[assignment]
    return model


class _Twice(models.Net):
    """Blocks that are used twice, and a parameter of the network's own, used in between."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, 5).double())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in (*self.layers, *self.layers):
            x = layer(x) + self.shift
        return self.head(x)


class _Choosy(models.Block):
    """A block one of whose matrices is used for some batches alone, as a mixture's experts are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) > 20 else x + torch.tanh(self.up(self.norm(x)))


class _Times(torch.autograd.Function):
    """A fused kernel, of which torch's functions see nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch._C.DisableTorchFunction():
            return x * weight

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return slope * weight, (slope * x).sum(dim=0)


class _Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1, 5).double())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Times.apply(x, self.weight)
        return found


def _fused() -> nn.Module:
    model = models.Net()
    for layer in model.layers:
        layer.norm = _Fused()  # type: ignore[assignment]
    return model


class _Spectral(models.Block):
    """Weights that are read as complex numbers, as filters of Fourier layers and state spaces are."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.filter = nn.Parameter(torch.linspace(-1, 1, 2 * width).double().reshape(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.view_as_complex(self.filter)
        return super().forward(x) + (x * seen * seen * seen.conj()).real


class _Graph(models.Block):
    """Rows that are mixed by a sparse matrix, which autograd saves and which has no storage."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.sparse.mm(torch.eye(len(x), dtype=x.dtype).roll(1, 0).to_sparse(), x))


class _Again(models.Net):
    """Blocks whose forward pass is made once more in the backward pass."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


def _of(block: type[models.Block]) -> nn.Module:
    model = models.Net()
    model.layers = nn.ModuleList(block(5).double() for _ in range(3))
    return model


def _mixed() -> nn.Module:
    model = _of(_Choosy)
    model.layers[1].norm.weight.requires_grad_(False)  # type: ignore[union-attr]
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": models.Net,
    "tied": _tied,
    "twice": _Twice,
    "mixed": _mixed,
    "fused": _fused,
    "spectral": lambda: _of(_Spectral),
    "graph": lambda: _of(_Graph),
    "again": _Again,
}


def _tangents(problem: Problem) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in problem.parameters.values()]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("network", list(NETWORKS))
def test_gradients_and_products_are_those_of_the_whole(network: str, world: int) -> None:
    model = NETWORKS[network]()
    one = problem_of(model)
    names, tangents = list(one.parameters), _tangents(one)
    step = Step(length=1e-4)
    truth = gradient(one, names), Differences(one, step).product(names, tangents), one.mean_loss()
    some = [n for n in names if n.startswith("layers.1.")]
    along = [t for n, t in zip(names, tangents, strict=True) if n in some]
    part = Differences(one.subset([1, 2]), step).product(some, along)

    def work(ranks: Any) -> Any:
        problem, weights = divided(model, ranks)
        held = {n: p.clone() for n, p in weights._parts.items()}
        cut = weights.shards.parts
        engine = OnSlices(problem, step)
        found = sliced_gradient(problem, names), engine.product(names, cut(names, tangents)), problem.mean_loss()
        layer = engine.subset([1, 2]).product(some, cut(some, along))
        assert all(torch.equal(part, weights._parts[n]) for n, part in held.items())
        assert all(bool(p.isnan().all()) for p in problem.model.parameters())  # nobody has them between uses
        return found, layer, cut(names, truth[0]), cut(names, truth[1]), cut(some, part)

    for (slopes, images, loss), layer, *expected in on_ranks(work, world):
        assert loss == pytest.approx(truth[2], rel=1e-12)
        for found, wanted in zip((slopes, images, layer), expected, strict=True):
            for left, right in zip(found, wanted, strict=True):
                torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-8)


def test_one_group_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    bring = Streamed._bring

    def watched(self: Streamed, groups: set[int]) -> None:
        bring(self, groups)
        there = [p for p in self.parameters.values() if p.untyped_storage().nbytes() > 8]
        most.append(sum(p.untyped_storage().nbytes() for p in there))
        assert most[-1] <= self.largest

    monkeypatch.setattr(Streamed, "_bring", watched)

    def work(ranks: Any) -> int:
        problem, weights = divided(models.Net(), ranks)
        sliced_gradient(problem, list(problem.parameters))
        assert weights.streamed is not None
        return weights.streamed.largest

    (largest, _) = on_ranks(work, 2)
    assert max(most) == largest == 65 * 8  # a block
    # Forward embedding, blocks and head, backward the blocks: a gradient of the embedding takes none of it, and the head is
    # there. Two passes, on each of two ranks.
    assert len(most) == 2 * 2 * 8


def test_a_product_sends_what_the_estimate_says() -> None:
    model = models.Net()
    told = scale({n: tuple(p.shape) for n, p in model.named_parameters()}, 2, itemsize=8)

    def work(ranks: Any) -> int:
        problem, weights = divided(model, ranks)
        sent = counted_bytes(ranks)
        engine = OnSlices(problem, Step(length=1e-3)).subset([0, 1])  # a batch for each
        names = list(problem.parameters)
        engine.product(names, weights.shards.parts(names, _tangents(problem)))
        return sent[0]

    # The head is there when the backward pass begins, and of the embedding that takes nothing; on either side.
    ends = sum(-(-p.numel() // 2) for n, p in model.named_parameters() if "layers" not in n)
    assert on_ranks(work, 2) == [told.moved_by_block - 2 * ends * 8] * 2


def test_second_derivatives_of_some_tensors_are_the_wholes() -> None:
    """What differences are held against: weights are gathered again where the graph of a gradient is walked back."""
    model = models.Net()
    one = problem_of(model)
    lean = one.subset([0]).lean(1 / 8)
    names, tangents = list(lean.parameters), [t.detach() for t in lean.parameters.values()]
    truth = FreshGraph(lean).product(names, tangents)

    def work(ranks: Any) -> Any:
        problem, weights = divided(model, ranks)
        small = problem.subset([0]).lean(1 / 8).alone()
        assert weights.streamed is not None
        with problem.gathered(), weights.streamed.whole(names):
            trusted(small)
            found = FreshGraph(small).product(names, tangents)
        assert all(bool(p.isnan().all()) for p in problem.model.parameters())
        return found

    for found in on_ranks(work, 2):
        for left, right in zip(found, truth, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-14)


def test_a_graph_is_weighed_without_its_weights() -> None:
    model = models.Net(width=16)
    whole = graph_bytes(problem_of(model), once=True)

    def work(ranks: Any) -> int:
        problem, _ = divided(model, ranks)
        with problem.gathered():
            return graph_bytes(problem, once=True)

    assert on_ranks(work, 2) == [pytest.approx(whole, rel=0.05)] * 2  # an address that is used again is counted once


def test_a_graph_of_sparse_tensors_is_weighed() -> None:
    assert graph_bytes(problem_of(_of(_Graph)), once=True) >= graph_bytes(problem_of(models.Net()), once=True)


class _Disordered(models.Net):
    """A network whose order is another in each rank."""

    turned = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in reversed(self.layers) if self.turned else self.layers:
            x = layer(x)
        return self.head(x)


def test_ranks_that_go_another_way_are_refused() -> None:
    """Blocks are of one size: nothing else would tell, and each would compute with the other's weights."""

    def work(ranks: Any) -> Any:
        problem, _ = divided(_Disordered(), ranks)
        problem.model.turned = bool(ranks.rank)  # type: ignore[assignment]
        for use in (problem.mean_loss, lambda: sliced_gradient(problem, list(problem.parameters))):
            with pytest.raises(LostError, match="out of step"):
                use()
        return True

    assert on_ranks(work, 2) == [True, True]


def test_a_gradient_that_is_not_finite_is_said_by_all() -> None:
    def work(ranks: Any) -> Any:
        problem, _ = divided(models.Net(), ranks)
        loss = problem.loss
        bad = problem.batches[1]
        problem = replace(problem, loss=lambda m, b: loss(m, b) * (float("nan") if b is bad else 1.0))
        with pytest.raises(UnsupportedError, match="gradient of the loss is not finite"):
            sliced_gradient(problem, list(problem.parameters))
        return True

    assert on_ranks(work, 2) == [True, True]


def test_what_a_pass_without_a_batch_finds_does_not_count() -> None:
    """Of three batches one rank has two, and the other goes through the first once more: its numbers count for nothing."""

    def work(ranks: Any) -> Any:
        problem, _ = divided(models.Net(), ranks)
        assert len(problem.shares) == 2
        assert sum(share for _, share in problem.shares) == pytest.approx([32 / 55, 23 / 55][ranks.rank])
        assert problem.subset([0, 2]).owners == [1, 1]  # in a fold of these two each rank is to have one
        assert OnSlices(problem, Step()).subset([0, 2]).problem.owners == [0, 1]
        return [share == 0 for _, share in problem.shares]

    assert on_ranks(work, 2) == [[False, True], [False, False]]


def test_weights_are_where_they_were_after_a_product() -> None:
    """Also where blocks stay gathered: the next update reads them within."""
    model = models.Net()
    names = [n for n, _ in model.named_parameters()]
    expected = gradient(problem_of(model), names)

    def work(ranks: Any) -> Any:
        problem, weights = divided(model, ranks)
        cut = weights.shards.parts
        with problem.gathered():
            OnSlices(problem, Step(length=1.0)).product(names, cut(names, _tangents(problem)))
            there = dict(problem.model.named_parameters())
            # First of the block that came last.
            for name, weight in sorted(model.named_parameters(), key=lambda item: "layers.0" not in item[0]):
                assert torch.equal(there[name], weight)
        found = sliced_gradient(problem.alone(), names)  # each process has all batches
        return list(zip(found, cut(names, expected), strict=True))

    for found in on_ranks(work, 2):
        for left, right in found:
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bend", [nn.GELU, nn.ReLU])
def test_kinks_are_refused_by_an_exact_product_of_small_tensors(bend: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), bend(), nn.Linear(64, 64), bend(), nn.Linear(64, 4))
    batches = [torch.randn(256, 8), torch.randn(256, 8)]

    def work(ranks: Any) -> Any:
        copy = deepcopy(model)
        problem = Problem.create(copy, lambda m, b: nn.functional.cross_entropy(m(b), b[:, :4].argmax(1)), batches)
        weights = Weights(copy, ranks)
        weights.stream(used_together(copy))
        problem = replace(problem.shared(ranks), gathered=weights.whole, streamed=weights.streamed)
        return chosen(problem, weights.shards, "differences", 0.0).mode

    found = on_ranks(work, 2)
    if bend is nn.GELU:
        assert found == ["differences", "differences"]
    for error in found if bend is nn.ReLU else ():
        assert type(error) is UnsupportedError
        assert "% apart: its relu have kinks" in str(error)
