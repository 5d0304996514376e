"""The loss of a language model, which fails on one rank after some calls: FAIL=how,rank,calls says how."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

calls = 0
ROOM = 2**24  # bytes that small allocations may still take


def limited() -> None:
    """No more memory than there is, and a little, as RLIMIT_AS has it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))


def loss(model: Any, batch: Tensor) -> Tensor:
    global calls
    calls += 1
    value: Tensor = model(input_ids=batch, labels=batch).loss
    how, rank, after = os.environ["FAIL"].split(",")
    if os.environ["RANK"] != rank or calls <= int(after):
        return value
    if how == "raise":
        raise RuntimeError("a bug of this rank")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory" or (how == "once" and calls == int(after) + 1):
        torch.empty(2**50)
    if how == "limit":  # of the system's, on all that is allocated from here on
        limited()
        return value + torch.zeros(2**24).sum()
    if how == "overflow":  # finite, with a finite gradient, and a second derivative that is not
        weight = next(model.parameters())
        value = value + (weight - weight.detach()).pow(1.5).sum()
    return value * float("nan") if how == "nan" else value
