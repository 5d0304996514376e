"""Spectral norms against all singular values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvcli.curvature.norms import DENSE, largest_spectral_norm, spectral_norm


@pytest.mark.parametrize("shape", [(5, 9), (300, 200), (160, 400)])
def test_a_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert (min(shape) > DENSE) == (shape[0] > 5)
    wanted = float(torch.linalg.svdvals(matrix.double())[0])
    assert spectral_norm(matrix) == pytest.approx(wanted, rel=5e-3 if min(shape) > DENSE else 1e-5)


def test_what_is_not_finite_or_not_settled_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spectral_norm(torch.tensor([[1.0, torch.nan]])) is None
    assert spectral_norm(torch.zeros(3, 3)) == 0
    monkeypatch.setattr("curvcli.curvature.norms.TOLERANCE", 1e-12)
    matrix = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    assert spectral_norm(matrix) is None


def test_the_largest_of_a_module() -> None:
    """Experts are matrices of their own; a convolution's kernels are one."""
    module = nn.Module()
    module.small = nn.Linear(2, 2)
    module.experts = nn.Parameter(torch.stack([torch.eye(2), torch.diag(torch.tensor([3.0, 1.0]))]))
    module.gain = nn.Parameter(torch.full((4,), 100.0))
    assert largest_spectral_norm(module) == pytest.approx(3)
    module.kernels = nn.Conv1d(2, 2, 3)
    with torch.no_grad():
        module.kernels.weight.fill_(1.0)
    assert largest_spectral_norm(module) == pytest.approx(12**0.5)
    assert largest_spectral_norm(nn.LayerNorm(3)) is None
    with torch.no_grad():
        module.experts[0, 0, 0] = torch.inf
    assert largest_spectral_norm(module) is None
