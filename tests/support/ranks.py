"""Work on gloo ranks, two unless more are asked for, each a process of its own.

Imports nothing heavy, for each rank imports it again."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

WORLD = 2
# What a step before is saved as, to mix files of two saves.
EARLIER = "-earlier"


def launch(work: Callable[[int, Path], None], path: Path, *, initialize: bool = True, world: int = WORLD) -> None:
    """Run `work(rank, path)` on every rank; raises what a rank raised.

    Args:
        initialize: make the process group here; else `work` has its library do it.
    """
    port = _port()
    # Ranks are forked from a process that has imported what takes seconds: once, not once a rank.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["transformers.models.llama.modeling_llama"])
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # which DeepSpeed asks for where transformers imports it
        torch.multiprocessing.start_processes(
            _rank, args=(work, path, port, initialize, world), nprocs=world, start_method="forkserver"
        )


def _port() -> int:
    """A free one, out of the range that systems give connections from: one of those may be taken again before it is used."""
    while True:
        with socket.socket() as probe:
            port = secrets.choice(range(20000, 32000))
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _rank(rank: int, work: Callable[[int, Path], None], path: Path, port: int, initialize: bool, world: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    if initialize:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    work(rank, path)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # Not through the interpreter's end, where gloo's threads now and then abort a rank whose work is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
