"""Checkpoints that accelerate and transformers' Trainer write under FSDP: full and sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from curvcli.checkpoints.base import Checkpoint
from curvcli.checkpoints.clipping import clipping
from curvcli.checkpoints.formats.dcp import NamedOptimizer, Saved, assemble
from curvcli.checkpoints.formats.dcp_files import METADATA, Lazy
from curvcli.checkpoints.formats.huggingface import integer, run_log, trainer_state
from curvcli.checkpoints.state.mapping import map_named, summary
from curvcli.errors import InputError
from curvcli.files.runs import step_order
from curvcli.files.safe import load_pickle
from curvcli.files.tensors import TensorInfo
from curvcli.models.base import Architecture

# accelerate's names (accelerate.utils.constants), with 0 for the first model and optimizer.
_FULL, _SHARDED, _PER_RANK = "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0", "pytorch_model_fsdp*_rank*.bin"
_FULL_OPTIMIZER, _SHARDED_OPTIMIZER, _PER_RANK_OPTIMIZER = "optimizer.bin", "optimizer_0", "optimizer*_rank*.bin"


class FSDPReader:
    """`pytorch_model_fsdp.bin` with `optimizer.bin`, or `pytorch_model_fsdp_0/` with `optimizer_0/`."""

    def accepts(self, path: Path) -> bool:
        """Whether accelerate or the Trainer wrote it under FSDP, full, sharded or one file a rank."""
        return path.is_dir() and ((path / _FULL).is_file() or (path / _SHARDED).is_dir() or any(path.glob(_PER_RANK)))

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """The checkpoint, full or sharded. Raises InputError, UnsupportedError."""
        state = trainer_state(path)
        clipped = clipping(path, state)
        full = (path / _FULL).is_file()
        tensors, weights = _full_weights(path / _FULL) if full else _sharded_weights(path)
        optimizer, counted = _optimizer(path)
        # The Trainer's own count, the optimizer's, the directory's name: the last may count saves.
        steps = (integer(state, "global_step"), counted, step_order(path)[0])
        return assemble(
            path,
            architecture,
            format="fsdp-full" if full else "fsdp-sharded",
            tensors=tensors,
            weights=weights,
            optimizer=optimizer,
            step=next((step for step in steps if step is not None and step >= 0), None),
            log=run_log(state),
            notes=clipped.notes,
            clipping=clipped,
        )


_Weights = tuple[list[TensorInfo], Callable[[], Mapping[str, Tensor]]]


def _full_weights(file: Path) -> _Weights:
    shapes = load_pickle(file, meta=True)
    if not isinstance(shapes, dict) or not all(isinstance(t, Tensor) for t in shapes.values()):
        raise InputError(f"{file} holds no weights by name", hint="use another checkpoint")
    tensors = [TensorInfo(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in shapes.items()]
    return tensors, lambda: load_pickle(file)


def _sharded_weights(path: Path) -> _Weights:
    if not (path / _SHARDED / METADATA).is_file():
        raise _only_ranks(path, _PER_RANK)
    saved = Saved.of(path / _SHARDED)
    return saved.weight_infos, lambda: Lazy(saved.weights)


def _optimizer(path: Path) -> tuple[NamedOptimizer | None, int | None]:
    """The state, and the steps that it counts where reading that is cheap."""
    file = path / _FULL_OPTIMIZER
    if file.is_file():
        return NamedOptimizer(
            file,
            lambda model, names: map_named(load_pickle(file), model, names, path=file),
            lambda: summary(load_pickle(file, meta=True), file),
        ), None
    if (path / _SHARDED_OPTIMIZER / METADATA).is_file():
        saved = Saved.of(path / _SHARDED_OPTIMIZER)
        return saved.optimizer, saved.step
    if (path / _SHARDED_OPTIMIZER).is_dir() or any(path.glob(_PER_RANK_OPTIMIZER)):
        raise _only_ranks(path, _PER_RANK_OPTIMIZER)
    return None, None


def _only_ranks(path: Path, pattern: str) -> InputError:
    """What is there instead of one state: flat pieces that only the run's own processes can put together, or half a save."""
    ranks = sorted(path.glob(pattern))
    if not ranks:
        return InputError(
            f"{path} has a sharded FSDP checkpoint without {METADATA}",
            hint="the save did not finish, or its hidden file was not copied",
        )
    return InputError(
        f"{path} has a file for each rank ({ranks[0].name}), whose pieces do not say where in the parameters they belong",
        hint="resume and save with state_dict_type FULL_STATE_DICT, or SHARDED_STATE_DICT with use_dcp=True",
    )
