"""A network wide enough for the kernels that mkldnn takes in bfloat16, in float32 whatever the default is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 128


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(32, WIDTH, generator=generator, dtype=torch.float32),
            torch.randn(32, 4, generator=generator, dtype=torch.float32),
        )
        for _ in range(2)
    ]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)).float()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])
