"""A device without float64, as Apple's: the CPU's own numbers, by a CPU that says it is one (support/metal.py)."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from metal import Metal, metal, to_metal
from torch import nn

from curvcli import analyze
from curvcli.training import CurvatureTracker


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a build without the device lacks, and how often it was asked for."""
    calls: list[str] = []
    state = torch.zeros(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: calls.append("get") or state)
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: calls.append("set") if new is state else None)
    return calls


def trained() -> tuple[nn.Module, torch.optim.Optimizer, list[Any]]:
    net, batches = models.Net(seed=3).float(), models.data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    models.train(net, optimizer, batches, steps=5)
    return net, optimizer, batches


def moved(net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> tuple[nn.Module, Any, list[Any]]:
    """Model, optimizer and batches on the device."""
    before = list(net.parameters())
    model = to_metal(net)
    other = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for new, old in zip(model.parameters(), before, strict=True):
        state = optimizer.state[old]
        other.state[new] = {k: v if k == "step" else Metal(v) for k, v in state.items()}
    return model, other, [tuple(Metal(t) for t in batch) for batch in batches]


def test_the_device_is_as_strict_as_apples() -> None:
    with metal():
        here = torch.ones(3, device="mps")
        assert here.device.type == "mps"
        assert here.cpu().double().sum() == 3
        with pytest.raises(TypeError, match="float64"):
            here.double()
        with pytest.raises(RuntimeError, match="same device"):
            here + torch.ones(3)


SLOW = [pytest.param("kept", True, marks=pytest.mark.slow), pytest.param("fresh", False, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "preconditioned"), [("fresh", True), ("kept", False), *SLOW])
def test_an_analysis_is_the_cpus(mode: Any, preconditioned: bool, waited: list[str]) -> None:
    net, optimizer, batches = trained()
    options: dict[str, Any] = {"weights": models.weights(batches), "mode": mode, "depths": False}
    truth = analyze(net, models.loss, batches, optimizer if preconditioned else None, **options)
    with metal():
        model, other, parts = moved(net, optimizer, batches)
        found = analyze(model, models.loss, parts, other if preconditioned else None, **options)
    assert found.cost.device == "mps:0"
    assert truth.full.status == found.full.status == "converged"
    assert found.full.eigenvalue == pytest.approx(truth.full.eigenvalue, rel=1e-6)
    assert [e.eigenvalue for e in found.layers] == pytest.approx([e.eigenvalue for e in truth.layers], rel=1e-6)
    assert [a.tensor for a in found.attribution] == [a.tensor for a in truth.attribution]
    assert found.data.sha256 == truth.data.sha256
    assert waited.count("synchronize") == 2  # before and after the product that is timed


@pytest.mark.slow
def test_the_tracker_is_the_cpus(waited: list[str]) -> None:
    net, optimizer, batches = trained()
    options: dict[str, Any] = {"weights": models.weights(batches), "max_hvps": 60}
    truth = CurvatureTracker(net, optimizer, models.loss, probe=batches, **options).step(0)
    with metal():
        model, other, parts = moved(net, optimizer, batches)
        tracker = CurvatureTracker(model, other, models.loss, probe=parts, **options)
        found, again = tracker.step(0), tracker.step(1)
    assert truth is not None
    assert found is not None
    assert again is not None
    assert found.status == again.status == "converged", found.message
    assert found.rho == pytest.approx(truth.rho, rel=1e-6)
    assert [word for word in waited if word != "synchronize"] == ["get", "set"] * 2  # the device's random numbers, too
    assert "synchronize" in waited  # before the clock is read that the budget goes by
