"""A tracker on several ranks: the probe split over them, and a model under fully_shard gathered for the measurement."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.curvature import resources
from curvcli.curvature.precision import whole
from curvcli.curvature.problem import sharded
from curvcli.curvature.ranks import ALONE, Processes, Ranks
from curvcli.errors import UnsupportedError
from curvcli.optimizers.base import OptimizerView

SPEAK = 600  # seconds that one rank is waited for; then the tracker, and not the job, gives up
VECTORS = 60  # of the model's size that a measurement takes: weights, moments, P, and Davidson's basis with its images
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def ranks_of(split: bool) -> Ranks:
    """The processes of the job, in a group of the tracker's own; one alone without `split` or without a job on several.

    All ranks have to call it, which takes part in making the group.
    """
    dist = torch.distributed
    if not (split and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ALONE
    # gloo in any case: what is decided is on the CPU, and a rank that has gone is noticed at once.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    return Processes(dist.new_group(backend=backend, timeout=timedelta(seconds=SPEAK)))


def check_gathered(model: nn.Module, held: Iterable[Tensor], ranks: Ranks) -> bool:
    """Whether the model is sharded and can be gathered: fully_shard's (FSDP2), on one mesh dimension or two (HSDP).

    Args:
        held: parameters of the optimizer.
        ranks: that measure together.

    Raises:
        UnsupportedError: it is sharded in another way, by one rank alone, is gathered at the moment, or is too large.
    """
    if not sharded(model):
        return False
    beside = "analyze its checkpoints instead"
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise UnsupportedError(
            "FullyShardedDataParallel (FSDP1) keeps flat parameters, which have no second derivatives",
            hint=f"use fully_shard (FSDP2), or {beside}",
        )
    # Tensor parallelism leaves no class on the model, only hooks on the modules' inputs and outputs.
    if any(_home(hook).startswith("torch.distributed.tensor.") for hook in _hooks(model)):
        raise UnsupportedError("a model under tensor parallelism is not measured while it trains", hint=beside)
    if ranks.world == 1 and torch.distributed.get_world_size() > 1:
        raise UnsupportedError(
            "a model under fully_shard is measured by all ranks together",
            hint="CurvatureTracker(..., split=True), made and stepped on every rank",
        )
    # While fully_shard has gathered them, modules hold plain tensors, but the optimizer still holds the shards.
    own = {id(p) for p in model.parameters()}
    if any(hasattr(p, "full_tensor") and id(p) not in own for p in held):
        raise UnsupportedError(
            "a model under fully_shard whose parameters are gathered is not measured",
            hint="step the tracker after backward and the optimizer's step, with reshard_after_backward as it is by default",
        )
    first = next(model.parameters())
    size = 4 * sum(p.numel() for p in model.parameters())  # gathered as float32
    # Ranks on one machine share its memory; each has a GPU of its own.
    free = min(ranks.each(resources.free_bytes(first.device) / (ranks.here if first.device.type == "cpu" else 1)))
    if VECTORS * size > free:
        raise UnsupportedError(
            f"under fully_shard each rank gathers the whole model to measure it: about {VECTORS * size / 2**30:.3g} GiB, "
            f"of which {free / 2**30:.3g} are free",
            hint=beside,
        )
    return True


def gathered(view: OptimizerView) -> OptimizerView:
    """An optimizer's state with what is sharded as whole tensors; all ranks have to call it."""
    state: dict[str, Any] = {}
    for name, entry in view.state.items():
        state[name] = {k: whole(v) if isinstance(v, Tensor) else v for k, v in entry.items()}
    return replace(view, state=state)


def _hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        for name in _HOOKS:
            hooks: Mapping[Any, Any] = getattr(module, name)
            yield from hooks.values()


def _home(hook: Any) -> str:
    return f"{getattr(hook, '__module__', '')}."
