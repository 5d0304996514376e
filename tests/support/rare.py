"""A net whose top direction lies on the row of a token that its shard hardly has."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import Tensor

from curvcli.analysis.api import analyze
from curvcli.documents import Report

RARE = 6  # the token


def shard(seen: int) -> list[tuple[Tensor, Tensor]]:
    """Four batches of 40 tokens, in which the rare one is seen so many times."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(RARE, (160,), generator=generator)
    ids[:seen] = RARE
    targets = (ids * 3 + torch.randint(2, (160,), generator=generator)) % 7
    return list(zip(ids.split(40), targets.split(40), strict=True))


def trained(seen: int) -> tuple[models.Net, torch.optim.Optimizer]:
    """A net whose optimizer has hardly met the rare token, so that its row's second moment is tiny."""
    model = models.Net(blocks=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.999))
    models.train(model, optimizer, shard(0), steps=20)
    optimizer.state[model.embed.weight]["exp_avg_sq"][RARE] = 1e-12
    return model, optimizer


def measured(seen: int, **options: Any) -> tuple[Report, models.Net, torch.optim.Optimizer]:
    model, optimizer = trained(seen)
    return analyze(model, models.loss, shard(seen), optimizer, tolerance=1e-6, max_hvps=300, **options), model, optimizer
