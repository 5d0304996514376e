"""Sharpness in a norm against closed forms and against every vertex of small balls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product as every
from typing import Any

import pytest
import torch
from threads import on_ranks
from torch import Tensor

from curvcli.curvature import balls, ranks
from curvcli.curvature.balls import Ball, MaxNorm, Spectral, polar
from curvcli.curvature.gathering import sliced_ball
from curvcli.curvature.ranks import Processes
from curvcli.curvature.shards import Shards
from curvcli.curvature.steepest import FrankWolfe, distance, joint_dual


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(matrix: Tensor) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Products with a matrix over the entries of all tensors, end to end."""

    def times(tensors: Sequence[Tensor]) -> list[Tensor]:
        flat = matrix @ torch.cat([t.flatten() for t in tensors])
        return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]

    return times


def starts(*shapes: tuple[int, ...], count: int = 6) -> dict[str, list[Tensor]]:
    return {f"start {i}": [random(*shape, seed=100 * i + j) for j, shape in enumerate(shapes)] for i in range(count)}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("definite", [True, False])
def test_the_max_norm_against_every_vertex(seed: int, definite: bool) -> None:
    """Where no diagonal entry is negative a quadratic form is convex in each coordinate: largest at a vertex."""
    a = random(9, 9, seed=seed)
    h = a @ a.T if definite else (a + a.T) - torch.diag((a + a.T).diagonal()) + torch.eye(9, dtype=a.dtype)
    assert definite == bool((torch.linalg.eigvalsh(h) > 0).all())
    vertices = torch.tensor(list(every((-1.0, 1.0), repeat=9)), dtype=torch.float64)
    truth = float(((vertices @ h) * vertices).sum(dim=1).max())
    found = FrankWolfe(1e-9, 200).sharpest(dense(h), [MaxNorm()], starts((9,), count=8))
    assert found.status == "settled"
    assert found.value is not None
    assert 0.9 * truth <= found.value <= truth * (1 + 1e-9)
    assert found.direction is not None
    (d,) = found.direction
    assert float(d @ h @ d) == pytest.approx(found.value)
    assert float(d.abs().max()) <= 1 + 1e-12


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_the_spectral_norm_against_a_closed_form(shape: tuple[int, int]) -> None:
    """tr(A d' B d) over the ball is the sum of products of A's and B's eigenvalues in order (von Neumann's inequality)."""
    m, n = shape
    a, b = random(n, n, seed=1), random(m, m, seed=2)
    a, b = a @ a.T, b @ b.T
    truth = sum(
        float(x * y) for x, y in zip(torch.linalg.eigvalsh(a).flip(0), torch.linalg.eigvalsh(b).flip(0), strict=False)
    )

    def times(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [b @ tensors[0] @ a]

    found = FrankWolfe(1e-12, 2000).sharpest(times, [Spectral(1.5)], starts(shape, count=3))
    assert found.value == pytest.approx(1.5**2 * truth, rel=1e-3)
    assert found.value <= 1.5**2 * truth * (1 + 1e-9)


def test_a_joint_ball_of_both_kinds_and_radii_against_rank_one() -> None:
    """(a'd)^2 over the ball is the dual norm of a, squared: blocks that couple count together."""
    shapes = [(4, 3), (5,), (2, 2, 3)]
    kinds: list[Ball] = [Spectral(0.5), MaxNorm(2.0), Spectral(1.0)]
    parts = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    flat = torch.cat([p.flatten() for p in parts])
    dual = 0.5 * float(torch.linalg.matrix_norm(parts[0], "nuc")) + 2 * float(parts[1].abs().sum())
    dual += sum(float(torch.linalg.matrix_norm(piece, "nuc")) for piece in parts[2])
    assert joint_dual(kinds, parts) == pytest.approx(dual)
    found = FrankWolfe().sharpest(dense(torch.outer(flat, flat)), kinds, starts(*shapes, count=2))
    assert found.value == pytest.approx(dual**2)
    assert found.status == "settled"
    assert found.products <= 6
    assert found.spread == pytest.approx(0)


def test_where_h_curves_down_the_value_never_falls_and_flat_is_said() -> None:
    h = -torch.eye(6, dtype=torch.float64)
    found = FrankWolfe(1e-6, 60).sharpest(dense(h), [MaxNorm()], starts((6,), count=1))
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.status == "flat"
    # The plain power step d <- sign(Hd) goes to and fro here between vertices of value 2 and -2 for ever.
    h = torch.tensor([[-3.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    values, start = [], torch.tensor([1.0, -1.0], dtype=torch.float64)
    for most in range(1, 9):
        found = FrankWolfe(0.0, most).sharpest(dense(h), [MaxNorm()], {"one": [start]})
        assert found.value is not None
        values.append(found.value)
    assert values == sorted(values)
    assert values[-1] == pytest.approx(3 + 1 / 3, rel=1e-2)  # at (1/3, 1), not a vertex


def test_products_are_counted_and_starts_get_equal_parts() -> None:
    a = random(12, 12, seed=3)
    calls = []
    times = dense(a @ a.T)

    def counted(tensors: Sequence[Tensor]) -> list[Tensor]:
        calls.append(1)
        return times(tensors)

    found = FrankWolfe(0.0, 20).sharpest(counted, [MaxNorm()], starts((12,), count=2))
    assert len(calls) == found.products <= 20
    assert set(found.starts) == {"start 0", "start 1"}
    one = FrankWolfe(1e-2, 1).sharpest(counted, [MaxNorm()], starts((12,), count=1))
    assert (one.status, one.products, one.improvement) == ("unsettled", 1, None)
    late = FrankWolfe(1e-2, 20, deadline=0.0).sharpest(counted, [MaxNorm()], starts((12,), count=2))
    assert (late.status, late.products) == ("unsettled", 2)


@pytest.mark.parametrize("after", [0, 1])
def test_a_product_that_overflows_is_a_status(after: int) -> None:
    calls = []

    def bad(tensors: Sequence[Tensor]) -> list[Tensor]:
        calls.append(1)
        return [t * (float("inf") if len(calls) > after else 1.0) for t in tensors]

    found = FrankWolfe().sharpest(bad, [Spectral()], starts((3, 2), count=1))
    assert (found.value, found.direction, found.status) == (None, None, "non-finite")


def test_a_start_that_is_no_number_is_a_status() -> None:
    start = {"momentum": [torch.full((3, 2), float("nan"), dtype=torch.float64)]}
    assert FrankWolfe().sharpest(lambda d: [t + 1 for t in d], [Spectral()], start).status == "non-finite"


def test_large_matrices_stay_in_the_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balls, "DENSE", 8)
    for shape in ((20, 30), (30, 20), (2, 20, 30)):
        matrix = random(*shape, seed=4)
        values = torch.linalg.svdvals(polar(matrix))
        assert float(values.max()) <= 1 + 1e-12
        assert float(values.min()) > 0.999
        exact = float(torch.linalg.svdvals(matrix).sum())
        assert exact * 0.999 <= Spectral().dual(matrix) <= exact * (1 + 1e-12)
    assert float(polar(torch.zeros(20, 30)).abs().max()) == 0.0
    low_rank = random(20, 2, seed=5) @ random(2, 30, seed=6)
    assert float(torch.linalg.svdvals(polar(low_rank)).max()) <= 1 + 1e-12


def test_a_convolution_is_one_matrix() -> None:
    kernel = random(4, 3, 2, 2)
    assert Spectral(2.0).dual(kernel) == pytest.approx(2 * float(torch.linalg.matrix_norm(kernel.flatten(1), "nuc")))
    d = Spectral(2.0).steepest(kernel)
    assert d.shape == kernel.shape
    assert float((d * kernel).sum()) == pytest.approx(Spectral(2.0).dual(kernel))


def test_distance_is_none_without_a_gradient() -> None:
    assert distance(0.1, 4.0, 2.0) == pytest.approx(0.1)
    assert distance(0.1, 4.0, 0.0) is None
    assert distance(1e300, 1e300, 1.0) is None


class Told(ranks.Alone):
    """Rank 0 where it is given nothing; else another rank, which hears what rank 0 said, word by word."""

    def __init__(self, said: Sequence[list[float]] = ()) -> None:
        self.said, self._rest = list(said), iter(said) if said else None

    def first(self, numbers: Sequence[float]) -> list[float]:
        if self._rest is not None:
            return next(self._rest)
        self.said.append(list(numbers))
        return list(numbers)


@pytest.mark.parametrize(("off", "deadline"), [(1e-9, float("inf")), (0.0, 0.0)])
def test_another_rank_goes_where_rank_0_goes(off: float, deadline: float) -> None:
    """Alone it would take the other start, whose value rounds to more there, or stop at once, being late by its clock."""
    begin = {"one": [torch.tensor([1.0, 1.0, 0.3])], "other": [torch.tensor([1.0, -1.0, 0.3])]}
    begin = {name: [tensors[0].double()] for name, tensors in begin.items()}

    def times(b: float) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        return dense(torch.tensor([[1.0, b, 0.0], [b, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64))

    with ranks.within(Told()) as first:
        lead = FrankWolfe(0.0, 12).sharpest(times(1e-9), [MaxNorm()], begin)
    with ranks.within(Told(first.said)):  # type: ignore[attr-defined]
        found = FrankWolfe(0.0, 12, deadline).sharpest(times(1e-9 - 2 * off), [MaxNorm()], begin)
    assert found.products == lead.products
    assert torch.equal(found.direction[0], lead.direction[0])  # type: ignore[index]
    alone = FrankWolfe(0.0, 12, deadline).sharpest(times(1e-9 - 2 * off), [MaxNorm()], begin)
    assert (alone.products, alone.direction[0].tolist()) != (lead.products, lead.direction[0].tolist())  # type: ignore[index]


def test_on_slices_it_finds_what_one_process_finds() -> None:
    shapes = {"signs": torch.Size((5,)), "matrix": torch.Size((4, 3)), "none": torch.Size((0,))}
    kinds: dict[str, Any] = {"signs": MaxNorm(0.5), "matrix": Spectral(2.0), "none": MaxNorm()}
    h = random(17, 17)
    times, names = dense(h + h.T), list(shapes)
    start = [random(*shape, seed=i) for i, shape in enumerate(shapes.values())]

    def work(ranks: Processes) -> Any:
        shards = Shards(ranks, shapes)
        own = [sliced_ball(kinds[n].scaled(2.0), n, shards).scaled(0.5) for n in names]
        solver = FrankWolfe(1e-9, 12, holders=ranks)
        on_slices = lambda d: shards.parts(names, times(shards.gather(names, d)))  # noqa: E731
        found = solver.sharpest(on_slices, own, {"one": shards.parts(names, start)})
        bad = solver.sharpest(lambda d: [t / float(ranks.rank > 0) for t in d], own, {"one": shards.parts(names, start)})
        whole = shards.gather(names, found.direction or [])
        return found.value, whole, joint_dual(own, shards.parts(names, start)), [b.radius for b in own], bad.status

    one = FrankWolfe(1e-9, 12).sharpest(times, list(kinds.values()), {"one": start})
    assert one.value
    for value, whole, dual, radii, bad in on_ranks(work, 3):
        assert value == pytest.approx(one.value, rel=1e-9)
        torch.testing.assert_close(whole, one.direction)
        assert dual == pytest.approx(joint_dual(list(kinds.values()), start), rel=1e-12)
        assert radii == [0.5, 2.0, 1.0]
        assert bad == "non-finite"  # in the slices of rank 0 alone, and all say so
