"""Differences of gradients at a step that nobody looks for, where a test is about something else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch


def fixed_step() -> AbstractContextManager[Any]:
    """Within it a solve takes a step of 1e-7 nats, and no products to find a better one."""

    def calibrate(self: Any, start: Any, *, late: bool) -> None:
        self.step.reach = 1e-7

    return patch.multiple("curvcli.curvature.stepped._Paced", calibrate=calibrate, refined=lambda *_: False)
