"""Work on the CPU in threads of Python, each with its share of the threads that torch gives one of them.

Torch divides each operation over its threads, and all of them wait at the end of each: of small operations that brings
little, and where other programs use the cores it makes each wait for the slowest. Backward passes through graphs that share
nothing but parameters need not wait for each other
(https://docs.pytorch.org/docs/stable/notes/autograd.html#multithreaded-autograd).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
_WORKER = threading.local()


def in_order(tasks: Sequence[Callable[[], T]], use: Callable[[int, T], object]) -> None:
    """Does all tasks, as many at a time as torch has threads, and hands over what each returns, in their order.

    What a task computes is the same as in one thread, bit by bit where torch has one thread too.

    Args:
        tasks: none may change what another reads. One that calls this has its own done one after the other.
        use: called in this thread with a task's index and what it returned.

    Raises:
        Exception: what a task or `use` raises, once the tasks that were begun have ended.
    """
    threads = available()
    most = min(threads, len(tasks))
    if most < 2 or getattr(_WORKER, "busy", False):
        for index, task in enumerate(tasks):
            use(index, task())
        return
    begun: deque[tuple[int, Future[T]]] = deque()

    def hand_over() -> None:
        index, future = begun.popleft()
        use(index, future.result())

    # Threads are new each time, since one keeps the number of torch's threads that it was started with.
    with _torch_threads(threads // most), ThreadPoolExecutor(most, initializer=_begin) as pool:
        for index, task in enumerate(tasks):
            if len(begun) == most:  # and no more results are held than that
                hand_over()
            begun.append((index, pool.submit(task)))
        while begun:
            hand_over()


def available() -> int:
    """Threads that torch would give one operation."""
    return torch.get_num_threads()


def _begin() -> None:
    _WORKER.busy = True


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
