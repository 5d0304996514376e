"""The eigensolver on plain matrices, against torch.linalg.eigvalsh."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvcli.curvature.davidson import Davidson
from curvcli.curvature.operator import DenseOperator


def spectrum(values: list[float], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def test_negative_end_that_dominates_a_hundredfold() -> None:
    matrix = spectrum([-339_892.0, -50_000.0, *torch.linspace(-100, 100, 200).tolist(), 3_307.0])
    found = Davidson(tolerance=1e-6, bottom_tolerance=1e-6).extremes(DenseOperator(matrix))
    assert found.status == "converged"
    assert found.top is not None
    assert found.bottom is not None
    assert found.top.value == pytest.approx(3_307.0, rel=1e-6)
    assert found.bottom.value == pytest.approx(-339_892.0, rel=1e-6)


def test_small_eigenvalue_beside_a_huge_negative_one_in_float32_is_not_called_converged_early() -> None:
    # A floor relative to the operator's norm once accepted 0.0003 for 0.5 here, after two products.
    matrix = spectrum([-98_289.0, *torch.linspace(-0.2, 0.2, 100).tolist(), 0.5]).float()
    found = Davidson(tolerance=1e-2).extremes(DenseOperator((matrix + matrix.T) / 2))
    assert found.top is not None
    assert found.status != "converged" or found.top.value == pytest.approx(0.5, rel=0.1)


def test_a_bottom_that_was_not_waited_for_is_not_called_converged() -> None:
    # A trained layer's spectrum: a top that stands alone, and a bottom that is small beside it and close to the bulk.
    # Once -8 with a residual of 218 passed for converged where the smallest eigenvalue was -438.
    matrix = spectrum([-438.0, *torch.linspace(-400, 400, 300).tolist(), 3_847.0])
    found = Davidson(tolerance=3e-2, bottom_tolerance=2e-1).extremes(DenseOperator(matrix))
    assert found.status == "converged"
    assert found.bottom is not None
    assert found.bottom.value > -400
    assert not found.bottom_converged
    found = Davidson(tolerance=3e-2, bottom_tolerance=1e-3).extremes(DenseOperator(matrix))
    assert found.bottom_converged


def test_the_bottom_of_a_positive_operator_is_a_bound() -> None:
    """Rounding, with a residual of its own size or above: known to be next to nothing, and not to a digit."""
    found = Davidson().extremes(DenseOperator(spectrum([*[0.0] * 30, 1.0, 5.0])))
    assert found.status == "converged"
    assert found.bottom is not None
    assert found.bottom.value == pytest.approx(0.0, abs=1e-9)
    assert found.bottom_converged == (found.bottom.residual <= 0.1 * abs(found.bottom.value))


def test_a_small_bottom_beside_a_large_top_is_not_converged_by_that() -> None:
    """Once -12.7 with a residual of 202 passed for converged, as nothing beside a top of 300,000."""
    matrix = spectrum([-500.0, *torch.linspace(-300, 300, 200).tolist(), 300_000.0])
    found = Davidson(tolerance=3e-2, bottom_tolerance=2e-1).extremes(DenseOperator(matrix))
    assert found.status == "converged"
    assert found.bottom is not None
    assert found.bottom.residual > 0.1 * abs(found.bottom.value)
    assert found.bottom.residual < 1e-3 * 300_000
    assert not found.bottom_converged


def test_negative_definite_operator_has_a_negative_top() -> None:
    found = Davidson(tolerance=1e-8).extremes(DenseOperator(spectrum([-5.0, -4.0, -3.0, -1.0])))
    assert found.top is not None
    assert found.top.value == pytest.approx(-1.0)


def test_zero_operator_is_zero_and_converged() -> None:
    found = Davidson().extremes(DenseOperator(torch.zeros(30, 30)))
    assert found.status == "converged"
    assert found.top is not None
    assert found.top.value == 0.0


def test_budget_spent_is_a_status_not_a_number() -> None:
    matrix = spectrum(torch.linspace(0, 1, 300).tolist())
    found = Davidson(tolerance=1e-10, max_products=5).extremes(DenseOperator(matrix))
    assert (found.status, found.products) == ("max-hvps", 5)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4])
def test_a_start_that_is_an_eigenvector_is_no_proof_of_either_end(noise: float) -> None:
    """Alone in the basis its pair is top and bottom at once, with a residual of nothing: 2 was once both ends here."""
    diagonal = torch.linspace(-1, 0.5, 400)
    diagonal[:3] = torch.tensor([-3.0, 2.0, 5.0])
    start = torch.nn.functional.one_hot(torch.tensor(1), 400) + noise * torch.randn(400)
    found = Davidson().extremes(DenseOperator(torch.diag(diagonal)), [start])
    assert found.top is not None
    assert found.bottom is not None
    assert found.top.value == pytest.approx(5.0, rel=1e-3)
    assert found.bottom.value == pytest.approx(-3.0, rel=1e-2)


@pytest.mark.parametrize(("least", "products"), [(9.0, 1), (5.0, 4)])
def test_a_value_that_is_out_of_reach_is_not_waited_for(least: float, products: int) -> None:
    matrix = spectrum([*torch.linspace(-1, 1, 60).tolist(), 6.0])
    top = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    start = top + 0.02 * torch.randn(61, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solver = Davidson(tolerance=1e-6, bottom_tolerance=float("inf"), max_products=4, least=least)
    found = solver.extremes(DenseOperator(matrix), [start])
    assert (found.status, found.products) == ("max-hvps", products)


def test_nan_in_a_product_is_a_status() -> None:
    matrix = torch.full((10, 10), float("nan"))
    found = Davidson().extremes(DenseOperator(matrix))
    assert (found.status, found.top, found.bottom) == ("non-finite", None, None)


def test_wrong_products_are_found_by_their_asymmetry() -> None:
    matrix = spectrum(torch.linspace(-1, 3, 40).tolist())
    matrix[0, 1:] *= 1.5
    assert Davidson(tolerance=1e-3).extremes(DenseOperator(matrix)).status == "asymmetric"


def test_restarts_keep_converging_in_a_basis_of_six() -> None:
    matrix = spectrum([*torch.linspace(-1, 1, 400).tolist(), 1.1])
    found = Davidson(tolerance=1e-5, basis=6, max_products=400).extremes(DenseOperator(matrix))
    assert found.status == "converged"
    assert found.top is not None
    assert found.top.value == pytest.approx(1.1, rel=1e-8)


def test_start_vectors_that_are_zero_or_repeat_are_replaced() -> None:
    matrix = spectrum(torch.linspace(-1, 2, 50).tolist())
    ones = torch.ones(50, dtype=torch.float64)
    found = Davidson(tolerance=1e-8).extremes(DenseOperator(matrix), [torch.zeros_like(ones), ones, ones])
    assert found.top is not None
    assert found.top.value == pytest.approx(2.0)


def test_warm_start_needs_fewer_products() -> None:
    matrix = spectrum([*torch.linspace(-3, 1, 500).tolist(), 1.3])
    solver = Davidson(tolerance=1e-3, bottom_tolerance=float("inf"))
    cold = solver.extremes(DenseOperator(matrix))
    assert cold.vector is not None
    moved = matrix + 1e-3 * spectrum(torch.linspace(-1, 1, 501).tolist(), seed=1)
    warm = solver.extremes(DenseOperator(moved), [cold.vector])
    assert warm.products < cold.products / 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10_000), st.floats(0.01, 100))
def test_any_symmetric_matrix(size: int, seed: int, negative: float) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = (matrix + matrix.T) / 2
    values, vectors = torch.linalg.eigh(matrix)
    values = torch.where(values < 0, values * negative, values)
    matrix = vectors @ torch.diag(values) @ vectors.T
    found = Davidson(tolerance=1e-7, max_products=400, seed=seed).extremes(DenseOperator(matrix))
    assert found.status == "converged"
    assert found.top is not None
    assert found.vector is not None
    assert found.top.value == pytest.approx(float(values.max()), rel=1e-6, abs=1e-9)
    image = matrix @ found.vector - found.top.value * found.vector
    assert float(image.norm()) == pytest.approx(found.top.residual, abs=1e-6 * float(values.abs().max()))
