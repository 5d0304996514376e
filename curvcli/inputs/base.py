"""The seam of checkpoint readers, and what they hand over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from torch import nn

from curvcli.optimizers.base import OptimizerView


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor as its file's header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class OptimizerFile:
    """Optimizer state before it is mapped to names: `view(model)` maps it, or raises InputError."""

    path: Path
    view: Callable[[nn.Module], OptimizerView]
    summary: Callable[[], dict[str, object]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were read; weights and state are loaded by the calls.

    Attributes:
        path: the checkpoint itself, newest of its run where a run was given.
        format: as the reader calls it.
        architecture: model class or type, for people.
        tensors: the stored weights.
        model: builds the float32 model in evaluation mode. Raises InputError.
        optimizer: None where the checkpoint has none.
        step: optimizer steps taken, where known.
        last_lr: last positive learning rate in the run's own log, where it has one.
        vocabulary: token ids lie below it.
        context: longest sequence the model takes, where known.
        notes: what a reader of the numbers should know about how the trainer made them.
    """

    path: Path
    format: Literal["trainer", "pretrained", "nanogpt"]
    architecture: str
    tensors: tuple[TensorInfo, ...]
    model: Callable[[], nn.Module]
    optimizer: OptimizerFile | None
    step: int | None
    vocabulary: int
    context: int | None
    last_lr: float | None = None
    tokenizer: Path | None = None
    notes: dict[str, str] = field(default_factory=dict)


class CheckpointReader(Protocol):
    """One checkpoint format."""

    def accepts(self, path: Path) -> bool:
        """Whether this looks like the reader's format; looks at names only."""
        ...

    def read(self, path: Path) -> Checkpoint:
        """Headers of the checkpoint. Raises InputError."""
        ...
