"""What a measurement of the tracker begins with and ends in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from curvcli.curvature import resources
from curvcli.curvature.hvp import Mode, graph_bytes
from curvcli.curvature.problem import Problem
from curvcli.documents import StableLr
from curvcli.errors import exhausted
from curvcli.judge.calibration import Bracket, odds, stable_lr, too_early
from curvcli.judge.limits import certified
from curvcli.optimizers.base import OptimizerView
from curvcli.optimizers.preconditioner import Preconditioner


@dataclass(frozen=True)
class Known:
    """The optimizer's state by name, the names of what is locked, and those, in the wrapped model, of what joins next."""

    view: OptimizerView
    locked: frozenset[str] = frozenset()
    coming: frozenset[str] = frozenset()
    gather: bool = False  # a sharded model, for the measurement


@dataclass(frozen=True)
class Found:
    """What a measurement found, as the record's fields."""

    eigenvalue: float | None = None
    rho: float | None = None
    residual: float | None = None
    update_ratio: float | None = None
    update_rms: float | None = None
    gradient_norm: float | None = None
    gradient_sigmas: float | None = None
    gradient_outlier: bool | None = None
    gradient_quotient: float | None = None
    attention_logit: float | None = None
    attention_entropy: float | None = None
    spectral_norm: float | None = None
    sharpness: float | None = None
    dual_norm: float | None = None
    z: float | None = None
    hvps: int = 0
    status: Any = "failed"
    message: str | None = None
    early: bool = False
    stable_lr: StableLr | None = None
    odds: float | None = None


def failed(error: Exception) -> Found:
    """In place of a measurement that raised."""
    said = "out of memory" if exhausted(error) else type(error).__name__
    return Found(status="failed", message=f"{said}: {' '.join(str(error).split())}"[:300])


def mode_for(problem: Problem, graphs: int) -> Mode:
    """Kept graphs where so many of the first batch's have room in all processes, else fresh ones.

    By a rule and not by the clock: a resumed job has to repeat the very same sums.
    """
    room = resources.free_bytes(next(iter(problem.parameters.values())).device)
    fits = graph_bytes(problem, cut_short=True) * graphs <= room
    return "kept" if all(problem.ranks.each(fits)) else "fresh"


def finite(value: float | None) -> float | None:
    """A number, or None where it is none."""
    return float(value) if value is not None and abs(float(value)) < float("inf") else None


def calibrated(found: Found, preconditioner: Preconditioner, step: int) -> Found:
    """Whether it is too early to tell, and else the largest stable learning rate and the odds."""
    rho, residual, lr = found.rho, found.residual, preconditioner.lr
    threshold, options = preconditioner.threshold, preconditioner.options
    if rho is None:
        return found
    if too_early(step, preconditioner.step, options.get("betas"), options.get("momentum")):
        return replace(found, early=True)
    partial = bool(preconditioner.balls)  # of which no run of the calibration was
    if not certified(found) or residual is None or not threshold or not lr or rho <= 0 or partial:
        return found
    # Up to the residual: the tracker knows no ceiling, and holds nothing out (docs/adr/0007-two-eigensolvers.md).
    limit = stable_lr(lr, Bracket(rho, rho, rho + residual / threshold), preconditioner.name)
    return replace(found, stable_lr=limit, odds=odds(rho, preconditioner.name))


def groups_of(optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer, or of several."""
    several = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    return [group for one in several for group in one.param_groups]


def bare(model: nn.Module) -> nn.Module:
    """The model without torch.compile's and DistributedDataParallel's wrappers."""
    # Compiled outside of DistributedDataParallel, or within it: jobs do either.
    module = getattr(model, "_orig_mod", model)
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    return getattr(module, "_orig_mod", module)


def bare_names(names: frozenset[str]) -> frozenset[str]:
    """Names in the wrapped model as names in the bare one."""
    return frozenset(".".join(part for part in n.split(".") if part not in ("_orig_mod", "module")) for n in names)


def rank() -> int:
    """Of this process; 0 where the job has one."""
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
