"""The network, where both the training and curv find it: a checkpoint of Lightning does not say which it is of."""

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3))
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 2)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def build() -> nn.Module:
    """What --model mynets:build names."""
    return Residual()


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What --loss mynets:loss names."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
