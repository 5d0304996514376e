"""What a file must hold of the run that was saved to it."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import STEPS, build
from torch import nn

from curvcli.checkpoints import open_checkpoint
from curvcli.models.base import Architecture
from curvcli.optimizers.base import OptimizerView

NET = Architecture("Llama", build, vocabulary=64)


def is_the_run(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, net: Architecture = NET) -> OptimizerView:
    """Weights, moments and groups of a file are those of the model and optimizer that were saved."""
    checkpoint = open_checkpoint(path, net)
    found = checkpoint.model()
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert checkpoint.optimizer is not None
    view = checkpoint.optimizer.view(found)
    groups = {name: group.options for group in view.groups for name in group.names}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            assert (groups[name]["lr"], groups[name]["weight_decay"]) == (group["lr"], group["weight_decay"])
            for key, value in optimizer.state[parameter].items():
                assert torch.equal(torch.as_tensor(view.state[name][key]), torch.as_tensor(value)), (name, key)
    assert set(view.state) == {n for n, p in model.named_parameters() if p in optimizer.state}
    return view


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for step in range(STEPS):
        ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer
