"""The digest that tells one shard in memory from another."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvcli.analysis.document import _batches
from curvcli.curvature.problem import Problem


def digest(*batches: Any) -> str:
    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = model(batch["x"]).square().mean()
        return found

    return _batches(Problem.create(nn.Linear(2, 1), loss, batches), 0.0, None).sha256


@pytest.mark.parametrize("kind", [dict, UserDict])  # as a tokenizer's BatchEncoding is
def test_other_data_have_another_digest(kind: type) -> None:
    ones, twos = kind(x=torch.ones(1, 2)), kind(x=torch.full((1, 2), 2.0))
    assert digest(ones, twos) == digest({"x": ones["x"]}, {"x": twos["x"]})
    assert len({digest(ones, twos), digest(twos, ones), digest(ones, ones)}) == 3
