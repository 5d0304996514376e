"""A deadline that passes at a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest


def late_after(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[float]:
    """From this call on the deadline has passed; the deadline to give, once there is one."""
    deadline = [time.monotonic() + 3600]
    real: Callable[..., Any] = getattr(place, name)
    jumped = [0.0]
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + jumped[0])

    def called(*arguments: Any, **options: Any) -> Any:
        jumped[0] = 7200
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, called)
    return deadline
