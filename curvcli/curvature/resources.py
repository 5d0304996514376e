"""What the machine has and what was used of it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from functools import cache
from typing import Any

import psutil
import torch

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # of malloc.h


def free_bytes(device: torch.device) -> float:
    """Memory that a measurement may plan with: 70 % of what is free now."""
    # Not all of it: allocators keep fragments, and other processes need memory meanwhile.
    if device.type == "cuda":
        return 0.7 * _free_on_gpu(torch.cuda.current_device() if device.index is None else device.index)
    return 0.7 * float(psutil.virtual_memory().available)


def _free_on_gpu(index: int) -> float:
    """What tensors can still take: also blocks that torch keeps for later, and no more than a job has allowed itself."""
    free, total = torch.cuda.mem_get_info(index)
    held, kept = torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)
    allowed = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.7
    share = allowed(index) if allowed else 1.0
    return max(0.0, min(free + kept - held, share * total - held))


def held_bytes(device: torch.device) -> int:
    """Memory that is held now: by tensors on a GPU, by the process on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def release(device: torch.device) -> None:
    """Give back what nothing holds any more, after memory ran out."""
    # Tracebacks keep tensors in reference cycles, which only the collector frees.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def synchronize(device: torch.device) -> None:
    """Waits for what was asked of a device, so that a clock tells what it took."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak(device: torch.device) -> None:
    """Count the device's peak from here, in a process of one's own: a job may be counting its own.

    The CPU's is the process's and cannot be reset.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def give_back(device: torch.device) -> None:
    """Hand memory that the C library holds free back to the system, where it is glibc and tensors are the CPU's.

    Of a product's many tensors glibc keeps what they took, and vectors of a model's size are never put there: without
    this each product's memory is held while the eigensolver works (GPT-2, 256 tokens: 1.5 GB).
    """
    if device.type == "cpu" and (trim := _malloc_trim()) is not None:
        trim(0)


def return_blocks() -> bool:
    """From now on, in the whole process, memory of 1 MiB and more goes back to the system as soon as it is free.

    glibc raises this limit by itself, up to 32 MiB, and then holds what lies between tensors that live on. A product of
    GPT-2 with 4 x 256 tokens took 7.0 GiB beside the model, and takes 4.1 with it, in 16 % more time; through kept graphs
    6.8 and 5.4, in 36 % more (benchmarks/memory.py, on a busy machine). For a process of one's own, not for somebody's
    training job.

    Returns:
        Whether the C library is one that can be told.
    """
    return _told(_MMAP_THRESHOLD, 2**20)


def keep_blocks() -> bool:
    """From now on, in the whole process, up to 256 MiB that are free at the heap's end are kept for what is asked for next.

    glibc gives them back and asks for them again within a product, page by page: a product over 8,192 tokens of a Llama of
    width 32 took 55,000 page faults, and takes 6,000 with it, in 5 to 15 % less time. Blocks of more than 32 MiB still go
    back as they are freed. For a process of one's own, not for somebody's training job.

    Returns:
        Whether the C library is one that can be told.
    """
    # One heap for all threads: those that a thread gets of its own are given back whenever they are empty.
    return _told(_MMAP_THRESHOLD, 2**25) and _told(_TRIM_THRESHOLD, 2**28) and _told(_ARENA_MAX, 1)


def _told(parameter: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return mallopt is not None and mallopt(parameter, value) == 1  # mallopt(3): 1 is success


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none


def peak_bytes(device: torch.device) -> int:
    """Largest memory held: by tensors on a GPU, by the process on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # getrusage(2): bytes on macOS, KiB on Linux
