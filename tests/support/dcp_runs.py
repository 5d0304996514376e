"""Runs saved by torch.distributed.checkpoint, in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from fsdp_runs import save, train
from tiny import build
from torch import nn

from curvcli.optimizers.base import OptimizerView

LAYOUTS = ("nested", "flattened", "torchtitan", "by position", "inside an application")


def saved_layouts(root: Path) -> SimpleNamespace:
    """A run saved in every layout, and as the Trainer would have saved it."""
    model = build()
    optimizer = train(model)
    (root / "checkpoint-3").mkdir()
    model.save_pretrained(root / "checkpoint-3")
    torch.save(optimizer.state_dict(), root / "checkpoint-3" / "optimizer.pt")
    paths = {layout: save(model, optimizer, layout, root / layout / "step-3") for layout in LAYOUTS}
    np.save(root / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    return SimpleNamespace(root=root, model=model, optimizer=optimizer, paths=paths, trainer=root / "checkpoint-3")


def same_view(found: OptimizerView, expected: OptimizerView) -> None:
    def grouped(view: OptimizerView) -> dict[str, dict]:
        return {name: dict(group.options) for group in view.groups for name in group.names}

    assert grouped(found) == grouped(expected)
    assert set(found.state) == set(expected.state)
    for name, entry in expected.state.items():
        assert set(found.state[name]) == set(entry)
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(found.state[name][key]), torch.as_tensor(value)), (name, key)


def same_weights(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
