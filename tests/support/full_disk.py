"""A loss whose import puts vectors on a disk that is full on one rank after some files: FULL=rank,files says when."""

from __future__ import annotations

import errno
import os
from typing import Any

from torch import Tensor

from curvcli.analysis import api
from curvcli.analysis.plan import Sizes, predicted
from curvcli.curvature import resources

given = os.posix_fallocate
rank, room = os.environ["FULL"].split(",")
asked = 0


def fallocate(descriptor: int, offset: int, size: int) -> None:
    global asked
    asked += 1
    if os.environ["RANK"] == rank and asked > int(room):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    given(descriptor, offset, size)


plan = predicted(Sizes(0, 1, 1, 1, 0, 32), "fresh", 32, 50, offload=True)
setattr(api, "fitted", lambda problem, *rest, **how: (problem, plan))  # noqa: B010
resources.return_blocks = lambda: True
os.posix_fallocate = fallocate


def loss(model: Any, batch: Tensor) -> Tensor:
    found: Tensor = model(input_ids=batch, labels=batch).loss
    return found
