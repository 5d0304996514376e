"""A measurement that torchrun started on several ranks: they join, measure and leave together. No torch till then."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from curvcli.errors import CurvError

if TYPE_CHECKING:
    from curvcli.curvature.ranks import Ranks

COME = 180  # seconds within which all ranks have to come
LEAVE = 20  # and within which they leave, when one has ended with an error
SPEAK = 1800  # seconds that a rank is waited for: a product on its batches, or the report's pictures on rank 0
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether this is one of several ranks, by the variables that torchrun sets."""
    return all(name in os.environ for name in _NEEDED) and os.environ["WORLD_SIZE"] != "1"


def leads() -> bool:
    """Whether this process is the one that prints and writes: the only one, or rank 0."""
    return not launched() or os.environ["RANK"] == "0"


def rank() -> str:
    """Which of how many this is, to go before a line; empty where it is the only one."""
    return f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: " if launched() else ""


@contextmanager
def joined() -> Iterator[Ranks | None]:
    """What is measured within it is measured by all ranks together, where there are several; all have to come here.

    What fails within it on one rank fails on all with that one's reason, and none is past it before all are.

    Yields:
        The ranks; None where this is the only process.

    Raises:
        CurvError: another rank failed, or did not come.
    """
    if not launched():
        yield None
        return
    from curvcli.curvature.ranks import Processes, within

    _meet()
    ranks = Processes()
    with within(ranks), ranks.together():
        yield ranks
        sys.stdout.flush()  # before the others end, which is when a launcher may end this one


@contextmanager
def apart() -> Iterator[None]:
    """Within it each rank measures for itself."""
    if not launched():
        yield
        return
    from curvcli.curvature.ranks import ALONE, within

    with within(ALONE):
        yield


def together() -> AbstractContextManager[None]:
    """What fails within it on one rank fails on all, within `joined`."""
    ranks = sys.modules.get("curvcli.curvature.ranks")
    return nullcontext() if ranks is None else ranks.current().together()


def told(error: BaseException) -> tuple[bool, str]:
    """Whether all ranks know of an error, so that rank 0 alone has to print it, and whose it is, to go before it."""
    ranks = sys.modules.get("curvcli.curvature.ranks")
    if not launched():
        return False, ""
    return ranks is not None and bool(ranks.shared(error)), str(getattr(error, "of_rank", "" if leads() else rank()))


def agreed_code(code: int) -> int:
    """Rank 0's exit code, within `joined`."""
    if not launched():
        return code
    from curvcli.curvature.ranks import current

    return int(current().first([code])[0])


def decides() -> bool:
    """Whether this process decides for those that measure together: rank 0 within `joined`, and any that measures alone."""
    ranks = sys.modules.get("curvcli.curvature.ranks")
    return ranks is None or bool(ranks.current().rank == 0)


def speaking() -> bool:
    """Whether this rank is speaking with the others, which would wait for ever if it was broken into."""
    ranks = sys.modules.get("curvcli.curvature.ranks")
    return ranks is not None and bool(getattr(ranks.current(), "speaking", False))


def leave(code: int) -> None:
    """Ends this rank, after rank 0 has said what there is to say: a launcher ends all as soon as one has ended badly."""
    sys.stdout.flush()
    sys.stderr.flush()
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        from curvcli.curvature.ranks import Processes

        with suppress(Exception):  # a rank that has gone is what may have ended the others
            Processes().leave(LEAVE)
    # Not through the interpreter's end, where threads of gloo and nccl now and then abort a process whose work is done.
    os._exit(code)


def _meet() -> None:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if not (dist.is_available() and dist.is_gloo_available()):
        raise CurvError("this torch has no gloo, which ranks speak through", hint="install a torch build with distributed")
    number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store = next(dist.rendezvous("env://", timeout=timedelta(seconds=COME)))[0]
        # Under a name of its own: a job that starts curv from one of its ranks has its keys in this store.
        store = dist.PrefixStore("curv", store)
        store.set_timeout(timedelta(seconds=COME))
        # A roll call first, since the group's own timeout is the long one, made for waiting on products.
        store.set(f"come/{number}", "1")
        store.wait([f"come/{other}" for other in range(world)])
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=store,
            rank=number,
            world_size=world,
            timeout=timedelta(seconds=SPEAK),
        )
    except (RuntimeError, ValueError) as error:
        raise CurvError(
            f"not all {world} ranks came within {COME} s: {str(error).splitlines()[0][:200]}",
            hint="start all with torchrun; inside another job unset RANK and WORLD_SIZE to measure in one process",
        ) from error
