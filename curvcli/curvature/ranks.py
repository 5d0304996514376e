"""Several processes that measure one thing: each has a share of the batches, and they have one sum and one decision.

Every process computes the same, but for its batches; what they add up is summed over all, and what is decided by numbers or
by the clock is decided by rank 0. Whenever they speak they first say that they are well: a process that has failed says so
in the place of what it would have said next, so that none waits for it. Torch's own process groups carry it all: gloo what
is decided, and on the CPU what is summed, too; nccl the sums of GPUs.

Nothing is shared unless somebody asked for it with `within`, and without that nothing here costs anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from datetime import timedelta
from hashlib import sha256
from typing import Any, Protocol

import torch
from torch import Tensor

from curvcli.curvature.content import content
from curvcli.errors import CurvError, LostError, OutOfMemoryError, OutOfTime, RankError, UsageError, exhausted, plain

SLOTS = 64  # numbers that an exchange carries
SMALL = 2**16  # entries of a tensor up to which it is summed together with others
SAID = 1000  # bytes of a reason
# States of a process, from well to worse; what is raised elsewhere goes by them.
_WELL, _FAILED, _NO_MEMORY, _NO_TIME, _BROKEN = range(5)
# What is spoken of. Processes that are not at the same are out of step, which is an error and not a number.
_SUM, _NUMBERS, _TEXT, _END, _LEAVE, _GATHER = range(1, 7)


class Ranks(Protocol):
    """The processes that measure together, of which this is one."""

    rank: int
    world: int
    here: int  # on this machine, whose memory they share

    def sum_(self, tensors: Sequence[Tensor], at: int = 0) -> None:
        """Sum each tensor over the processes, in place. All call it with the same shapes in the same order.

        Args:
            at: what they are of, which has to be the same for all.
        """
        ...

    def gathered(self, part: Tensor, at: int = 0) -> Tensor:
        """A part of every process, by rank: of shape (world, k) for parts of shape (k,), of one length and type.

        Args:
            at: as for `sum_`.
        """
        ...

    def first(self, numbers: Sequence[float]) -> list[float]:
        """Rank 0's numbers."""
        ...

    def each(self, number: float) -> list[float]:
        """A number of every process, by rank."""
        ...

    def first_text(self, text: str) -> str:
        """Rank 0's text."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """What fails within it on one process fails on all, with that one's reason; else all come to its end."""
        ...


class Alone:
    """One process, which asks nobody."""

    rank, world, here = 0, 1, 1

    def sum_(self, tensors: Sequence[Tensor], at: int = 0) -> None:
        """Nothing is to be added."""

    def gathered(self, part: Tensor, at: int = 0) -> Tensor:
        """The part alone, as the only row."""
        return part[None]

    def first(self, numbers: Sequence[float]) -> list[float]:
        """The numbers themselves."""
        return list(numbers)

    def each(self, number: float) -> list[float]:
        """The number alone."""
        return [number]

    def first_text(self, text: str) -> str:
        """The text itself."""
        return text

    def together(self) -> AbstractContextManager[None]:
        """Nothing more than what is within."""
        return nullcontext()


class Processes:
    """The processes of a group of torch.distributed.

    Args:
        group: that speaks gloo of tensors on the CPU; None is the default group.

    Raises (every method that speaks):
        CurvError: another process has failed, and why. An OutOfMemoryError or OutOfTime where that is what failed there.
        RankError: another process has a bug. A LostError where the connection to it was lost, or they are out of step.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self._group = group
        self.rank: int = dist.get_rank(group)
        self.world: int = dist.get_world_size(group)
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self.speaking = False  # an alarm that breaks into it would leave the others waiting

    def sum_(self, tensors: Sequence[Tensor], at: int = 0) -> None:
        """Sum each tensor over the processes, in place: small ones together, so that each does not wait alone."""
        with self._speaking():
            # First agree on the number of entries: a rank missing from all_reduce would hang the others.
            self._exchange(_WELL, _SUM, [float(sum(t.numel() for t in tensors)), at])
            large = [t for t in tensors if t.numel() > SMALL]
            small = [t for t in tensors if 0 < t.numel() <= SMALL]
            kinds = {(t.dtype, t.device): [s for s in small if (s.dtype, s.device) == (t.dtype, t.device)] for t in small}
            joined = [(torch.cat([t.reshape(-1) for t in members]), members) for members in kinds.values()]
            joined += [(t.contiguous(), [t]) for t in large]
            with self._connected():
                # Start all of them before waiting for any.
                waiting = [self._dist.all_reduce(flat, group=self._group, async_op=True) for flat, _ in joined]
                for work in waiting:
                    work.wait()
            for flat, members in joined:
                pieces = flat.reshape(-1).split([t.numel() for t in members])
                for tensor, piece in zip(members, pieces, strict=True):
                    # A large contiguous tensor was summed in place.
                    if tensor.data_ptr() != piece.data_ptr():
                        tensor.copy_(piece.view(tensor.shape))

    def gathered(self, part: Tensor, at: int = 0) -> Tensor:
        """A part of every process, by rank, of shape (world, k)."""
        with self._speaking():
            self._exchange(_WELL, _GATHER, [float(part.numel()), at])
            every = part.new_empty((self.world, part.numel()))
            with self._connected():
                self._dist.all_gather(list(every.unbind()), part.contiguous(), group=self._group)
        return every

    def first(self, numbers: Sequence[float]) -> list[float]:
        """Rank 0's numbers, of which all have as many."""
        found: list[float] = []
        with self._speaking():
            for start in range(0, len(numbers), SLOTS):
                part = list(numbers[start : start + SLOTS])
                found += self._exchange(_WELL, _NUMBERS, part)[0, : len(part)].tolist()
        return found

    def each(self, number: float) -> list[float]:
        """A number of every process, by rank."""
        with self._speaking():
            found: list[float] = self._exchange(_WELL, _NUMBERS, [number])[:, 0].tolist()
        return found

    def first_text(self, text: str) -> str:
        """Rank 0's text, as bytes: nothing is unpickled."""
        data = text.encode() if self.rank == 0 else b""
        with self._speaking():
            size = int(self._exchange(_WELL, _TEXT, [float(len(data))])[0, 0])
            buffer = torch.zeros(size, dtype=torch.uint8)
            if self.rank == 0 and size:
                buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            if size:
                with self._connected():
                    self._dist.broadcast(buffer, group=self._group, group_src=0)
        return bytes(buffer.tolist()).decode()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails within it on one process is said to the others, in the place of what they wait for."""
        try:
            yield
            with self._speaking():
                self._exchange(_WELL, _END, [])
        # OutOfTime is no Exception, so that nobody's handler swallows it.
        except (Exception, OutOfTime) as error:
            if not shared(error):
                with self._speaking():
                    self._say(error)
            raise

    def leave(self, seconds: float) -> None:
        """Wait so long for the others to be here too; those who are elsewhere hear that this one goes."""
        mine = torch.zeros(SLOTS + 3, dtype=torch.float64)
        mine[0], mine[1] = _BROKEN, _LEAVE
        every = [torch.empty_like(mine) for _ in range(self.world)]
        work = self._dist.all_gather(every, mine, group=self._group, async_op=True)
        work.wait(timeout=timedelta(seconds=seconds))
        if any(int(said[1]) != _LEAVE for said in every):
            # Called for its exchange: the other ranks are waiting there for the reason.
            self._failure(torch.stack(every)[:, 0], "it ended before the others")

    def _say(self, error: BaseException) -> None:
        """Tell the others what failed here, and mark it as told. Where they have gone, there is nobody to tell."""
        state = _FAILED if isinstance(error, CurvError) else _BROKEN
        state = _NO_TIME if isinstance(error, OutOfTime) else _NO_MEMORY if exhausted(error) else state
        name = "" if isinstance(error, (CurvError, OutOfTime)) else f"{type(error).__name__}: "
        try:
            self._exchange(state, _END, [], f"{name}{error}")
        except (CurvError, OutOfTime) as heard:
            # Where all failed it is the input's doing and no rank's.
            _mark(error).of_rank = "" if getattr(heard, "alike", True) else f"rank {self.rank} of {self.world}: "

    def _exchange(self, state: int, what: int, numbers: Sequence[float], reason: str = "") -> Tensor:
        """Numbers of every process, of shape (world, SLOTS), where all of them are well and at the same thing."""
        mine = torch.zeros(SLOTS + 3, dtype=torch.float64)
        # Header: this rank's state, the subject, how many numbers; then the numbers.
        mine[0], mine[1], mine[2] = state, what, len(numbers)
        mine[3 : 3 + len(numbers)] = torch.tensor(list(numbers), dtype=torch.float64)
        table = self._gathered(mine)
        if bool((table[:, 0] != _WELL).any()):
            raise self._failure(table[:, 0], reason)
        # Of a sum, and of what is gathered, all have to have the same number of entries, and of the same.
        known = table[:, 1:5] if what in (_SUM, _GATHER) else table[:, 1:3]
        apart = (known != known[0]).any(dim=1).nonzero().flatten().tolist()
        if apart:
            raise _mark(
                LostError(
                    f"ranks are out of step: rank 0 is at {table[0, 1:5].tolist()}, rank {apart[0]} at "
                    f"{table[apart[0], 1:5].tolist()}",
                    hint="report it; meanwhile measure in one process, or with --mode fresh",
                )
            )
        return table[:, 3:]

    def _failure(self, states: Tensor, reason: str) -> BaseException:
        """What to raise where a process has failed: its reason, which all of them hear."""
        data = plain(reason).encode()[:SAID]
        mine = torch.zeros(SAID, dtype=torch.uint8)
        mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        texts = self._gathered(mine)
        worst = int(states.argmax())
        said = bytes(texts[worst].tolist()).rstrip(b"\0").decode(errors="replace")
        kinds = {_NO_MEMORY: OutOfMemoryError, _NO_TIME: OutOfTime, _BROKEN: RankError}
        found = _mark(kinds.get(int(states[worst]), CurvError)(f"rank {worst} of {self.world}: {said or 'failed'}"))
        found.alike = bool((states != _WELL).all())
        raised: BaseException = found
        return raised

    def _gathered(self, mine: Tensor) -> Tensor:
        every = [torch.empty_like(mine) for _ in range(self.world)]
        with self._connected():
            self._dist.all_gather(every, mine, group=self._group)
        return torch.stack(every)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's own, and DistBackendError
            if exhausted(error):
                raise
            raise _mark(
                LostError(
                    f"rank {self.rank} of {self.world} lost the connection to another: {str(error).splitlines()[0][:200]}",
                    hint="it ended or was killed; what started the ranks says which",
                )
            ) from error

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        before, self.speaking = self.speaking, True
        try:
            yield
        finally:
            self.speaking = before


ALONE = Alone()
# By tokens, as ALONE stands at the bottom and again within `apart`: each exit puts back what was there before it.
_current: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def current() -> Ranks:
    """The processes that measure together here: one alone, unless it is within `within`."""
    return _current.get()


@contextmanager
def within(ranks: Ranks) -> Iterator[Ranks]:
    """What is measured within it is measured by these processes together, all of which have to come here."""
    before = _current.set(ranks)
    try:
        yield ranks
    finally:
        _current.reset(before)


def shared(error: BaseException | None) -> bool:
    """Whether all processes know of an error, or of what it was made of."""
    while error is not None:
        if getattr(error, "said_by_ranks", False):
            return True
        error = error.__cause__ or error.__context__
    return False


def agreed(*decisions: bool) -> list[bool]:
    """Rank 0's decisions, so that none goes on alone where two round or read the clock differently."""
    return [bool(decision) for decision in current().first([float(decision) for decision in decisions])]


def same(what: str, *values: Any) -> None:
    """That all processes have the same tensors in these values. Raises UsageError that names one that has not."""
    ranks = current()
    if ranks.world == 1:
        return
    every = ranks.each(_digest(content(values)))
    other = next((rank for rank, found in enumerate(every) if found != every[0]), None)
    if other is not None:
        raise _mark(
            UsageError(
                f"rank {other} of {ranks.world} has other {what} than rank 0",
                hint="give all ranks the same files, which nothing writes meanwhile, and the same packages",
            )
        )


def alike(ranks: Ranks, what: str, mine: Any, next_one: Any) -> None:
    """That what each process says of its own part is what the one before it says of that. Raises UsageError."""
    own, said = ranks.each(_digest(mine)), ranks.each(_digest(next_one))
    for rank, found in enumerate(said):
        other = (rank + 1) % ranks.world
        if found != own[other]:
            raise _mark(
                UsageError(
                    f"rank {other} of {ranks.world} has other {what} than rank {rank}",
                    hint="give all ranks the same files, which nothing writes meanwhile, and the same packages",
                )
            )


def _digest(said: Any) -> float:
    return float(int.from_bytes(sha256(json.dumps(said).encode()).digest()[:6]))  # 48 bits, which float64 holds


def _mark(error: Any) -> Any:
    error.said_by_ranks = True
    return error
