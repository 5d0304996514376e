"""Schedules of learning rates for tests."""

from __future__ import annotations

from curvcli.documents import LrSchedule
from curvcli.schedules import lr_schedule

PEAK = 3e-3


def rates(kind: str = "constant", peak: float | None = PEAK, **options: object) -> LrSchedule:
    return lr_schedule(kind, peak=peak, **options)  # type: ignore[arg-type]
