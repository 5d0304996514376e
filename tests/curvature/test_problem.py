"""The frozen function: what is asked of batches and their weights."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvcli.curvature.problem import Problem
from curvcli.errors import UsageError


def loss(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(batch["x"]).square().mean()
    return found


@pytest.mark.parametrize("kind", [dict, UserDict])  # as a tokenizer's BatchEncoding is
def test_batches_of_other_sizes_need_weights(kind: type) -> None:
    model = nn.Linear(3, 1)
    batches = [kind(x=torch.ones(rows, 3)) for rows in (2, 5)]
    with pytest.raises(UsageError, match="differ in size"):
        Problem.create(model, loss, batches)
    problem = Problem.create(model, loss, batches, [2, 5])
    assert problem.weights == [2 / 7, 5 / 7]
    assert problem.rows == 7
