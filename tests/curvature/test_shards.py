"""Tensors in slices, on threads in the place of processes: whole again, summed, and vectors as one process has them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import models
import pytest
import torch
from threads import counted_bytes, on_ranks
from torch import Tensor, nn

from curvcli.analysis.scale import scale
from curvcli.curvature import shards as shards_file
from curvcli.curvature import space as space_file
from curvcli.curvature.gathering import Gathered, Weights, across, sliced
from curvcli.curvature.hvp import build
from curvcli.curvature.inverse_root import Diagonal, InverseRoot, Multiple
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.problem import Problem
from curvcli.curvature.ranks import ALONE, Processes
from curvcli.curvature.shards import Sharded, Shards
from curvcli.curvature.space import OneDevice
from curvcli.errors import LostError

# More than a bucket of 8 entries, fewer entries than processes, none at all, and shares that do not divide.
SHAPES = {"matrix": (5, 7), "vector": (3,), "number": (), "two": (2,), "none": (0, 4), "even": (2, 3)}
WHOLE = {n: torch.randn(s, generator=torch.Generator().manual_seed(len(n))).double() for n, s in SHAPES.items()}
NAMES = list(SHAPES)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_file, "BUCKET", 8)
    monkeypatch.setattr(space_file, "DRAWN", 16)


def of(ranks: Any) -> Shards:
    return Shards(ranks, {n: torch.Size(shape) for n, shape in SHAPES.items()})


def on(work: Callable[[Shards], Any], world: int) -> list[Any]:
    return on_ranks(lambda ranks: work(of(ranks)), world)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_slices_are_put_together_and_sums_are_cut_into_them(world: int) -> None:
    def work(shards: Shards) -> Any:
        parts = [shards.part(n, WHOLE[n]) for n in NAMES]
        mine = [WHOLE[n] * (shards.ranks.rank + 1) for n in NAMES]
        summed = shards.scatter(NAMES, mine)
        return shards.gather(NAMES, parts), summed, [shards.bounds(n) for n in NAMES], mine

    for wholes, summed, bounds, left in on(work, world):
        for name, whole, part, (begin, end) in zip(NAMES, wholes, summed, bounds, strict=True):
            assert torch.equal(whole, WHOLE[name])
            torch.testing.assert_close(part, WHOLE[name].reshape(-1)[begin:end] * sum(range(1, world + 1)))
        assert left == []


def test_one_process_that_is_alone_has_everything() -> None:
    shards = of(ALONE)
    parts = [shards.part(n, WHOLE[n]) for n in NAMES]
    assert all(torch.equal(a, WHOLE[n]) for n, a in zip(NAMES, shards.gather(NAMES, parts), strict=True))


@pytest.mark.parametrize("size", [3, 17, 31, 32, 33, 47])
def test_a_seed_is_the_vector_of_one_process(size: int) -> None:
    def work(ranks: Processes) -> Tensor:
        shards = Shards(ranks, {"a": torch.Size([size // 2]), "b": torch.Size([size - size // 2])})
        space = Sharded(shards, ("a", "b"), torch.float64, torch.device("cpu"))
        return space.gather(space.random(torch.Generator().manual_seed(5)))

    one = OneDevice(size, torch.float64, torch.device("cpu")).random(torch.Generator().manual_seed(5))
    assert all(torch.equal(found, one) for found in on_ranks(work, 3))


def test_what_is_said_of_a_vector_is_of_all_of_it() -> None:
    flat = torch.cat([WHOLE[n].reshape(-1) for n in NAMES])

    def work(shards: Shards) -> Any:
        space = Sharded(shards, tuple(NAMES), torch.float64, torch.device("cpu"))
        vector = torch.cat([shards.part(n, WHOLE[n]) for n in NAMES])
        rows = torch.stack([vector, 2 * vector])
        bad = vector.clone()
        if shards.ranks.rank == 1:
            bad[0] = torch.nan
        return (
            space.size, space.inner(rows, vector).tolist(), space.norm(vector), space.count(vector > 0),
            space.finite(vector), space.finite(bad), space.agree(shards.ranks.rank + 4.0), space.empty(2).shape[1],
        )  # fmt: skip

    square = float(flat @ flat)
    for rank, (size, inner, norm, count, fine, bad, agreed, held) in enumerate(on(work, 3)):
        assert (size, count, fine, bad, agreed) == (len(flat), int((flat > 0).sum()), True, False, [4.0])
        assert inner == pytest.approx([square, 2 * square])
        assert norm == pytest.approx(square**0.5)
        assert held == sum(min(-(-w.numel() // 3), max(w.numel() - rank * -(-w.numel() // 3), 0)) for w in WHOLE.values())


def test_a_solve_in_slices_is_that_of_one_process() -> None:
    size = sum(w.numel() for w in WHOLE.values())
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(1)).double()
    matrix = matrix + matrix.T

    class Operator:
        def __init__(self, shards: Shards) -> None:
            self.shards, self.space = shards, Sharded(shards, tuple(NAMES), torch.float64, torch.device("cpu"))

        def matvec(self, vector: Tensor) -> Tensor:
            image = (matrix @ self.space.gather(vector)).split([w.numel() for w in WHOLE.values()])
            return torch.cat([self.shards.part(n, piece) for n, piece in zip(NAMES, image, strict=True)])

    for found in on(lambda shards: Lanczos(tolerance=1e-5).extremes(Operator(shards)), 3):
        assert found.status == "converged"
        assert found.top.value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-10)


def test_weights_are_there_within_and_nowhere_else() -> None:
    def work(ranks: Processes) -> Any:
        torch.manual_seed(0) if ranks.world == 1 else None
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        model[1].weight.requires_grad_(False)  # what is frozen weighs as much
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.fill_(i + 1.0)
        weights = Weights(model, ranks)
        before = [(bool(p.isnan().all()), p.untyped_storage().nbytes(), p.shape) for p in model.parameters()]
        with weights.whole(), weights.whole():
            seen = [float(p.detach().mean()) for p in model.parameters()]
        with pytest.raises(KeyError), weights.whole():
            raise KeyError
        after = [bool(p.isnan().all()) for p in model.parameters()]
        return before, seen, after

    shapes = [torch.Size(s) for s in ((4, 3), (4,), (2, 4), (2,))]
    for before, seen, after in on_ranks(work, 2):
        assert before == [(True, 4, shape) for shape in shapes]
        assert seen == [1.0, 2.0, 3.0, 4.0]
        assert all(after)


class Turned:
    """P^(-1/2) that is no matter of entries."""

    idle, positive = 0, True

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def apply(self, tensor: Tensor) -> Tensor:
        return self.factor * tensor.flip(0)

    invert = solve = apply

    def scaled(self, factor: float) -> Turned:
        return Turned(self.factor * factor)

    def to(self, parameter: Tensor) -> Turned:
        return self


@pytest.mark.parametrize(
    "whole",
    [
        Multiple(4.0),
        Diagonal(torch.arange(1.0, 6.0).double()[:, None], torch.arange(5)[:, None] == 2),
        Diagonal(torch.arange(1.0, 36.0).double().view(5, 7), torch.arange(35).view(5, 7) % 3 == 0),
        Turned(),
    ],
)
def test_a_preconditioner_on_slices_is_the_whole_ones(whole: InverseRoot) -> None:
    def work(shards: Shards) -> Any:
        part, own = shards.part("matrix", WHOLE["matrix"]), sliced(whole, "matrix", shards).to(WHOLE["matrix"])
        found = [f(part) for f in (own.apply, own.invert, own.solve, own.scaled(3.0).apply)]
        expected = [f(WHOLE["matrix"]) for f in (whole.apply, whole.invert, whole.solve, whole.scaled(3.0).apply)]
        again = across(own, "matrix", shards).apply(WHOLE["matrix"])
        same = [torch.equal(a, shards.part("matrix", b)) for a, b in zip(found, expected, strict=True)]
        return [*same, torch.equal(again, expected[0])], own.positive

    assert on(work, 3) == [([True] * 5, True)] * 3
    assert across(whole, "matrix", None) is whole
    assert sliced(whole, "matrix", None) is whole


def test_processes_that_gather_different_tensors_are_out_of_step() -> None:
    def work(ranks: Processes) -> Tensor:
        return ranks.gathered(torch.ones(2 + ranks.rank))

    for found in on_ranks(work, 2):
        assert type(found) is LostError
        assert "out of step" in str(found)


def test_a_product_sends_what_the_estimate_says() -> None:
    net = models.Net()  # copied: its seed is that of all threads
    shapes = {n: p.shape for n, p in net.named_parameters()}

    def work(ranks: Processes) -> Any:
        sent = counted_bytes(ranks)
        batches, model = models.data(), deepcopy(net)
        problem = Problem.create(model, models.loss, batches, models.weights(batches)).shared(ranks)
        weights, shards = Weights(model, ranks), Shards(ranks, shapes)
        engine = Gathered(build(problem, "fresh").part(), shards, weights.whole)
        names = list(shapes)
        along = [shards.part(n, torch.ones(shape).double()) for n, shape in shapes.items()]
        images = engine.product(names, along)
        one = sent[0]
        with engine.held():
            for i in range(2):
                engine.subset([i]).product(names, along)
        return one, sent[0] - one, shards.gather(names, images)

    batches = models.data()
    whole = build(Problem.create(net, models.loss, batches, models.weights(batches)), "fresh")
    expected = whole.product(list(shapes), [torch.ones(s).double() for s in shapes.values()])
    told = scale({n: tuple(shape) for n, shape in shapes.items()}, 2, itemsize=8)
    for one, two_folds, images in on_ranks(work, 2):
        assert one == told.moved
        assert two_folds == told.moved + 2 * told.moved // 4
        torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-12)


def test_a_leaner_problem_is_of_the_smallest_parameters() -> None:
    batches = models.data()
    whole = Problem.create(models.Net(), models.loss, batches, models.weights(batches))
    sizes = {n: p.numel() for n, p in whole.parameters.items()}
    few = whole.lean(1 / 4).parameters
    assert 0 < sum(sizes[n] for n in few) <= sum(sizes.values()) / 4
    assert max(sizes[n] for n in few) <= min(size for n, size in sizes.items() if n not in few)
    assert list(whole.lean(0).parameters) == [min(sizes, key=lambda n: sizes[n])]
    names = list(few)
    along = [torch.ones_like(p) for p in few.values()]
    found, expected = (build(p, "fresh").product(names, along) for p in (whole.lean(1 / 4), whole))
    torch.testing.assert_close(found, expected)
