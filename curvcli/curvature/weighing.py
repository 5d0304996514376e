"""What rows and batches count in a mean loss: by their labels, or as one each.

Nothing is assumed of a loss: that of a few rows together has to be the mean of their own losses by what they count. The rows
are those that tell the ways of counting best apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from curvcli.curvature.precision import mapped
from curvcli.curvature.problem import Problem
from curvcli.curvature.ranks import ALONE, Ranks
from curvcli.errors import UsageError

IGNORED = -100  # cross-entropy's ignore_index
# Of the loss: rounding of a mean in float32. Batch statistics and contrastive losses differ by far more.
SAME = 1e-5
Count = Callable[[Any], Tensor]  # of a batch: what each of its rows counts, of shape (rows,), float64, on the CPU


def weighed(problem: Problem, ranks: Ranks = ALONE) -> Problem:
    """With batches of one size weighing what they count in the mean loss, where numbers of -100 say that they count unlike.

    Args:
        ranks: that all come to it.

    Raises:
        UsageError: what they count cannot be told, or one counts nothing.
    """
    if len({_ignored(batch) for batch in problem.batches}) < 2:
        return problem
    count, why = None, "their loss is no mean over labels or rows"
    try:
        with ranks.together():  # where weights are divided they are gathered meanwhile, and none may stay away
            count = counting(problem, [problem.batches])
    except Exception as error:  # whatever a loss raises on some of its rows
        why = f"their loss does not run on some of their rows: {str(error)[:120]}"
    if count is None:
        raise UsageError(
            f"batches differ in how many labels are -100, which counts as none, no weights were given, and {why}",
            hint="pass weights=[number of predictions in each batch]",
        )
    counts = ranks.first([float(count(batch).sum()) for batch in problem.batches])
    if 0.0 in counts:
        raise UsageError(f"batch {counts.index(0.0)} has no labels: its mean loss is 0 / 0", hint="leave it out")
    return replace(problem, weights=[found / sum(counts) for found in counts])


def counting(problem: Problem, groups: Sequence[Sequence[Any]]) -> Count | None:
    """How rows count in the mean loss of a batch: by their labels or as one each; None where they depend on each other.

    Args:
        groups: batches whose rows are joined to tell; their tensors but for the first dimension are of equal shapes.
    """
    groups = [group for group in groups if sum(rows_of(batch) or 0 for batch in group) > 1 and all(map(rows_of, group))]
    if not groups:
        return None
    ways = _ways([batch for group in groups for batch in group])
    counts = [[torch.cat([way(batch) for batch in group]) for way in ways] for group in groups]
    fits = [True] * len(ways)
    for index, rows in _telling(counts).items():
        alone = [_row(groups[index], row) for row in rows]
        whole, *single = _losses(problem, [_joined(alone), *alone])
        for i, found in enumerate(counts[index]):
            shares = found[rows].tolist()
            mean = sum(share * loss for share, loss in zip(shares, single, strict=True) if share) / (sum(shares) or 1)
            fits[i] &= abs(mean - whole) <= SAME * abs(whole)
    return next((way for way, fit in zip(ways, fits, strict=True) if fit), None)


def rows_of(batch: Any) -> int | None:
    """The first dimension that all tensors of a batch share; None where they do not."""
    sizes = {t.shape[0] for t in tensors(batch) if t.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def part_of(batch: Any, start: int, end: int) -> Any:
    """Some rows of a batch."""
    return mapped(batch, lambda t: t[start:end] if t.dim() else t)


def tensors(batch: Any) -> Iterator[Tensor]:
    """Those of a batch: in lists, tuples and mappings, in their order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors(part)


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
    """Of each tensor of a batch how many labels there are not, and how many of the first."""
    absent = [_none(t) for t in tensors(batch) if _holds(t)]
    return tuple((int(found.sum()), int(found[..., 0].sum())) for found in absent)


def _telling(counts: Sequence[Sequence[Tensor]]) -> dict[int, list[int]]:
    """Rows by the index of their group that tell any two ways of counting apart, if any do; else two rows."""
    chosen: dict[int, set[int]] = {}
    for one, other in combinations(range(len(counts[0])), 2):
        best = 0.0
        for index, found in enumerate(counts):
            # Two ways come to the same where one counts a multiple of the other: this is the angle between them.
            angle = torch.atan2(found[one], found[other])
            least, most = int(angle.argmin()), int(angle.argmax())
            if (apart := float(angle[most] - angle[least])) > best:
                best, place, rows = apart, index, {least, most}
        if best:
            chosen.setdefault(place, set()).update(rows)
    return {index: sorted(rows) for index, rows in chosen.items()} or {0: [0, len(counts[0][0]) - 1]}


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
