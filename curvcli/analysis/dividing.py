"""How weights that processes divide are put together for a product: all of them where they fit, else a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar

from torch import nn

from curvcli.analysis.plan import GIB, OverLimitError
from curvcli.analysis.scale import FOLDS, least
from curvcli.curvature import resources
from curvcli.curvature.gathering import Weights
from curvcli.curvature.hvp import Mode
from curvcli.curvature.memory import in_parts, leanest
from curvcli.curvature.problem import Problem
from curvcli.curvature.ranks import current
from curvcli.errors import OutOfMemoryError, UsageError
from curvcli.models.blocks import used_together

T = TypeVar("T")


def divided(
    problem: Problem,
    weights: Weights,
    mode: Mode | Literal["auto"],
    limit: int | None,
    said: dict[str, str],
    measure: Callable[[Problem, Any], T],
) -> T:
    """As `memory.leanest`, of weights that processes divide: where exact products do not fit, by differences of gradients.

    Args:
        limit: as for `settle`.
        said: notes by their finding's code, which are added to.
    """
    how, notes = settle(weights, problem.model, mode, limit)
    said |= notes
    problem = replace(problem, gathered=weights.whole, streamed=weights.streamed)
    if weights.streamed is None:
        try:
            return leanest(problem, how, measure)
        except (OutOfMemoryError, OverLimitError) as error:
            if mode != "auto":
                raise
            why = error.message
        said |= stream(weights, problem.model, f"exactly, {why}")
        problem = replace(problem, streamed=weights.streamed)
    # All ranks go through the network for each fold, and each is to have a part of it.
    return leanest(in_parts(problem, problem.ranks.world * min(FOLDS, len(problem.given))), "differences", measure)


def settle(
    weights: Weights, model: nn.Module, mode: Mode | Literal["auto"], limit: int | None
) -> tuple[Mode, dict[str, str]]:
    """The mode where weights are there while a product is made, and not between; and notes by their finding's code.

    Exact products where the weights, a vector and its image can be had whole, else differences of gradients, for which
    blocks are gathered one at a time. All processes call it alike.

    Args:
        limit: bytes that each process may take; by default what is free.

    Raises:
        UsageError: there is none.
    """
    if mode == "kept":
        raise UsageError(
            "kept graphs hold the whole weights, which --shard divides", hint="drop --mode kept, or measure without --shard"
        )
    if weights.streamed is not None:
        return "differences", {}
    why = "as the mode differences has it"
    if mode == "auto":
        need, room = least(list(weights.shards.shapes.values()), weights.shards.ranks.world), _room(model, limit)
        if need <= room:
            return "fresh", {}
        why = f"exact ones need {need / GIB:.3g} GiB of each rank beside their graphs, of which {room / GIB:.3g} are free"
    elif mode != "differences":
        return mode, {}
    return "differences", stream(weights, model, why)


def stream(weights: Weights, model: nn.Module, why: str) -> dict[str, str]:
    """From now on blocks are gathered one at a time; the note that says so."""
    weights.stream(used_together(model))
    said = "the weights were gathered one block at a time, and products are differences of gradients"
    return {"blocks-gathered": f"{said}: {why}"}


def _room(model: nn.Module, limit: int | None) -> float:
    """Bytes that each process may still take: of the one that may take least."""
    device, ranks = next(model.parameters()).device, current()
    free = resources.free_bytes(device) / (ranks.here if device.type == "cpu" else 1)
    return min(ranks.each(free if limit is None else limit - resources.held_bytes(device)))
