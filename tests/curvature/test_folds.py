"""The jackknife over folds: against its definition, and against repeated draws."""

from __future__ import annotations

import pytest
import torch

from curvcli.curvature.folds import Folds


def test_of_one_dimension_it_is_the_mean_and_its_standard_error() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    found = Folds([0.25] * 4, values[:, None, None]).spread()
    assert found.held_out == pytest.approx(4.0)
    assert found.corrected == pytest.approx(4.0)
    assert found.error == pytest.approx(float(values.std() / 2))


def test_unequal_folds_count_by_their_weights() -> None:
    """Two folds of one are one of two: the mean stays, and nothing is biased."""
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    found = Folds([0.25, 0.25, 0.5], values[:, None, None]).spread()
    assert found.corrected == pytest.approx(0.25 + 0.5 + 3.0)
    assert found.held_out == pytest.approx(3.75)


def test_a_direction_of_one_fold_alone_is_held_out_to_nothing() -> None:
    folds = torch.zeros(4, 3, 3, dtype=torch.float64)
    folds[:, 0, 0] = 1.0
    folds[2, 1, 1] = 40.0
    found = Folds([0.25] * 4, folds).spread()
    assert found.held_out < 1.0
    assert found.error == pytest.approx(9.25)  # 10 of the whole falls to 1 without the fold, rises to 40/3 without another
    low, high = found.bracket(10.0, 0.0)
    assert low == 0.0
    assert high > 20


def test_what_no_fold_moves_is_known_as_well_as_the_solve() -> None:
    found = Folds([0.25] * 4, torch.full((4, 1, 1), 10.0, dtype=torch.float64)).spread()
    assert found.bracket(10.0, 0.05) == (pytest.approx(9.9), pytest.approx(10.15))


def test_it_covers_the_truth_as_often_as_it_claims() -> None:
    """The top eigenvalue of a covariance, of 8 folds of 64 draws each: the bracket holds the true one nine times in ten."""
    generator, hits, tries = torch.Generator().manual_seed(0), 0, 400
    scales = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    for _ in range(tries):
        rows = torch.randn(8, 64, 5, generator=generator, dtype=torch.float64) * scales
        folds = rows.transpose(1, 2) @ rows / 64
        found = Folds([1 / 8] * 8, folds)
        low, high = found.spread().bracket(found.prefix(8)[1], 0.0)
        hits += low <= 4.0 <= high
    assert 0.87 <= hits / tries <= 0.97


def test_prefixes() -> None:
    folds = torch.diag_embed(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 8.0], [0.0, 0.0]], dtype=torch.float64))
    found = Folds([0.25] * 4, folds)
    assert [found.prefix(count) for count in (1, 2, 4)] == [(0.25, 1.0), (0.5, 2.0), (1.0, 2.0)]
