"""Residual gates: exact at their ends, right between them, a function of the step alone, and seen by measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from schedules import gated
from torch import Tensor, nn
from warmup_job import DEPTH, Job, batch, build, same, weights

from curvcli.errors import UnsupportedError, UsageError
from curvcli.training import ArchitectureWarmup, CurvatureTracker
from curvcli.training.gates import Gate

GATES = gated(2, 4, 6, 8)


def causal(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def test_between_its_ends() -> None:
    block = nn.Linear(4, 4, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    plain = block(x)
    gate = Gate(0, block)
    gate.set(0.25)
    mixed = block(x)
    torch.testing.assert_close(mixed, x + 0.25 * (plain - x), rtol=1e-12, atol=0)
    (found,) = torch.autograd.grad(mixed.sum(), x)
    (wanted,) = torch.autograd.grad((x + 0.25 * (plain - x)).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert torch.autograd.gradgradcheck(lambda v: block(v).tanh(), (x,))


def test_alpha_is_a_function_of_the_step() -> None:
    plan = gated(2, 4, 0, 8)
    assert plan.alphas_at(0) == [0, 0, 1, 0]
    assert plan.alphas_at(3) == [1, 0.75, 1, 0.375]
    assert plan.alphas_at(99) == [1, 1, 1, 1]
    job = Job(plan)
    depths = []
    for step in range(10):
        job.run([step])
        assert {g.index: g.value for g in job.warmup.gates} == {i: a for i, a in enumerate(plan.alphas_at(step)) if a < 1}
        depths.append(job.warmup.active_depth)
    assert depths == [1, 1, 2, 2, 3, 3, 3, 3, 4, 4]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in job.model.model.layers)


@pytest.mark.parametrize("cut", [1, 5, 8, 9])
def test_a_resumed_job_is_bit_equal(tmp_path: Path, cut: int) -> None:
    whole = Job(GATES).run(range(11))
    Job(GATES).run(range(cut)).save(tmp_path / "c.pt")
    resumed = Job(GATES).load(tmp_path / "c.pt").run(range(cut, 11))
    assert same(whole.model, resumed.model)
    assert not same(whole.model, Job(gated(0, 0, 0, 0)).run(range(11)).model)


def test_no_block_trains_while_its_gate_is_shut_and_each_does_afterwards() -> None:
    job = Job(GATES)
    before = weights(job.model)
    job.warmup.step(0)
    ids = batch(0)
    job.model(input_ids=ids, labels=ids).loss.backward()
    shut = [p for n, p in job.model.named_parameters() if ".layers." in n]
    assert not any(bool(p.grad.any()) for p in shut)
    job.optimizer.zero_grad()
    job.run(range(3))
    now = weights(job.model)
    assert not any(torch.equal(before[n], now[n]) for n in now if "proj" in n)


def test_gradient_accumulation_and_checkpointing() -> None:
    """The alpha of a step is the same in each of its passes, and in a pass that is made again."""
    one, two = Job(GATES).run(range(3), micro_batches=2), Job(GATES, model=build())
    two.model.gradient_checkpointing_enable({"use_reentrant": False})
    two.run(range(3), micro_batches=2)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_that_is_told_twice_leaves_a_graph_as_it_is() -> None:
    job, ids = Job(GATES).run(range(3)), batch(3)
    job.warmup.step(3)
    loss = causal(job.model, ids)
    job.warmup.step(3)
    loss.backward()


def test_the_tracker_measures_through_the_gates() -> None:
    """Blocks that are shut have no curvature: that of the model without them."""
    job = Job(gated(*[1000] * DEPTH))
    job.run(range(2))

    def tracker() -> CurvatureTracker:
        return CurvatureTracker(job.model, job.optimizer, causal, probe=[batch(9)], tolerance=1e-4, max_hvps=80)

    for gate in job.warmup.gates:
        gate.set(0.0)
    shut = tracker().step(1)
    job.warmup.detach()
    without = tracker().step(2)
    job.model.model.layers = nn.ModuleList()
    twin = tracker().step(3)
    assert shut.eigenvalue == pytest.approx(twin.eigenvalue, rel=1e-3)
    assert without.eigenvalue != pytest.approx(twin.eigenvalue, rel=1e-3)


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.linear(x))


class _Wider(_InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.linear(x)], -1)


class _Mapping(_InPlace):
    def forward(self, x: Tensor) -> Any:
        return {"states": self.linear(x)}


@pytest.mark.parametrize(
    ("block", "said"), [(_InPlace(), "writes into the states"), (_Wider(), "does not give"), (_Mapping(), "does not give")]
)
def test_blocks_that_cannot_be_gated(block: nn.Module, said: str) -> None:
    Gate(3, block).set(0.5)
    with torch.no_grad(), pytest.raises(UnsupportedError, match=f"block 3, a _.*cannot be gated: it {said}"):
        block(torch.ones(2, 4))


def test_gates_and_adaptive_mode_exclude_each_other() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UsageError, match="gates open by the step alone: there is no unlock to decide"):
        ArchitectureWarmup(model, optimizer, GATES, rho_source=Job().warmup)  # type: ignore[arg-type]


def test_a_half_open_model_that_is_let_go_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    job = Job(GATES).run(range(5))
    job.warmup.detach()
    assert "gates of blocks [2, 3] were not open" in caplog.text
    assert not any(block._forward_hooks for block in job.model.model.layers)
