"""Which sequences and predictions carry the curvature along a direction: lambda, told apart by what it is a mean of.

The loss is a mean over predictions, so its Hessian is one, too, and v'Gv is the mean of what each prediction's own Hessian
gives. Exact where predictions can be told apart; where they cannot, a product on each sequence alone gives its part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from curvcli.curvature.along import second_derivatives
from curvcli.curvature.hvp import FreshGraph
from curvcli.curvature.memory import cut, largest_batch
from curvcli.curvature.precision import numbers, wide
from curvcli.curvature.problem import Problem
from curvcli.data.examples import IGNORED
from curvcli.data.tasks import LOGITS, LOSSES, aligned, labelled_loss, token_losses
from curvcli.errors import exhausted
from curvcli.models.base import Task
from curvcli.models.head import widest

APART = 1e-3  # of lambda, by which the sum of all parts may differ from it in float32
TOP = 0.01  # of the shard is left out


@dataclass(frozen=True)
class Predictions:
    """Every prediction of a shard: all of shape (predictions,), on the CPU; numbers in float64."""

    row: Tensor
    position: Tensor
    label: Tensor
    loss: Tensor
    curvature: Tensor


@dataclass(frozen=True)
class Carriers:
    """What each sequence has of v'Gv.

    Attributes:
        per: what could be told apart.
        weights: of sequences in the mean loss, of shape (rows,), summing to 1.
        quotients: v'G_i v for the mean loss of each sequence, of shape (rows,), float64.
        predictions: None where they cannot be told apart.
        columns: the shard with labels at the positions of their logits; None with `predictions`.
        alone: the same mean loss with a sequence a batch; None where `columns` are there.
        why: predictions, or sequences, could not be told apart.
    """

    per: Literal["prediction", "sequence", "nothing"]
    weights: Tensor
    quotients: Tensor
    predictions: Predictions | None = None
    columns: Mapping[str, Tensor] | None = None
    alone: Problem | None = None
    why: str = ""

    @property
    def total(self) -> float:
        """The mean: v'Gv, but for what a coupled weight decay has of it."""
        return float((self.weights * self.quotients).sum())

    @property
    def shares(self) -> Tensor:
        """Of the total, by sequence: of shape (rows,)."""
        return self.weights * self.quotients / self.total


def carriers(
    problem: Problem, loss: Any, task: Task, direction: Mapping[str, Tensor], expected: float, *, negated: bool = False
) -> Carriers:
    """Lambda along a direction of the weights, told apart.

    Args:
        problem: the shard.
        loss: the task's own, or one of the user's, of which nothing is known but its value.
        direction: u = P^(-1/2) v by name, in the parameters' shapes.
        expected: u'Hu, which predictions are held against: where they add up to something else, sequences are measured.
        negated: the problem is minus the loss.
    """
    why = "the loss is one of your own"
    if loss in LOSSES.values():
        try:
            found = _by_prediction(problem, task, direction, negated=negated)
        except Exception as error:  # whatever a model raises that cannot be differentiated three times
            why = "memory ran out" if exhausted(error) else f"{type(error).__name__}: {str(error)[:120]}"
        else:
            # Where parts cancel, the error of their sum is relative to what cancelled.
            size = max(abs(expected), float((found.weights * found.quotients.abs()).sum()))
            if abs(found.total - expected) <= APART * size:
                return found
            why = f"together they have {found.total:.4g} where lambda is {expected:.4g}"
    return _by_sequence(problem, direction, why)


def _by_prediction(problem: Problem, task: Task, direction: Mapping[str, Tensor], *, negated: bool) -> Carriers:
    model, parameters = problem.model, problem.parameters
    batches = [aligned(model, batch, task) for batch in problem.batches]
    # Joined into one shard, so that rows are numbered across batches.
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    labels = columns["labels"]
    each = max(1, labels[0].numel() * widest(model))  # logits of a sequence
    # Three backward passes hold logits several times over: fewer rows than a product takes.
    rows = max(1, min(largest_batch(problem), LOGITS // each))
    losses, curvatures = [], []
    for start in range(0, len(labels), rows):
        part = {name: column[start : start + rows] for name, column in columns.items()}
        # It predicts nothing, and a mean over no predictions is NaN.
        if not bool((part["labels"] != IGNORED).any()):
            continue
        found = second_derivatives(model, partial(token_losses, batch=part), parameters, direction)
        losses.append(found[0].cpu().double())
        curvatures.append(found[1].cpu().double())
    curvature = torch.cat(curvatures) * (-1 if negated else 1)
    places = (labels != IGNORED).nonzero().cpu()
    predictions = Predictions(
        row=places[:, 0],
        position=places[:, 1] if labels.dim() == 2 else torch.zeros_like(places[:, 0]),
        label=labels[labels != IGNORED].cpu(),
        loss=torch.cat(losses),
        curvature=curvature,
    )
    count = torch.bincount(predictions.row, minlength=len(labels)).double()
    sums = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, predictions.row, curvature)
    told: Literal["prediction", "sequence"] = "prediction" if labels.dim() == 2 else "sequence"
    return Carriers(told, count / count.sum(), sums / count.clamp(min=1), predictions, columns)


def _by_sequence(problem: Problem, direction: Mapping[str, Tensor], why: str) -> Carriers:
    """By a product on each sequence: as much work as one product on the shard, in the smallest of batches."""
    alone = cut(problem, 1)
    names, tangents = list(direction), list(direction.values())
    quotients = []
    for index in range(len(alone.batches)):
        images = FreshGraph(alone.subset([index])).product(names, tangents)
        quotients.append(sum(numbers([(wide(u) * wide(i)).sum() for u, i in zip(tangents, images, strict=True)])))
    single = largest_batch(alone) == 1
    return Carriers(
        "sequence" if single else "nothing",
        torch.tensor(alone.weights, dtype=torch.float64),
        torch.tensor(quotients, dtype=torch.float64),
        alone=alone,
        why=why if single else f"{why}; the loss of a batch is no mean over its rows",
    )


@dataclass(frozen=True)
class Rest:
    """A shard without what carries most of lambda."""

    what: Literal["sequences", "predictions"]
    removed: int
    total: int
    share: float
    problem: Problem


def rests(problem: Problem, found: Carriers, *, negated: bool = False) -> list[Rest]:
    """The shard without the 1 % of its sequences, and without the 1 % of its predictions, that carry most; one at least.

    Args:
        problem: that `found` is of; the rest is in batches of its size.
        negated: as of `carriers`.
    """
    rows = len(found.weights)
    if found.per == "nothing" or rows < 2:
        return []
    top = found.shares.topk(ceil(TOP * rows)).indices
    kept = torch.ones(rows, dtype=torch.bool)
    kept[top] = False
    share = float(found.shares[top].sum())
    if found.alone is not None:
        return [Rest("sequences", len(top), rows, share, found.alone.subset(kept.nonzero().flatten().tolist()))]
    every = [Rest("sequences", len(top), rows, share, _without(problem, found, kept, None, negated=negated))]
    tokens = found.predictions
    if found.per == "prediction" and tokens is not None:
        heavy = tokens.curvature.topk(ceil(TOP * len(tokens.row))).indices
        share = float(tokens.curvature[heavy].sum() / tokens.curvature.sum())
        rest = _without(problem, found, torch.ones_like(kept), heavy, negated=negated)
        every.append(Rest("predictions", len(heavy), len(tokens.row), share, rest))
    return every


def _without(problem: Problem, found: Carriers, kept: Tensor, heavy: Tensor | None, *, negated: bool) -> Problem:
    """Of some sequences alone, or with some predictions not counted."""
    columns, tokens = dict(found.columns or {}), found.predictions
    if heavy is not None and tokens is not None:
        labels = columns["labels"].clone()
        labels[tokens.row[heavy], tokens.position[heavy]] = IGNORED
        columns["labels"] = labels
    kept = kept & (columns["labels"] != IGNORED).reshape(len(kept), -1).any(dim=1).cpu()
    columns = {name: column[kept.to(column.device)] for name, column in columns.items()}
    # Four batches at least, or the bracket has no folds.
    size = max(1, min(largest_batch(problem), int(kept.sum()) // 4))
    parts = {name: column.split(size) for name, column in columns.items()}
    batches = [{name: pieces[i] for name, pieces in parts.items()} for i in range(len(parts["labels"]))]
    counts = [float((batch["labels"] != IGNORED).sum()) for batch in batches]
    # Labels are aligned with their logits by now, so that ignoring one shifts no other.
    rest = Problem.create(problem.model, labelled_loss, batches, counts)
    return rest.negated() if negated else rest
