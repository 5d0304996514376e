"""The problem of a small network whose weights are gathered a block at a time."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import models
from torch import nn

from curvcli.curvature.gathering import Weights
from curvcli.curvature.problem import Problem
from curvcli.models.blocks import used_together


def problem_of(model: nn.Module) -> Problem:
    batches = [*models.data(), *models.data(seed=1, rows=21)[:1]]  # of 16, 32 and 7 rows
    return Problem.create(model, models.loss, batches, models.weights(batches))


def divided(model: nn.Module, ranks: Any) -> tuple[Problem, Weights]:
    """The problem of a network of which each rank holds slices."""
    problem = problem_of(deepcopy(model))
    problem = problem.shared(ranks)
    weights = Weights(problem.model, ranks)
    weights.stream(used_together(problem.model))
    return replace(problem, gathered=weights.whole, streamed=weights.streamed), weights
