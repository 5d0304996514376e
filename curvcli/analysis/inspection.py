"""`curv inspect`: what would be read of a checkpoint, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from curvcli.analysis.checkpoint import architecture_of
from curvcli.analysis.config import find_config
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.base import Checkpoint
from curvcli.data.shards import find_sources


def inspect_checkpoint(path: Path, data: Sequence[Path] | None = None, model: str | None = None) -> dict[str, Any]:
    """`curv inspect`: what would be read, from headers alone. Raises CurvError."""
    checkpoint = open_checkpoint(path, architecture_of(model))
    config, file = find_config(checkpoint.path, data=not data)
    shard = data or config.data
    sources = find_sources(shard, checkpoint) if shard else ()
    sizes = {t.name: prod(t.shape) for t in checkpoint.tensors}
    optimizer = checkpoint.optimizer.summary() if checkpoint.optimizer else None
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": checkpoint.architecture,
        "task": checkpoint.task,
        "step": checkpoint.step,
        "tensors": len(sizes),
        "parameters": sum(sizes.values()),
        "dtypes": sorted({t.dtype for t in checkpoint.tensors}),
        "vocabulary": checkpoint.vocabulary,
        "context": checkpoint.context,
        "optimizer": optimizer,
        "configuration": str(file) if file else None,
        "data": [{"path": str(s.path), "kind": s.kind, "tokens": s.tokens} for s in sources],
        "notes": {**checkpoint.notes, **_unlike_analyze(checkpoint, optimizer)},
        "findings": {finding.code: finding.message for finding in checkpoint.findings},
    }


def _unlike_analyze(checkpoint: Checkpoint, optimizer: Mapping[str, object] | None) -> dict[str, str]:
    """Where headers say something else than a report of the same checkpoint will, and why."""
    found: dict[str, str] = {}
    moved, stored = (optimizer or {}).get("parameters with state"), len(checkpoint.tensors)
    if isinstance(moved, int) and 0 < moved < stored:
        found["counts"] = (
            f"{stored} tensors are stored and {moved} have optimizer state: tied weights are stored by each of their names, "
            "and buffers and weights that do not train have no state; curv analyze counts each parameter that trains once"
        )
    lr = (optimizer or {}).get("lr")
    if isinstance(lr, (int, float)) and lr == 0:
        found["learning-rate"] = (
            f"it is 0 in the optimizer, as a schedule that has ended leaves it: curv analyze takes {_taken(checkpoint)}"
            if checkpoint.last_lr is not None
            else "it is 0 in the optimizer and the run has no log of it: pass the one in force to curv analyze with --lr"
        )
    return found


def _taken(checkpoint: Checkpoint) -> str:
    what = "the last logged one" if checkpoint.last_lr_source == "log" else "that of the last step, by the run's arguments"
    return f"{what}, {checkpoint.last_lr:g}"
