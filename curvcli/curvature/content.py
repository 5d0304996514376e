"""What tensors hold, in a few words that are the same where it is the same, to the bit, on every device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def content(value: Any) -> list[list[Any]]:
    """Shape, precision and the sum of the bytes as whole numbers of each tensor in lists, tuples and mappings.

    A sum of whole numbers comes out the same in whatever order it is added, and where entries of a tensor change places.
    """
    return [_said(tensor) for tensor in tensors(value)]


def _said(tensor: Tensor) -> list[Any]:
    flat = tensor.detach().reshape(-1).contiguous()
    # As integers: their sum wraps around the same way everywhere, and NaN compares by its bits.
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size(), torch.uint8)
    number = int(flat.view(kind).sum(dtype=torch.int64)) if flat.numel() else 0
    return [list(tensor.shape), str(tensor.dtype), number]


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in lists, tuples and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(part)
