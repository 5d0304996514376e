"""What to do where memory runs out: leaner plans for the same number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvcli.curvature import resources
from curvcli.curvature.hvp import graph_bytes
from curvcli.curvature.precision import mapped
from curvcli.curvature.problem import Problem
from curvcli.curvature.ranks import Ranks
from curvcli.errors import LEANER, OutOfMemoryError, counted, exhausted, shortage

TRIED = 4  # rows that ways to multiply are tried and tested on: what is wrong with one is wrong on few rows, too
T = TypeVar("T")
UNEVEN = 1.2  # the most work of a process over an even share, from which on batches are halved
Count = Callable[[Any], float]


def leanest(problem: Problem, mode: str, measure: Callable[[Problem, Any], T]) -> T:
    """What the first plan gives that does not run out of memory.

    As asked for; with fresh graphs, where the mode is "auto"; then with batches halved again and again, down to one row,
    where their rows are independent.

    Args:
        measure: called with a problem of the same mean loss, and a mode.

    Raises:
        OutOfMemoryError: none does.
    """
    said, part = "", problem
    for part, how in _plans(problem, mode):
        try:
            with problem.ranks.together():  # where one process has no memory, all go on with the leaner plan
                return measure(part, how)
        except Exception as error:  # an allocator's has many classes
            if not exhausted(error):
                raise
            # Not the error itself: its traceback holds every tensor of the plan that failed.
            said = str(error) if isinstance(error, OutOfMemoryError) else f"out of memory: {shortage(error)}"
        # Outside of the handler, where the error would still hold the frames of the failed plan.
        resources.release(next(iter(part.parameters.values())).device)
    raise OutOfMemoryError(f"{said}; {_needs(part)}", hint=LEANER)


def cut(problem: Problem, rows: int) -> Problem:
    """The same mean loss in batches of at most so many rows; as it is where rows depend on each other."""
    smaller = _smaller(problem)
    while largest_batch(problem) > rows and (part := next(smaller, None)) is not None:
        problem = part
    return problem


def sample(problem: Problem, rows: int = TRIED) -> tuple[Problem, float]:
    """The first batch, cut to so many rows where they are independent, and how many of it are what a process has."""
    first = problem.subset([0])
    part = cut(first, rows).subset([0])
    # The whole of a process' batches, counted in graphs of the part's size.
    return part, problem.most * largest_batch(first) / largest_batch(part)


def few(problem: Problem, entries: int) -> int:
    """How many rows of the first batch have so many entries in its first tensor; `TRIED` at least."""
    first = next(_tensors(problem.batches[0]), None)
    each = first.numel() / (_rows(problem.batches[0]) or 1) if first is not None else entries
    return max(TRIED, int(entries / max(each, 1)))


def spread(problem: Problem, ranks: Ranks) -> Problem:
    """The same mean loss with its batches given to several processes, in halves where that evens out their work.

    Batches remain those of the shard's folds: `origins` says which each is of. Where rows depend on each other they stay
    whole, and processes may have none.
    """
    if ranks.world == 1:
        return problem
    found = replace(problem, origins=list(range(len(problem.batches)))).shared(ranks)
    smaller = _smaller(found)
    while _uneven(found) > UNEVEN and (part := next(smaller, None)) is not None:
        found = part
    return found


def in_parts(problem: Problem, parts: int) -> Problem:
    """The same mean loss in so many batches at least, where their rows are independent and there are enough of them."""
    smaller = _smaller(problem)
    while len(problem.batches) < parts and (part := next(smaller, None)) is not None:
        problem = part
    return problem


def _uneven(problem: Problem) -> float:
    """The largest share of the weight that a process has, over an even one."""
    load = [0.0] * problem.ranks.world
    for owner, weight in zip(problem.owners, problem.weights, strict=True):
        load[owner] += weight
    return max(load) * problem.ranks.world


def largest_batch(problem: Problem) -> int:
    """Rows of the largest batch; 1 where they cannot be told."""
    return max(_rows(batch) or 1 for batch in problem.batches)


def _plans(problem: Problem, mode: str) -> Iterator[tuple[Problem, str]]:
    # A mode that was asked for stays; "auto" falls back to the one that keeps no graphs.
    yield problem, mode
    how = "fresh" if mode == "auto" else mode
    if how != mode:
        yield problem, how
    for smaller in _smaller(problem):
        yield smaller, how


def _smaller(problem: Problem) -> Iterator[Problem]:
    """The same mean loss over batches halved once, twice, ... down to one row."""
    try:
        with problem.ranks.together():  # where weights are divided they are gathered meanwhile, and none may stay away
            count = _counting(problem)
    except Exception:  # whatever a loss raises on a part of a batch: it cannot be cut
        count = None
    if not all(problem.ranks.each(float(count is not None))):
        return
    while count and (smaller := _halved(problem, count)) is not None:
        problem = smaller
        yield problem


def _needs(problem: Problem) -> str:
    """What a product needs at least, by what is known when it has failed."""
    parameters = list(problem.parameters.values())
    size = sum(p.numel() * p.element_size() for p in parameters)
    free = resources.free_bytes(parameters[0].device)
    try:
        with problem.ranks.together(), problem.gathered():
            # Where all go through the network together, none may end before the others.
            graph = graph_bytes(problem, cut_short=problem.streamed is None)
    except Exception as error:
        if not exhausted(error):
            raise
        graph = 0
    return (
        f"a batch of {counted(_rows(problem.batches[0]) or 1, 'row')} needs about {_gib(size)} for each vector, of which "
        f"16 are held, and {_gib(graph)} or more for its graph; {_gib(free)} are free"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def _halved(problem: Problem, count: Count) -> Problem | None:
    """The same mean loss over batches of half the rows; None where no batch has more than one."""
    batches: list[Any] = []
    weights: list[float] = []
    origins: list[int] = []
    for index, (batch, weight) in enumerate(zip(problem.batches, problem.weights, strict=True)):
        rows = _rows(batch) or 1
        whole = count(batch) if rows > 1 else 0.0
        # A batch in which nothing counts stays as it is: its loss is NaN, and the gradient says so.
        parts = [_cut(batch, 0, rows // 2), _cut(batch, rows // 2, rows)] if whole else [batch]
        shares = [count(part) / whole for part in parts] if whole else [1.0]
        # A half without labels would have a mean loss of 0 / 0.
        batches += [part for part, share in zip(parts, shares, strict=True) if share]
        weights += [weight * share for share in shares if share]
        origins += [problem.origins[index] for share in shares if share] if problem.origins else []
    if len(batches) == len(problem.batches):
        return None
    found = replace(problem, batches=batches, weights=weights, origins=origins)
    return found.shared(problem.ranks) if problem.owners else found


def _counting(problem: Problem) -> Count | None:
    """How rows count in a batch's mean loss: by their labels or as one each; None where a row's loss depends on the others.

    Not assumed: the loss of a few rows must be the mean of their own losses.
    """
    batch = next((b for b in problem.batches if (_rows(b) or 1) > 1), None)
    if batch is None:
        return None
    ways = (_shifted_labels, _labels, _each) if isinstance(batch, Mapping) and "labels" in batch else (_each,)
    alone = [_cut(batch, i, i + 1) for i in range(_rows(batch) or 1)]
    # The rows that differ most in what they count: two of the same tell no way from another.
    counts = [[way(row) for row in alone] for way in ways]
    chosen = sorted({found for count in counts for found in (count.index(min(count)), count.index(max(count)))})
    chosen = chosen if len(chosen) > 1 else [0, len(alone) - 1]
    together = mapped(batch, lambda t: t[chosen] if t.dim() else t)
    some = replace(problem, batches=[together, *(alone[i] for i in chosen)], weights=[1.0] * (len(chosen) + 1))
    with torch.no_grad(), problem.gathered():
        whole, *single = (float(some.batch_loss(i)) for i in range(len(chosen) + 1))
    for way, count in zip(ways, counts, strict=True):
        shares = [count[i] for i in chosen]
        mean = sum(share * loss for share, loss in zip(shares, single, strict=True) if share) / (sum(shares) or 1)
        # Rounding of a float32 mean; batch statistics and contrastive losses differ by far more.
        if abs(mean - whole) <= 1e-5 * abs(whole):
            return way
    return None


def _each(batch: Any) -> float:
    return float(_rows(batch) or 1)


def _labels(batch: Any) -> float:
    return float((batch["labels"] != -100).sum())  # cross-entropy's ignore_index


def _shifted_labels(batch: Any) -> float:
    # Where the model shifts labels itself, nothing predicts the first one.
    return float((batch["labels"][..., 1:] != -100).sum())


def _rows(batch: Any) -> int | None:
    """The first dimension that all tensors of a batch share; None where they do not."""
    sizes = {t.shape[0] for t in _tensors(batch) if t.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def _cut(batch: Any, start: int, end: int) -> Any:
    return mapped(batch, lambda t: t[start:end] if t.dim() else t)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
