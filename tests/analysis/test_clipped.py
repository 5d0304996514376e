"""Gradients that were clipped hard: a second moment that is not of the loss's own puts rho in doubt, and reports say so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvcli
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.optimizers.update import over_moments


def trained(clip: float, optimizer: str = "AdamW") -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[Tensor, Tensor]]]:
    """A small regression, always on the same data, so that every gradient is nearly the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(64, 6), 3 * torch.randn(64, 3)
    made: torch.optim.Optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-4)
    for _ in range(60):
        made.zero_grad()
        loss(model, (x, y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        made.step()
    return model, made, [(x[:32], y[:32]), (x[32:], y[32:])]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_the_report_says_that_gradients_were_clipped_hard() -> None:
    model, optimizer, batches = trained(0.05)
    report = curvcli.analyze(model, loss, batches, optimizer, depths=False)
    said = {finding.code: finding for finding in report.findings}["gradient-over-moments"]
    assert said.severity == "warning"
    # Every gradient was of norm 0.05 to the optimizer: by closed form the factor is the norm over that.
    model.zero_grad()
    torch.stack([loss(model, batch) for batch in batches]).mean().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    factor = float(said.message.split()[4])  # "the gradient here is N times as long"
    assert factor == pytest.approx(norm / 0.05, rel=0.08)


@pytest.mark.parametrize(("clip", "optimizer"), [(1e9, "AdamW"), (0.05, "SGD")])
def test_it_says_nothing_of_whole_gradients_or_without_a_second_moment(clip: float, optimizer: str) -> None:
    model, made, batches = trained(clip, optimizer)
    report = curvcli.analyze(model, loss, batches, made, depths=False)
    assert "gradient-over-moments" not in {finding.code for finding in report.findings}


def test_entries_without_a_gradient_until_now_do_not_count() -> None:
    """Rows of tokens that the run has not seen would make any gradient long."""
    parameter = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    optimizer.step()
    view = live(optimizer, {"p": parameter})
    found = over_moments(prepare(view, {"p": parameter}), ["p"], [torch.tensor([6.0, 8.0, 1e6, 1e6])])
    assert found == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("rates", [(1e-4, 1e-3), (1e-3, 1e-4)])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_neither_young_moments_nor_rates_by_group_count(rates: tuple[float, float], steps: int) -> None:
    """Gradients that are as long as all before them: the factor is 1, whatever P has of beta1 and of other groups' rates."""
    large, small = (torch.zeros(size, requires_grad=True) for size in (6, 2))
    groups = [{"params": [large], "lr": rates[0]}, {"params": [small], "lr": rates[1]}]
    optimizer = torch.optim.AdamW(groups)
    given = torch.tensor([1.0, -2.0, 3.0, 1.0, 1.0, 2.0]), torch.tensor([4.0, -1.0])
    for _ in range(steps):
        large.grad, small.grad = (g.clone() for g in given)
        optimizer.step()
    parameters = {"large": large, "small": small}
    assert over_moments(prepare(live(optimizer, parameters), parameters), ["large", "small"], given) == pytest.approx(
        1, rel=1e-4
    )


def test_a_second_moment_that_is_not_all_of_p_says_nothing() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.RMSprop([parameter], centered=True)
    for _ in range(50):
        parameter.grad = torch.tensor([1.0, -2.0])
        optimizer.step()
    parameters = {"p": parameter}
    assert over_moments(prepare(live(optimizer, parameters), parameters), ["p"], [torch.tensor([1.0, -2.0])]) is None
