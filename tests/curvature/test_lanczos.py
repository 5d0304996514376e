"""Lanczos from a random start: values, residuals and the bound from above, against dense eigenvalues."""

from __future__ import annotations

from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvcli.curvature.lanczos import Lanczos, Walk
from curvcli.curvature.operator import DenseOperator, Folded
from curvcli.curvature.space import OneDevice


def matrix_of(values: list[float] | Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (basis @ torch.diag(values) @ basis.T).to(dtype)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10_000), st.floats(0.01, 100))
def test_any_symmetric_matrix(size: int, seed: int, negative: float) -> None:
    torch.manual_seed(seed)
    values = torch.randn(size, dtype=torch.float64)
    values = torch.where(values < 0, values * negative, values)
    matrix = matrix_of(values, seed)
    found = Lanczos(tolerance=1e-7, margin=1e-6, max_products=400, seed=seed).extremes(DenseOperator(matrix))
    assert found.status == "converged"
    assert found.top is not None
    assert found.vector is not None
    top = float(values.max())
    assert found.top.value == pytest.approx(top, rel=1e-6, abs=1e-9)
    assert found.ceiling >= top - 1e-9 * float(values.abs().max())
    image = matrix @ found.vector - found.top.value * found.vector
    assert float(image.norm()) <= found.top.residual + 1e-6 * float(values.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "most"),
    [
        ([*torch.linspace(0, 1, 499).tolist(), 1.2], 25),  # one outlier
        ([*torch.linspace(0, 1, 495).tolist(), 1.5, 1.501, 1.502, 1.49, 1.48], 25),  # a cluster
        ([-1000.0, *torch.linspace(-5, 5, 499).tolist()], 60),  # the negative end dominates
        ([0.0] * 497 + [1.0, 2.0, 3.0], 6),  # low rank: it ends before the space does
        ([0.0] * 50, 1),
        ([1.0] * 50, 1),
        (torch.linspace(-5, -3, 60).tolist(), 60),
    ],
)
def test_spectra(values: list[float], most: int, dtype: torch.dtype) -> None:
    found = Lanczos().extremes(DenseOperator(matrix_of(values, dtype=dtype)))
    assert found.status == "converged"
    assert found.top is not None
    assert found.products <= most
    assert found.top.value == pytest.approx(max(values), rel=5e-3, abs=1e-6)
    assert found.ceiling >= max(values) * (1 - 1e-5 * (1 if max(values) > 0 else -1)) - 1e-6
    assert found.ceiling - found.top.value <= 0.031 * abs(max(values)) + 1e-6


def test_a_small_residual_is_not_enough() -> None:
    """A start that holds next to nothing of the top meets the tolerance at the second eigenvalue; the ceiling does not."""
    values = torch.tensor([2.0, 1.0, *torch.linspace(-0.5, 0.5, 300).tolist()], dtype=torch.float64)
    second = torch.zeros(302, dtype=torch.float64)
    second[1] = 1
    operator = DenseOperator(torch.diag(values))
    believed = Lanczos(margin=inf).extremes(operator, warm=second, share=1e-5)
    assert believed.top is not None
    assert believed.top.value == pytest.approx(1.0, rel=1e-2)
    assert believed.status == "converged"
    assert believed.ceiling > 2.0, "it says what may lie above"
    found = Lanczos().extremes(operator, warm=second, share=1e-5)
    assert found.top is not None
    assert found.top.value == pytest.approx(2.0, rel=1e-3)


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 60), st.integers(0, 10_000), st.floats(0.0, 1.0), st.booleans())
def test_what_none_but_the_top_lies_above(size: int, seed: int, apart: float, early: bool) -> None:
    torch.manual_seed(seed)
    values = torch.randn(size, dtype=torch.float64).sort().values
    solver = Lanczos(max_products=6 if early else 400, seed=seed, apart=apart)
    found = solver.extremes(DenseOperator(matrix_of(values, seed)))
    assert found.top is not None
    assert float(values[-2]) - 1e-9 <= found.second
    assert found.second < found.top.value or found.second == found.ceiling


def test_the_second_eigenvalue_is_told_apart_where_that_is_asked_for() -> None:
    operator = DenseOperator(matrix_of([*torch.linspace(-1, 1, 398).tolist(), 1.5, 2.5]))
    plain, more = (Lanczos(margin=0.1, apart=apart).extremes(operator) for apart in (0.0, 0.9))
    assert more.top is not None
    assert plain.products < more.products <= plain.products + 4
    assert 1.5 <= more.second <= 1.8 < plain.second
    assert Lanczos(margin=0.1, apart=0.6).extremes(operator).products == plain.products, "it lies above that share"
    whole = Lanczos(apart=0.9).extremes(DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))))
    assert whole.second == pytest.approx(2.0)
    for multiple in (1, 50):  # one product tells nothing of a second eigenvalue, nor of how often the first one is there
        assert Lanczos(apart=0.9).extremes(DenseOperator(3 * torch.eye(multiple, dtype=torch.float64))).second >= 3 - 1e-9


def test_the_ceiling_is_exceeded_as_rarely_as_it_says() -> None:
    """One eigenvalue and nothing else: after one product the ceiling is too low just where the start hardly has it."""
    operator, tries = DenseOperator(torch.diag(torch.tensor([5.0, *[0.0] * 199], dtype=torch.float64))), 600
    found = [Lanczos(doubt=0.3, max_products=1, seed=seed).extremes(operator) for seed in range(tries)]
    assert 0.24 <= sum(extremes.ceiling < 5.0 for extremes in found) / tries <= 0.34


def test_limits() -> None:
    matrix = matrix_of(torch.linspace(-50, 1, 400))
    found = Lanczos(max_products=5).extremes(DenseOperator(matrix))
    assert (found.status, found.products) == ("max-hvps", 5)
    assert found.ceiling >= 1.0
    assert Lanczos(deadline=0.0).extremes(DenseOperator(matrix)).products == 1
    matrix += torch.triu(torch.ones_like(matrix))
    assert Lanczos().extremes(DenseOperator(matrix)).status == "asymmetric"
    matrix[5, 5] = inf
    broken = Lanczos().extremes(DenseOperator(matrix))
    assert (broken.status, broken.top, broken.ceiling) == ("non-finite", None, inf)


@pytest.mark.parametrize("largest", [101.0, 3e4])
def test_the_basis_is_orthonormal_to_rounding(largest: float) -> None:
    # Outliers are found one after the other, and of the image that finds one little is left by the vectors before.
    values = [-40.0, *torch.linspace(-1, 1, 195).tolist(), 50.0, 50.01, 100.0, largest]
    operator = Folded([(0.5, DenseOperator(matrix_of(values, dtype=torch.float32)))] * 2)
    Lanczos(tolerance=0.0, max_products=40).extremes(operator)
    basis = torch.stack(operator.vectors).double()
    assert len(basis) == 40
    assert float((basis @ basis.T - torch.eye(40)).abs().max()) < 2e-6


def test_a_crooked_entry_far_from_the_last_vectors_is_seen() -> None:
    matrix = matrix_of(torch.linspace(-3, 4, 60))
    operator = Folded([(0.5, DenseOperator(matrix))] * 2)
    Lanczos(tolerance=0.0, max_products=9).extremes(operator)
    first, later = operator.vectors[1], operator.vectors[6]
    found = Lanczos(tolerance=0.0, max_products=9).extremes(DenseOperator(matrix + torch.outer(first, later)))
    assert found.status == "asymmetric"
    last = torch.outer(operator.vectors[5], later)  # beside the diagonal, too
    assert Lanczos(tolerance=0.0, max_products=9).extremes(DenseOperator(matrix + last)).status == "asymmetric"


def test_both_ends_where_the_lower_is_waited_for() -> None:
    values = [-3.0, *torch.linspace(0, 2, 300).tolist(), 40.0]
    found = Lanczos(bottom_tolerance=0.01).extremes(DenseOperator(matrix_of(values)))
    assert found.bottom is not None
    assert found.bottom.value == pytest.approx(-3.0, abs=0.2)
    quick = Lanczos().extremes(DenseOperator(matrix_of(values)))
    assert quick.products < found.products


def test_folds_are_the_parts_between_the_vectors() -> None:
    parts = [matrix_of(torch.linspace(0, scale, 40), seed) for seed, scale in enumerate((1.0, 2.0, 3.0))]
    weights = [0.5, 0.3, 0.2]
    operator = Folded([(w, DenseOperator(part)) for w, part in zip(weights, parts, strict=True)])
    found = Lanczos(tolerance=1e-6).extremes(operator)
    whole = sum(w * part for w, part in zip(weights, parts, strict=True))
    assert found.top is not None
    assert found.top.value == pytest.approx(float(torch.linalg.eigvalsh(whole)[-1]), rel=1e-6)
    basis = torch.stack(operator.vectors)
    for part, projected in zip(parts, operator.projected(), strict=True):
        assert torch.allclose(basis @ part @ basis.T, projected, atol=1e-9)


def test_a_support_leaves_a_submatrix() -> None:
    matrix, support = matrix_of(torch.linspace(-3, 4, 60)), torch.arange(60) % 3 > 0
    operator = Folded([(0.5, DenseOperator(matrix)), (0.5, DenseOperator(matrix))])
    found = Lanczos(tolerance=1e-8, max_products=60).extremes(operator, support=support)
    within = torch.linalg.eigvalsh(matrix[support][:, support])
    assert found.top is not None
    assert found.vector is not None
    assert found.top.value == pytest.approx(float(within[-1]), rel=1e-7)
    assert not found.vector[~support].any()
    assert float(torch.linalg.eigvalsh(operator.projected()[0])[-1]) == pytest.approx(found.top.value, rel=1e-9)


def test_a_solve_that_was_paused_goes_on_to_the_same_digits() -> None:
    matrix = torch.diag(torch.linspace(-1, 1, 400, dtype=torch.float64))
    matrix[0, 0] = 1.5
    solver, asked = Lanczos(tolerance=1e-4), []
    walk = solver.begin(DenseOperator(matrix))

    def pause(so_far: Walk) -> bool:
        asked.append(so_far.products)
        return len(asked) == 2

    found = solver.finish(walk, pause)
    assert (walk.paused, found.status, found.products) == (True, "max-hvps", asked[-1])
    assert 0 < asked[0] < asked[1]
    assert found.top is not None
    assert found.top.residual <= 0.05 * found.top.value
    assert found.ceiling > found.top.value
    assert walk.left is None, "it lies with the basis, on disk if that does"
    done, straight = solver.finish(walk), solver.extremes(DenseOperator(matrix))
    assert (walk.paused, done.status) == (False, "converged")
    assert (done.top, done.bottom, done.ceiling, done.products) == (
        straight.top, straight.bottom, straight.ceiling, straight.products,
    )  # fmt: skip
    assert done.products > found.products


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e-22, 1e20, 1e30])
def test_a_value_whose_square_float32_does_not_hold(scale: float) -> None:
    """A residual that reads as 0 for its squares' sake would stop at the first quotient, converged."""
    matrix = scale * matrix_of([*torch.linspace(-1, 1, 199).tolist(), 2.0])
    found = Lanczos().extremes(DenseOperator(matrix.float()))
    assert found.status == "converged"
    assert found.top is not None
    assert found.top.value == pytest.approx(2 * scale, rel=1e-3)
    assert found.ceiling >= 2 * scale


@pytest.mark.parametrize("basis", [8, 16])
def test_a_basis_takes_no_more_vectors_than_there_is_room_for(basis: int) -> None:
    taken: list[int] = []

    class Counting(OneDevice):
        def empty(self, rows: int) -> Tensor:
            taken.append(rows)
            return super().empty(rows)

    operator = DenseOperator(matrix_of(torch.linspace(-1, 1, 200)))
    operator.space = Counting(200, torch.float64, torch.device("cpu"))
    found = Lanczos(tolerance=1e-9, basis=basis).extremes(operator)
    assert (found.status, found.products) == ("max-hvps", basis)
    assert sum(taken) == basis + 1, "the basis, and the top's vector made of it"
