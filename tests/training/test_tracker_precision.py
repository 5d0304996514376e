"""The tracker in jobs of half precision and autocast, and where memory runs out: right, or a status; the job goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from curvcli.documents.log import load_records
from curvcli.training import CurvatureTracker


def job(dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer, list[Any]]:
    """A network trained in a type throughout, with its optimizer's state."""
    net, batches = models.Net(seed=3, width=16, blocks=2).to(dtype), models.data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    models.train(net, optimizer, batches, steps=5)
    return net, optimizer, batches


def tracker(net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any], **given: Any) -> CurvatureTracker:
    options: dict[str, Any] = {"loss": models.loss, "weights": models.weights(batches), "tolerance": 1e-4, "max_hvps": 60}
    return CurvatureTracker(net, optimizer, probe=batches, **{**options, **given})


def raised(net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same numbers in float32, weights and moments, made without curv."""
    copy = models.Net(width=16, blocks=2).float()
    copy.load_state_dict({name: value.float() for name, value in net.state_dict().items()})
    other = torch.optim.AdamW(copy.parameters(), lr=1e-2)
    for mine, its in zip(copy.parameters(), net.parameters(), strict=True):
        other.state[mine] = {key: value.float() for key, value in optimizer.state[its].items()}
    return copy, other


def test_a_job_in_bfloat16_is_measured_as_its_float32_copy(caplog: pytest.LogCaptureFixture) -> None:
    net, optimizer, batches = job(torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="curvcli"):
        watching = tracker(net, optimizer, batches)
        for step in range(3):
            models.train(net, optimizer, batches, steps=1)
            record = watching.step(step)
            truth = tracker(*raised(net, optimizer), batches).step(step)
            assert record is not None
            assert truth is not None
            assert record.status == "converged", record.message
            assert record.rho == pytest.approx(truth.rho, rel=1e-5)
            assert record.update_ratio == pytest.approx(truth.update_ratio, rel=1e-3)
    assert sum("bfloat16 are measured in float32" in line for line in caplog.messages) == 1


def test_a_job_in_bfloat16_does_not_notice() -> None:
    results = []
    for tracked in (False, True):
        net, optimizer, batches = job(torch.bfloat16)
        watching = tracker(net, optimizer, batches) if tracked else None
        objects = list(net.parameters())
        for step in range(4):
            models.train(net, optimizer, batches, steps=1)
            if watching:
                watching.step(step)
        assert all(a is b for a, b in zip(objects, net.parameters(), strict=True))
        results.append([(p.detach(), p.grad, optimizer.state[p]) for p in net.parameters()])
    for (a, gradient, state), (b, other, its) in zip(*results, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)
        assert torch.equal(gradient, other)  # type: ignore[arg-type]
        assert all(torch.equal(state[key], its[key]) for key in state)


def test_a_probe_in_bfloat16_goes_with_its_job() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).bfloat16()
    probe = [torch.randn(8, 4).bfloat16() for _ in range(2)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    record = CurvatureTracker(net, optimizer, lambda m, b: m(b).square().mean(), probe=probe).step(0)
    assert record is not None
    assert record.status == "converged", record.message


def autocasting(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return models.loss(model, batch)


def test_a_job_under_autocast_is_measured_without() -> None:
    net, optimizer, batches = job(torch.float32)
    truth = tracker(net, optimizer, batches).step(0)
    record = tracker(net, optimizer, batches, loss=autocasting).step(0)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        other = tracker(net, optimizer, batches).step(0)
    assert truth is not None
    assert record is not None
    assert other is not None
    assert truth.status == record.status == other.status == "converged"
    assert record.rho == other.rho == truth.rho


class Hungry(torch.autograd.Function):
    """A product whose backward asks for more memory than there is, as torch's own allocator says it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        torch.empty(2**60)
        return g


class Once:
    """A loss that asks for too much at the calls given, counted from 0."""

    def __init__(self, *calls: int) -> None:
        self.calls, self.fails = 0, set(calls)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls - 1 in self.fails:
            torch.empty(2**60)
        return models.loss(model, batch)


def test_out_of_memory_is_a_status_and_the_job_goes_on(tmp_path: Path) -> None:
    net, optimizer, batches = job(torch.float32)
    watching = tracker(
        net, optimizer, batches, loss=lambda m, b: Hungry.apply(models.loss(m, b)), log=tmp_path / "log.jsonl"
    )
    for step in range(2):
        models.train(net, optimizer, batches, steps=1)
        record = watching.step(step)
        assert record is not None
        assert record.status == "failed"
        assert record.rho is None
    said = [record.message or "" for record in load_records(tmp_path / "log.jsonl").records]
    assert len(said) == 2
    assert all(message.startswith("out of memory: ") and "allocate" in message for message in said)


def test_kept_graphs_that_do_not_fit_make_room_for_fresh_ones() -> None:
    net, optimizer, batches = job(torch.float32)
    truth = tracker(net, optimizer, batches).step(0)
    probing = Once()
    watching = tracker(net, optimizer, batches, loss=probing)
    first = watching.step(0)
    assert watching._mode == "kept"
    probing.fails = {probing.calls}  # the first of the two graphs that the next measurement would keep
    second = watching.step(1)
    assert watching._mode == "fresh"
    assert truth is not None
    assert first is not None
    assert second is not None
    assert first.rho == truth.rho
    assert second.status == "converged", second.message
    assert second.rho == pytest.approx(truth.rho, rel=1e-4)
