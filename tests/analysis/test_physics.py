"""Full-batch training organises itself to the edge: rho ends near 1 whatever the optimizer (arXiv 2207.14484).

Expected values were measured on this problem with an independent script, 6,000 steps.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from normalised import Lion
from torch import nn

from curvcli import analyze

CASES = {
    "adam 1e-3": (lambda p: torch.optim.Adam(p, lr=1e-3), 1.00, 1.01),
    "adam 3e-3": (lambda p: torch.optim.Adam(p, lr=3e-3), 1.00, 1.01),
    "adam b1=0.5": (lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.5, 0.999)), 1.015, 1.02),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=1e-4, alpha=0.99), 1.07, 1.12),
    "sgd": (lambda p: torch.optim.SGD(p, lr=1.0), 1.00, 1.00),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_plateau(case: str) -> None:
    make, low, high = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    inputs, targets = torch.randn(256, 32), torch.eye(10)[torch.randint(10, (256,))]
    optimizer = make(model.parameters())
    loss = lambda m, b: nn.functional.mse_loss(m(b[0]), b[1])  # noqa: E731
    rhos = []
    for step in range(6000):
        optimizer.zero_grad()
        loss(model, (inputs, targets)).backward()
        optimizer.step()
        if step >= 5000 and step % 250 == 0:
            rhos.append(analyze(model, loss, [(inputs, targets)], optimizer).full.rho)
    median = sorted(rhos)[len(rhos) // 2]
    assert low * 0.95 <= median <= high * 1.05, rhos


ADADELTA: dict[str, dict[str, Any]] = {"defaults": {}, "eps": {"eps": 1e-4}, "rho": {"rho": 0.99}, "lr": {"lr": 3.0}}


@pytest.mark.slow
@pytest.mark.parametrize("case", ADADELTA)
def test_adadelta_settles_at_the_edge_while_its_preconditioner_moves(case: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    inputs, targets = torch.randn(128, 16).double(), torch.randn(128, 10).double()
    optimizer = torch.optim.Adadelta(model.parameters(), **ADADELTA[case])
    loss = lambda m, b: nn.functional.mse_loss(m(b[0]), b[1])  # noqa: E731
    rhos = []
    for step in range(4000):
        optimizer.zero_grad()
        loss(model, (inputs, targets)).backward()
        optimizer.step()
        if step >= 1000 and step % 500 == 0:
            rhos.append(analyze(model, loss, [(inputs, targets)], optimizer, depths=False).full.rho or 0.0)
    assert min(rhos) >= 0.98, rhos
    assert max(rhos) <= 1.22, rhos


NORMALISED: dict[str, Any] = {
    "lion": (lambda m, r: [Lion([*m, *r], lr=3e-4)], 0.95, 1.1),
    "muon": (lambda m, r: [torch.optim.Muon(m, lr=1e-2, weight_decay=0.0), torch.optim.AdamW(r, lr=1e-3)], 0.9, 1.4),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NORMALISED)
def test_plateau_of_z(case: str) -> None:
    """The same network under optimizers without a rho: Z ends near 1 (arXiv 2603.05002)."""
    make, low, high = NORMALISED[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    inputs, targets = torch.randn(256, 32), torch.eye(10)[torch.randint(10, (256,))]
    optimizers = make(*([p for p in model.parameters() if (p.dim() == 2) is matrix] for matrix in (True, False)))
    loss = lambda m, b: nn.functional.mse_loss(m(b[0]), b[1])  # noqa: E731
    values = []
    for step in range(1500):
        model.zero_grad()
        loss(model, (inputs, targets)).backward()
        for optimizer in optimizers:
            optimizer.step()
        if step >= 1200 and step % 50 == 0:
            found = analyze(model, loss, [(inputs, targets)], optimizers, depths=False).steepest
            assert found is not None
            values.append(found.z or 0.0)
    assert low <= sorted(values)[len(values) // 2] <= high, values
