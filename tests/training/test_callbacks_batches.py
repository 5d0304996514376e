"""What a trainer's callback makes of its probe and of a torch without torch.distributed, before any training."""

from __future__ import annotations

from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from curvcli.training.callbacks import Callbacks


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def begun(probe: list[Any]) -> Callbacks:
    model = nn.Linear(2, 1).to("meta")  # a device that tensors have to be moved to
    callbacks = Callbacks(probe=probe, loss=lambda model, batch: model(batch[0]).sum())
    callbacks.begin(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    return callbacks


def test_a_probe_goes_to_the_models_device_in_containers_of_its_own_kind() -> None:
    tracker = begun([Pair(torch.ones(1, 2), torch.ones(1)), UserDict(x=torch.ones(1, 2)), [torch.ones(1, 2), "a"]]).tracker
    assert tracker is not None
    assert tracker.probe is not None
    pair, mapping, members = tracker.probe
    assert (type(pair), pair.x.device.type, pair.y.device.type) == (Pair, "meta", "meta")
    assert (type(mapping), mapping["x"].device.type) == (UserDict, "meta")
    assert (members[0].device.type, members[1]) == ("meta", "a")


def test_a_torch_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    for name in ("is_initialized", "get_rank", "get_world_size"):
        monkeypatch.delattr(torch.distributed, name)
    assert begun([[torch.ones(1, 2)]]).tracker is not None


def test_weights_of_the_probe_are_the_trackers() -> None:
    model = nn.Linear(2, 1)
    probe = [[torch.ones(rows, 2)] for rows in (1, 3)]
    callbacks = Callbacks(
        probe=probe, loss=lambda model, batch: model(batch[0]).square().mean(), weights=[1.0, 3.0], every=1
    )
    callbacks.begin(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    callbacks.after(0, None)
    assert callbacks.tracker is not None
    assert callbacks.tracker.last is not None
    assert callbacks.tracker.last.status == "converged", callbacks.tracker.last.message
