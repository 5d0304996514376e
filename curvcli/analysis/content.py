"""What is measured, in a few words that are the same where it is the same, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from curvcli.curvature.problem import Problem
from curvcli.optimizers.base import OptimizerView


def content(problem: Problem, optimizer: object) -> str:
    """Names, shapes and sums of bytes of weights, batches and optimizer state.

    Sums of whole numbers: they come out the same on every device, in whatever order they are added.
    """
    weights = {name: _said(p) for name, p in problem.parameters.items()}
    batches = [[_said(t) for t in _tensors(batch)] for batch in problem.batches]
    state: Any = None
    if isinstance(optimizer, OptimizerView):
        state = {name: [_said(t) for t in _tensors(entry)] for name, entry in sorted(optimizer.state.items())}
    return json.dumps([weights, batches, list(problem.weights), state])


def _said(tensor: Tensor) -> list[Any]:
    flat = tensor.detach().reshape(-1).contiguous()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size(), torch.uint8)
    number = int(flat.view(kind).sum(dtype=torch.int64)) if flat.numel() else 0
    return [list(tensor.shape), str(tensor.dtype), number]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
