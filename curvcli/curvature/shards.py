"""Tensors divided over processes, each of which holds an even slice of every one; vectors of such slices are a space.

As ZeRO divides what an optimizer holds (Rajbhandari et al., SC 2020, arXiv 1910.02054), but tensor by tensor, so that what
is restricted to some tensors, or is diagonal, takes no word between the processes. What is sent goes in pieces of a few
million entries, so that little is held twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvcli.curvature.precision import inner, length
from curvcli.curvature.ranks import Ranks
from curvcli.curvature.space import drawn

BUCKET = 2**22  # entries, of all processes together, that are sent at once


@dataclass(frozen=True)
class Shards:
    """Which entries of each tensor every process holds: of all in their order, the next even share.

    Args:
        ranks: the processes.
        shapes: of the whole tensors, by name.
    """

    ranks: Ranks
    shapes: Mapping[str, torch.Size]

    def share(self, name: str) -> int:
        """Entries of a tensor that a process holds at most; the last ones may hold fewer, or none."""
        return -(-self.shapes[name].numel() // self.ranks.world)

    def bounds(self, name: str, rank: int | None = None) -> tuple[int, int]:
        """The first entry of a tensor that is held here, or by another process, and the one behind the last."""
        size, share = self.shapes[name].numel(), self.share(name)
        rank = self.ranks.rank if rank is None else rank
        return min(rank * share, size), min((rank + 1) * share, size)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What is held here of a whole tensor: a copy, of shape (k,)."""
        begin, end = self.bounds(name)
        return whole.detach().reshape(-1)[begin:end].clone()

    def parts(self, names: Sequence[str], wholes: Sequence[Tensor]) -> list[Tensor]:
        """What is held here of several."""
        return [self.part(name, whole) for name, whole in zip(names, wholes, strict=True)]

    def gather(self, names: Sequence[str], parts: Sequence[Tensor], at: int = 0) -> list[Tensor]:
        """Whole tensors, in their shapes, from the slices of all processes, of one type. All call it alike.

        Args:
            at: what they are of, which has to be the same for all.
        """
        wholes = [part.new_empty(self.shapes[n].numel()) for n, part in zip(names, parts, strict=True)]
        for pieces in self._pieces(names):
            mine = torch.cat([_cut(parts[i], begin, end) for i, begin, end in pieces])
            for rank, row in enumerate(self.ranks.gathered(mine, at)):
                for (i, begin, _), piece in zip(pieces, row.split([e - b for _, b, e in pieces]), strict=True):
                    room = wholes[i][rank * self.share(names[i]) + begin :][: len(piece)]
                    room.copy_(piece[: len(room)])
        return [whole.view(self.shapes[n]) for n, whole in zip(names, wholes, strict=True)]

    def scatter(self, names: Sequence[str], wholes: list[Tensor], at: int = 0) -> list[Tensor]:
        """The sum over all processes of whole tensors, of which each keeps its slices. All call it alike.

        Args:
            wholes: is emptied on the way, so that what has been sent makes room.
            at: as for `gather`.
        """
        found = [whole.new_empty(self.share(n)) for n, whole in zip(names, wholes, strict=True)]
        waiting: list[Tensor | None] = list(wholes)
        wholes.clear()
        for pieces in self._pieces(names):
            rows = []
            for rank in range(self.ranks.world):
                flat = [(waiting[i], rank * self.share(names[i]), b, e) for i, b, e in pieces]
                rows.append(torch.cat([_cut(w.detach().reshape(-1)[at:], b, e) for w, at, b, e in flat if w is not None]))
            every = torch.stack(rows)
            # Not reduce-scattered: gloo has that since torch 2.13, and takes longer for it (docs/adr/0008-own-slices.md).
            self.ranks.sum_([every], at)
            split = every[self.ranks.rank].split([e - b for _, b, e in pieces])
            for (i, begin, end), piece in zip(pieces, split, strict=True):
                found[i][begin:end] = piece
                if end == len(found[i]):
                    waiting[i] = None
        return [found[i][: end - begin] for i, (begin, end) in enumerate(map(self.bounds, names))]

    def _pieces(self, names: Sequence[str]) -> Iterator[list[tuple[int, int, int]]]:
        """What is sent at once: of which tensors, by index, which entries of each process' share."""
        room = most = max(BUCKET // self.ranks.world, 1)
        found: list[tuple[int, int, int]] = []
        for i, name in enumerate(names):
            begin, share = 0, self.share(name)
            while begin < share:
                end = min(begin + room, share)
                found.append((i, begin, end))
                room -= end - begin
                begin = end
                if not room:
                    yield found
                    found, room = [], most
        if found:
            yield found


def _cut(tensor: Tensor, begin: int, end: int) -> Tensor:
    """Entries of a flat tensor, with zeros for those that it has not."""
    found = tensor[begin:end]
    return pad(found, (0, end - begin - len(found)))


@dataclass(frozen=True)
class Sharded:
    """The space of vectors of some tensors end to end, each of which is held in slices.

    A vector here is the slices of this process end to end, of shape (n,).
    """

    shards: Shards
    names: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """Entries of a whole vector."""
        return sum(self.shards.shapes[n].numel() for n in self.names)

    @property
    def sizes(self) -> list[int]:
        """Entries that are held here, by tensor."""
        return [end - begin for begin, end in map(self.shards.bounds, self.names)]

    def empty(self, rows: int) -> Tensor:
        """Memory of shape (rows, n) that is not filled."""
        return torch.empty((rows, sum(self.sizes)), dtype=self.dtype, device=self.device)

    def random(self, generator: torch.Generator) -> Tensor:
        """The entries held here of the vector that one process draws from the same generator on a CPU."""
        found, own = self.empty(1)[0], self._own()
        for start, part in drawn(self.size, generator):
            for begin, stop, here in own:
                first, last = max(begin, start), min(stop, start + len(part))
                if first < last:
                    found[here + first - begin : here + last - begin] = part[first - start : last - start]
        return found

    def inner(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Products of the rows, of shape (k, n), with the vector, summed over all processes, in float64 on the CPU."""
        found = inner(rows, vector).cpu().double()
        self.shards.ranks.sum_([found])
        return found

    def here(self, vectors: Tensor) -> Tensor:
        """Slices on the space's device; themselves, where they lie there."""
        return vectors.to(self.device)

    def combine(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """One product of the coefficients, in the rows' precision and on their device, with the rows."""
        return coefficients.to(rows.dtype).to(rows.device) @ rows

    def norm(self, vector: Tensor) -> float:
        """Euclidean norm of the whole vector."""
        return math.hypot(*self.shards.ranks.each(length(vector)))

    def finite(self, vector: Tensor) -> bool:
        """Whether no entry is NaN or infinite, in any process."""
        return not any(self.shards.ranks.each(float(not torch.isfinite(vector).all())))

    def count(self, mask: Tensor) -> int:
        """How many entries are true, in all processes."""
        return int(sum(self.shards.ranks.each(float(mask.sum()))))

    def gather(self, vector: Tensor) -> Tensor:
        """The whole vector, of shape (size,), in every process."""
        return torch.cat([t.reshape(-1) for t in self.shards.gather(self.names, vector.split(self.sizes))])

    def agree(self, *numbers: float) -> list[float]:
        """Rank 0's numbers."""
        return self.shards.ranks.first(numbers)

    def _own(self) -> list[tuple[int, int, int]]:
        """Of each tensor: first and last entry held here, in the whole vector, and where they begin in the one held here."""
        found, start, here = [], 0, 0
        for name in self.names:
            begin, end = self.shards.bounds(name)
            found.append((start + begin, start + end, here))
            start, here = start + self.shards.shapes[name].numel(), here + end - begin
        return found
