"""What the machine has and what was used of it."""

from __future__ import annotations

import gc
import resource
import sys

import psutil
import torch


def free_bytes(device: torch.device) -> float:
    """Memory that a measurement may plan with: 70 % of what is free now."""
    if device.type == "cuda":
        return 0.7 * torch.cuda.mem_get_info(device)[0]
    return 0.7 * float(psutil.virtual_memory().available)


def release(device: torch.device) -> None:
    """Give back what nothing holds any more, after memory ran out."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Count the device's peak from here. The CPU's is the process's and cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Largest memory held: by tensors on a GPU, by the process on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
