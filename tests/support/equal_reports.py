"""Reports of one measurement, made by different numbers of processes."""

from __future__ import annotations

from typing import Any

import normalised
import published
import pytest
import torch

OPTIMIZERS = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
    "SGD with decay": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
    "estimated": lambda model: None,
    "SOAP": lambda model: published.SOAP(model.parameters(), lr=1e-2),
    "Lion": lambda model: normalised.Lion(model.parameters(), lr=1e-3),
    "Muon": lambda model: normalised.MuonWithAuxAdam(*normalised.split(model)),
}

BY_BATCH = {"gradient_ratio", "batch_ratio"}


def same(one: Any, other: Any, where: str = "") -> None:
    """All numbers to 1e-6 but for residuals, which are near rounding; `cost` and the digest of the batches do not count.

    How long the gradients of batches are goes by how processes cut them.
    """
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"cost", "sha256", *BY_BATCH}:
            same(one[key], other[key], f"{where}.{key}")
        for key in BY_BATCH & one.keys():
            left, right = one[key], other[key]
            assert left == right if None in (left, right) else left == pytest.approx(right, rel=0.6), f"{where}.{key}"
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            same(left, right, f"{where}[{i}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-3 if "residual" in where else 1e-9), where
    elif isinstance(one, str):
        assert where.endswith("message") or one == other, where
    else:
        assert one == other, where
