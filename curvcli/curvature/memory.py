"""What to do where memory runs out: leaner plans for the same number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from curvcli.curvature import resources
from curvcli.curvature.content import tensors
from curvcli.curvature.hvp import graph_bytes
from curvcli.curvature.problem import Problem
from curvcli.curvature.ranks import Ranks
from curvcli.curvature.weighing import Count, counting, part_of, rows_of
from curvcli.errors import LEANER, OutOfMemoryError, counted, exhausted, shortage

TRIED = 4  # rows that ways to multiply are tried and tested on: what is wrong with one is wrong on few rows, too
T = TypeVar("T")
UNEVEN = 1.2  # the most work of a process over an even share, from which on batches are halved


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
    first = next(tensors(problem.batches[0]), None)
    each = first.numel() / (rows_of(problem.batches[0]) or 1) if first is not None else entries
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
    return max(rows_of(batch) or 1 for batch in problem.batches)


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
            count = counting(problem, [[batch] for batch in problem.batches])
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
        f"a batch of {counted(rows_of(problem.batches[0]) or 1, 'row')} needs about {_gib(size)} for each vector, of which "
        f"16 are held, and {_gib(graph)} or more for its graph; {_gib(free)} are free"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def _halved(problem: Problem, count: Count) -> Problem | None:
    """The same mean loss over batches of half the rows; None where no batch has more than one."""
    batches: list[Any] = []
    weights: list[float] = []
    origins: list[int] = []
    halved = False
    for index, (batch, weight) in enumerate(zip(problem.batches, problem.weights, strict=True)):
        rows = rows_of(batch) or 1
        whole = float(count(batch).sum()) if rows > 1 else 0.0
        halved |= whole > 0
        # A batch in which nothing counts stays as it is: its loss is NaN, and the gradient says so.
        parts = [part_of(batch, 0, rows // 2), part_of(batch, rows // 2, rows)] if whole else [batch]
        shares = [float(count(part).sum()) / whole for part in parts] if whole else [1.0]
        # A half without labels would have a mean loss of 0 / 0.
        batches += [part for part, share in zip(parts, shares, strict=True) if share]
        weights += [weight * share for share in shares if share]
        origins += [problem.origins[index] for share in shares if share] if problem.origins else []
    if not halved:
        return None
    found = replace(problem, batches=batches, weights=weights, origins=origins)
    return found.shared(problem.ranks) if problem.owners else found
