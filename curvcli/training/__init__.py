"""Callbacks in the user's training loop: a tracker watches, architecture warm-up acts, callbacks translate.

from curvcli.training import ArchitectureWarmup, CurvatureTracker, read_reaction
from curvcli.training.transformers import CurvCallback
from curvcli.training.lightning import CurvCallback
"""

from __future__ import annotations

from curvcli.training.alerts import read_reaction
from curvcli.training.alive import DeadBlockError
from curvcli.training.tracker import CurvatureTracker
from curvcli.training.warmup import ArchitectureWarmup

__all__ = ["ArchitectureWarmup", "CurvatureTracker", "DeadBlockError", "read_reaction"]
