"""Schedules of architecture warm-up: the learning rate over steps, and policies that plan phases. No torch."""

from __future__ import annotations

from curvcli.schedules.lr import highest_from, lr_at, lr_schedule, settles
from curvcli.schedules.measured import Measured, freeze, grow_from
from curvcli.schedules.plan import INTERVAL, WARMUP, gated, grow

__all__ = [
    "INTERVAL",
    "WARMUP",
    "Measured",
    "freeze",
    "gated",
    "grow",
    "grow_from",
    "highest_from",
    "lr_at",
    "lr_schedule",
    "settles",
]
