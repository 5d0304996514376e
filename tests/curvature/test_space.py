"""A vector that is held in parts is another space, and the eigensolver finds the same in it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from curvcli.curvature import space as module
from curvcli.curvature.davidson import Davidson
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.ritz import Extremes
from curvcli.curvature.space import OneDevice


class Meeting:
    """Where processes meet: here threads, each of which brings its part and gets all of them."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.parts = Barrier(ranks, timeout=30), [torch.empty(0)] * ranks

    def all(self, rank: int, part: Tensor) -> list[Tensor]:
        self.parts[rank] = part
        self.barrier.wait()
        found = list(self.parts)
        self.barrier.wait()
        return found


class Rows:
    """The space of vectors whose entries `begin` to `end` are held here."""

    def __init__(self, size: int, begin: int, end: int, meeting: Meeting, rank: int) -> None:
        self.size, self.begin, self.end, self.meeting, self.rank = size, begin, end, meeting, rank
        self.whole = OneDevice(size, torch.float64, torch.device("cpu"))

    def _sum(self, part: Tensor) -> Tensor:
        return torch.stack(self.meeting.all(self.rank, part)).sum(dim=0)

    def empty(self, rows: int) -> Tensor:
        return torch.empty((rows, self.end - self.begin), dtype=torch.float64)

    def random(self, generator: torch.Generator) -> Tensor:
        return self.whole.random(generator)[self.begin : self.end]

    def inner(self, rows: Tensor, vector: Tensor) -> Tensor:
        return self._sum(rows @ vector)

    def here(self, vectors: Tensor) -> Tensor:
        return vectors

    def combine(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        return coefficients @ rows

    def norm(self, vector: Tensor) -> float:
        return float(self._sum(vector.square().sum()).sqrt())

    def finite(self, vector: Tensor) -> bool:
        return bool(self._sum((~torch.isfinite(vector)).sum()) == 0)

    def count(self, mask: Tensor) -> int:
        return int(self._sum(mask.sum()))

    def gather(self, vector: Tensor) -> Tensor:
        return torch.cat(self.meeting.all(self.rank, vector))

    def agree(self, *numbers: float) -> list[float]:
        return self.meeting.all(self.rank, torch.tensor(numbers, dtype=torch.float64))[0].tolist()


class RowsOf:
    """A symmetric matrix of which some rows are held here."""

    def __init__(self, matrix: Tensor, space: Rows) -> None:
        self.matrix, self.space = matrix[space.begin : space.end], space

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ self.space.gather(vector)


def held_in_parts(matrix: Tensor, cuts: list[int], solve: Callable[[RowsOf], Any]) -> list[Any]:
    """What each of several threads finds, each of which holds the rows between two cuts."""
    meeting, ends = Meeting(len(cuts) - 1), list(pairwise(cuts))
    with ThreadPoolExecutor(len(ends)) as pool:
        spaces = [Rows(len(matrix), begin, end, meeting, rank) for rank, (begin, end) in enumerate(ends)]
        return [f.result() for f in [pool.submit(solve, RowsOf(matrix, space)) for space in spaces]]


@pytest.fixture
def matrix() -> Tensor:
    """Indefinite, its negative end the larger one."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.cat([torch.tensor([-50.0, 9.0, 8.5]), torch.linspace(-1, 1, 57)]).double()) @ basis.T


@pytest.mark.parametrize("cuts", [[0, 60], [0, 7, 60], [0, 20, 21, 60]])
def test_both_ends_of_a_matrix_held_in_parts(matrix: Tensor, cuts: list[int]) -> None:
    # Six vectors, so that it restarts more than once.
    solver = Davidson(tolerance=1e-8, bottom_tolerance=1e-8, basis=6)
    found: list[Extremes] = held_in_parts(matrix, cuts, solver.extremes)
    values = torch.linalg.eigvalsh(matrix)
    for extremes in found:
        assert extremes.status == "converged"
        assert extremes.top is not None and extremes.bottom is not None  # noqa: PT018
        assert extremes.top.value == pytest.approx(float(values[-1]), rel=1e-10)
        assert extremes.bottom.value == pytest.approx(float(values[0]), rel=1e-10)
        assert extremes.products == found[0].products
    whole = torch.cat([extremes.vector for extremes in found if extremes.vector is not None])
    assert float(whole.norm()) == pytest.approx(1, abs=1e-10)
    assert torch.allclose(matrix @ whole, values[-1] * whole, atol=1e-6)


@pytest.mark.parametrize("cuts", [[0, 60], [0, 12, 60], [0, 20, 21, 60]])
def test_lanczos_on_a_matrix_held_in_parts(matrix: Tensor, cuts: list[int]) -> None:
    found: list[Extremes] = held_in_parts(matrix, cuts, Lanczos(tolerance=1e-8).extremes)
    for extremes in found:
        assert extremes.status == "converged"
        assert extremes.top == found[0].top, "one decision in all parts"
        assert extremes.top is not None
        assert extremes.top.value == pytest.approx(9.0, rel=1e-10)
        assert extremes.ceiling == found[0].ceiling


def test_a_product_that_overflows_in_one_part_is_non_finite_in_all(matrix: Tensor) -> None:
    matrix[50, 50] = torch.inf
    found = held_in_parts(matrix, [0, 30, 60], Davidson().extremes)
    assert [extremes.status for extremes in found] == ["non-finite", "non-finite"]


@pytest.mark.parametrize("size", [2**16 - 1, 2**16 + 1, 2**22 + 7])
def test_products_and_norms_of_long_vectors_are_good_to_rounding(size: int) -> None:
    # Added up in one go on a CPU, 2^22 float32 entries are 1e-4 low, and a basis of such vectors is none.
    space = OneDevice(size, torch.float32, torch.device("cpu"))
    rows = torch.stack([torch.rand(size, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    truth = (rows.double() @ rows[1].double()).tolist()
    assert space.inner(rows, rows[1]).tolist() == pytest.approx(truth, rel=5e-6)
    assert space.norm(rows[1]) ** 2 == pytest.approx(truth[1], rel=5e-6)


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf")])
def test_one_entry_that_is_not_finite_is_seen(entry: float) -> None:
    vector = torch.linspace(-1, 1, 1001)
    space = OneDevice(1001, vector.dtype, vector.device)
    assert space.finite(vector)
    vector[77] = entry
    assert not space.finite(vector)


def test_numbers_drawn_in_parts_are_those_of_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAWN", 32)
    for size in range(1, 140):
        space = OneDevice(size, torch.float64, torch.device("cpu"))
        whole = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
        assert torch.equal(space.random(torch.Generator().manual_seed(size)), whole), size
