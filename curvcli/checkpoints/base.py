"""The interface of checkpoint readers, and what they hand over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from torch import nn

from curvcli.checkpoints.clipping import Clipping
from curvcli.documents import Finding
from curvcli.errors import InputError
from curvcli.files.tensors import TensorInfo
from curvcli.models.base import Architecture, Task
from curvcli.models.slices import Divisible
from curvcli.optimizers.base import OptimizerView


@dataclass(frozen=True)
class OptimizerFile:
    """Optimizer state before it is mapped to names: `view(model)` maps it, or raises InputError."""

    path: Path
    view: Callable[[nn.Module], OptimizerView]
    summary: Callable[[], dict[str, object]]


def unusable(path: Path, what: str, *, hint: str) -> OptimizerFile:
    """State that is there and no number can be made of: `curv inspect` says so, and mapping it raises InputError."""

    def view(model: nn.Module) -> OptimizerView:
        raise InputError(what, hint=hint)

    return OptimizerFile(path, view, lambda: {"not used": what})


def warning(code: str, message: str) -> Finding:
    """A finding that headers suffice for."""
    return Finding(code=code, severity="warning", message=message)


@dataclass(frozen=True)
class Logged:
    """What the run's own log says of a step."""

    step: int
    loss: float | None
    lr: float | None
    non_finite: bool = False  # a loss was logged that is no number, or infinite


# The architecture of weights that lie without a network.
UNNAMED = "not named in the checkpoint"


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
        vocabulary: token ids lie below it; None where nothing says it.
        context: longest sequence the model takes, where known.
        task: what the loss is.
        log: the run's own log up to this checkpoint, in step order, where it has one.
        tokenizer: directory of its tokenizer, where there is one.
        notes: what a reader of the numbers should know about how the trainer made them.
        clipping: what the run's record says of it.
        findings: what is wrong with the files, as far as headers tell.
        sources: further files and directories that the model is made of, outside the checkpoint.
        ended_lr: learning rate of the last step, by the run's own arguments, where its schedule has ended at 0.
        divisible: the weights as processes that share the model read them; None where the format is read as a whole.
    """

    path: Path
    format: str
    architecture: str
    tensors: tuple[TensorInfo, ...]
    model: Callable[[], nn.Module]
    optimizer: OptimizerFile | None
    step: int | None
    vocabulary: int | None
    context: int | None
    task: Task = "causal-lm"
    log: tuple[Logged, ...] = ()
    tokenizer: Path | None = None
    notes: dict[str, str] = field(default_factory=dict)
    clipping: Clipping = field(default_factory=Clipping)
    findings: tuple[Finding, ...] = ()
    sources: tuple[Path, ...] = ()
    ended_lr: float | None = None
    divisible: Callable[[], Divisible] | None = None

    @property
    def last_lr(self) -> float | None:
        """The learning rate of a run whose schedule has ended at 0: the last positive one logged, else `ended_lr`."""
        return self._logged_lr or self.ended_lr

    @property
    def last_lr_source(self) -> Literal["log", "schedule"]:
        """Where `last_lr` is from."""
        return "log" if self._logged_lr else "schedule"

    @property
    def _logged_lr(self) -> float | None:
        return next((entry.lr for entry in reversed(self.log) if entry.lr is not None and entry.lr > 0), None)

    @property
    def training_loss(self) -> float | None:
        """Last training loss in the run's own log."""
        return next((entry.loss for entry in reversed(self.log) if entry.loss is not None), None)


class CheckpointReader(Protocol):
    """One checkpoint format."""

    def accepts(self, path: Path) -> bool:
        """Whether this looks like the reader's format; looks at names, and at a file's first bytes at most."""
        ...

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """Headers of the checkpoint. Raises InputError.

        Args:
            architecture: what the user named with --model; None leaves it to what lies in the checkpoint.
        """
        ...
