"""Processes that measure together, on threads: what they say goes over a wire in the place of torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from curvcli.curvature.ranks import Processes


class Wire:
    """Stands for torch.distributed between threads: every collective is a meeting of all."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=20)
        self.parts: list[Tensor] = [torch.empty(0)] * world

    def met(self, rank: int, part: Tensor) -> list[Tensor]:
        self.parts[rank] = part.clone()
        self.barrier.wait()
        found = [p.clone() for p in self.parts]
        self.barrier.wait()
        return found


class End:
    """What one rank sees of the wire."""

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank

    def all_gather(self, every: list[Tensor], mine: Tensor, group: Any = None) -> None:
        for slot, part in zip(every, self.wire.met(self.rank, mine), strict=True):
            slot.copy_(part)

    def all_reduce(self, flat: Tensor, group: Any = None, async_op: bool = False) -> Any:
        flat.copy_(torch.stack(self.wire.met(self.rank, flat)).sum(dim=0))

        class Done:
            def wait(self) -> None:
                return None

        return Done()

    def broadcast(self, buffer: Tensor, group: Any = None, group_src: int = 0) -> None:
        buffer.copy_(self.wire.met(self.rank, buffer)[group_src])


def rank_of(wire: Wire, rank: int, world: int) -> Processes:
    found = Processes.__new__(Processes)
    found._dist, found._group, found.rank, found.world, found.here = End(wire, rank), None, rank, world, world
    found.speaking = False
    return found


def on_ranks(work: Callable[[Processes], Any], world: int = 3) -> list[Any]:
    """What each rank gives, or the error that it raised."""
    wire = Wire(world)

    def one(rank: int) -> Any:
        try:
            return work(rank_of(wire, rank, world))
        except BaseException as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def counted_bytes(ranks: Any) -> list[int]:
    """One number: bytes that these ranks send from now on, each part to every other one, and sums as a ring makes them."""
    sent = [0]
    gathered, summed = ranks.gathered, ranks.sum_

    def gather(part: Tensor, at: int = 0) -> Tensor:
        sent[0] += (ranks.world - 1) * part.nbytes
        found: Tensor = gathered(part, at)
        return found

    def add(tensors: Any, at: int = 0) -> None:
        sent[0] += sum(2 * (ranks.world - 1) * t.nbytes // ranks.world for t in tensors)
        summed(tensors, at)

    ranks.gathered, ranks.sum_ = gather, add
    return sent
