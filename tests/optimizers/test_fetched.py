"""Counters that an optimizer keeps on a GPU are fetched once, and nothing else of its state is moved."""

from __future__ import annotations

from typing import Any

import torch
from metal import Metal

from curvcli.optimizers.base import fetched


def test_counters_come_and_moments_stay() -> None:
    moment, scale = Metal(torch.ones(3)), torch.tensor(2.0)
    state: dict[str, dict[str, Any]] = {
        "a": {"step": Metal(torch.tensor(7.0)), "exp_avg": moment},
        "b": {"step": Metal(torch.tensor(9, dtype=torch.int64)), "scale": scale},
    }
    found = fetched(state)
    assert [type(found[n]["step"]) for n in "ab"] == [torch.Tensor, torch.Tensor]
    assert [float(found[n]["step"]) for n in "ab"] == [7.0, 9.0]
    assert found["a"]["exp_avg"] is moment
    assert found["b"]["scale"] is scale
    assert isinstance(state["a"]["step"], Metal)  # the optimizer's own stays


def test_state_on_the_cpu_is_what_it_was() -> None:
    entry = {"step": torch.tensor(3.0)}
    assert fetched({"a": entry})["a"] is entry
