"""Schedules of architecture warm-up: the learning rate over steps, and policies that plan phases. No torch."""

from __future__ import annotations

from curvcli.schedule.lr import highest_from, lr_at, lr_schedule, settles
from curvcli.schedule.measured import Measured, freeze, grow_from
from curvcli.schedule.plan import WARMUP, grow

__all__ = ["WARMUP", "Measured", "freeze", "grow", "grow_from", "highest_from", "lr_at", "lr_schedule", "settles"]
