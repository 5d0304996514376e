"""What rows and batches count in a mean loss: by their labels, or as one each.

Nothing is assumed of a loss: that of a few rows together has to be the mean of their own losses by what they count. The rows
are those that tell the ways of counting best apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from math import inf
from typing import Any

import torch
from torch import Tensor

from curvcli.curvature.content import tensors
from curvcli.curvature.precision import mapped
from curvcli.curvature.problem import Problem
from curvcli.curvature.ranks import ALONE, Ranks
from curvcli.errors import UsageError, exhausted, memory_named

WEIGHTS = "pass weights=[what the mean loss of each batch divides by, as its number of predictions]"
IGNORED = -100  # cross-entropy's ignore_index
# Of the loss: rounding of a mean in float32. Batch statistics and contrastive losses differ by far more.
SAME = 1e-5
ROUNDING, NEAR = 1e-6, 10  # up to which, or to so many times the best, another way is not told from it
ALIKE = 0.01  # of a row against another, up to which it does not matter which of two ways of counting it is
Count = Callable[[Any], Tensor]  # of a batch: what each of its rows counts, of shape (rows,), float64, on the CPU


def weighed(problem: Problem, ranks: Ranks = ALONE) -> Problem:
    """With batches of one size weighing what they count in the mean loss, where numbers of -100 say that they count unlike.

    Args:
        ranks: that all come to it.

    Raises:
        UsageError: what they count cannot be told, or one counts nothing.
        OutOfMemoryError: for a few rows at once.
    """
    if len({_ignored(batch) for batch in problem.batches}) < 2:
        return problem
    count, why = None, "their loss is no mean over labels or rows, or does not tell which"
    if not all(map(rows_of, problem.batches)):
        why = "their tensors have no first dimension in common, so that rows of them cannot be tried"
    try:
        # Where weights are divided they are gathered meanwhile, and none may stay away.
        with memory_named("as rows of batches were tried, which tell what they weigh", hint=WEIGHTS), ranks.together():
            count = counting(problem, [problem.batches])
    except Exception as error:  # whatever a loss raises on some of its rows
        if exhausted(error):
            raise
        why = f"their loss does not run on some of their rows: {str(error)[:120]}"
    if count is None:
        raise UsageError(
            f"batches differ in how many labels are -100, which counts as none, no weights were given, and {why}",
            hint=WEIGHTS,
        )
    counts = ranks.first([float(count(batch).sum()) for batch in problem.batches])
    if 0.0 in counts:
        raise UsageError(f"batch {counts.index(0.0)} has no labels: its mean loss is 0 / 0", hint="leave it out")
    return replace(problem, weights=[found / sum(counts) for found in counts])


def counting(problem: Problem, groups: Sequence[Sequence[Any]]) -> Count | None:
    """How rows count in the mean loss of a batch: by their labels or as one each.

    None where they depend on each other, or weigh by what they are, as by their classes; and where the losses of the rows
    are so near to each other, as before the first step of a head of zeros, that any way would do.

    Args:
        groups: batches whose rows are joined to tell; their tensors but for the first dimension are of equal shapes.
    """
    groups = [group for group in groups if sum(rows_of(batch) or 0 for batch in group) > 1 and all(map(rows_of, group))]
    if not groups:
        return None
    ways = _ways([batch for group in groups for batch in group])
    counts = [[torch.cat([way(batch) for batch in group]) for way in ways] for group in groups]
    errors = [0.0] * len(ways)
    for index, rows in _telling(groups, counts).items():
        alone = [_row(groups[index], row) for row in rows]
        whole, *single = _losses(problem, [_joined(alone), *alone])
        for i, found in enumerate(counts[index]):
            shares = found[rows].tolist()
            mean = sum(share * loss for share, loss in zip(shares, single, strict=True) if share) / (sum(shares) or 1)
            error = abs(mean - whole) / (abs(whole) or 1)
            errors[i] = max(errors[i], error) if error <= SAME else inf  # where it is NaN, too
    if min(errors) > SAME:
        return None
    first, *others = [i for i, error in enumerate(errors) if error <= max(NEAR * min(errors), ROUNDING)]
    return None if any(_apart(found[first], found[i])[0] > ALIKE for found in counts for i in others) else ways[first]


def rows_of(batch: Any) -> int | None:
    """The first dimension that all tensors of a batch share; None where they do not."""
    sizes = {t.shape[0] for t in tensors(batch) if t.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def part_of(batch: Any, start: int, end: int) -> Any:
    """Some rows of a batch."""
    return mapped(batch, lambda t: t[start:end] if t.dim() else t)


def _ways(batches: Sequence[Any]) -> list[Count]:
    """By labels but for the first, which nothing predicts where a model shifts them itself; by all labels; as one each."""
    places = {i: t for batch in batches for i, t in enumerate(tensors(batch)) if _holds(t) and bool(_none(t).any())}
    found = [(i, first) for i, t in sorted(places.items()) for first in ((1, 0) if t.dim() > 1 else (0,))]
    return [*(partial(_labels, i, first) for i, first in found), _each]


def _each(batch: Any) -> Tensor:
    return torch.ones(rows_of(batch) or 1, dtype=torch.float64)


def _labels(place: int, first: int, batch: Any) -> Tensor:
    labels = list(tensors(batch))[place]
    return (~_none(labels[..., first:])).reshape(len(labels), -1).sum(dim=1).double().cpu()


def _none(labels: Tensor) -> Tensor:
    """True where there is no label, in the shape of a tensor that may hold labels."""
    return labels == IGNORED


def _holds(tensor: Tensor) -> bool:
    """Whether it may hold labels. Of bytes 156 would be -100 to torch, and of images it is a pixel."""
    return tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.int8) and tensor.dim() > 0 and tensor.numel() > 0


def _ignored(batch: Any) -> tuple[tuple[int, int], ...]:
    """Of each tensor of a batch how many labels there are not, and how many of the first in a row."""
    absent = [_none(t) for t in tensors(batch) if _holds(t)]
    return tuple((int(found.sum()), int(found[..., 0].sum()) if found.dim() > 1 else 0) for found in absent)


def _telling(groups: Sequence[Sequence[Any]], counts: Sequence[Sequence[Tensor]]) -> dict[int, list[int]]:
    """Rows by the index of their group: that tell any two ways of counting apart, if any do, and that are unlike."""
    unlike = [_unlike(group, found) for group, found in zip(groups, counts, strict=True)]
    most = max(range(len(groups)), key=lambda index: unlike[index][0])
    chosen = {most: unlike[most][1]}
    for one, other in combinations(range(len(counts[0])), 2):
        apart = [_apart(found[one], found[other]) for found in counts]
        place = max(range(len(groups)), key=lambda index: apart[index][0])
        if apart[place][0]:
            chosen.setdefault(place, set()).update(apart[place][1])
    return {index: sorted(rows) for index, rows in chosen.items()}


def _apart(one: Tensor, other: Tensor) -> tuple[float, set[int]]:
    """How far two ways of counting lie apart, and the two rows at which they do most.

    They come to the same where one counts a multiple of the other: it is the angle between them. A row that counts in
    neither tells nothing.
    """
    rows = ((one > 0) | (other > 0)).nonzero().flatten()
    if not len(rows):
        return 0.0, set()
    angle = torch.atan2(one[rows], other[rows])
    least, most = int(angle.argmin()), int(angle.argmax())
    return float(angle[most] - angle[least]), {int(rows[least]), int(rows[most])}


def _unlike(group: Sequence[Any], counts: Sequence[Tensor]) -> tuple[int, set[int]]:
    """Of rows that count, one and for each tensor of integers another that differs from it there; and of how many it does.

    A loss that weighs classes is the mean of any two rows of one class. As few rows as will do: they have to fit at once.
    """
    rows = torch.stack(list(counts)).amin(dim=0).nonzero().flatten().tolist()
    if not rows:
        return 0, {0}
    found, differ = {rows[0], rows[-1]}, 0
    for parts in zip(*map(tensors, group), strict=True):
        if not parts[0].is_floating_point() and parts[0].dim():
            values = torch.cat(parts)[rows].reshape(len(rows), -1)
            others = [rows[i] for i in (values != values[0]).any(dim=1).nonzero().flatten().tolist()]
            differ += len(others) > 0
            found |= set(others[:1]) if found.isdisjoint(others) else set()
    return differ, found


def _row(group: Sequence[Any], row: int) -> Any:
    for batch in group:
        if row < (size := rows_of(batch) or 1):
            return part_of(batch, row, row + 1)
        row -= size
    raise IndexError(row)


def _joined(rows: Sequence[Any]) -> Any:
    """One batch of several."""
    parts = zip(*(tensors(row) for row in rows), strict=True)
    return mapped(rows[0], lambda t: torch.cat(found) if (found := next(parts))[0].dim() else t)


def _losses(problem: Problem, batches: Sequence[Any]) -> list[float]:
    some = replace(problem, batches=batches, weights=[1.0] * len(batches), owners=(), origins=())
    with torch.no_grad(), problem.gathered():
        return [float(some.batch_loss(i)) for i in range(len(batches))]
