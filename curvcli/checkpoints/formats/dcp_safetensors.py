"""Weights that torch.distributed.checkpoint's HuggingFaceStorageWriter wrote: safetensors and an index, no config.json."""

from __future__ import annotations

from pathlib import Path

from curvcli.checkpoints.base import Checkpoint
from curvcli.checkpoints.formats.dcp import assemble
from curvcli.checkpoints.formats.huggingface import INDEX, HuggingFaceReader
from curvcli.errors import InputError
from curvcli.files.runs import step_order
from curvcli.files.safe import read_json
from curvcli.files.tensors import stored
from curvcli.models.base import Architecture

# The Trainer's own, which also saves weights without a config.json where the model is none of transformers'.
_OTHERS = ("config.json", "trainer_state.json", "optimizer.pt", "optimizer.safetensors")
_RANKS = "shard-*-model-*.safetensors"


class DCPSafetensorsReader:
    """model.safetensors.index.json and its shards without a config.json. The writer saves no optimizer."""

    def accepts(self, path: Path) -> bool:
        """Whether it is a directory of HuggingFaceStorageWriter's, consolidated or not."""
        if not path.is_dir() or any((path / name).exists() for name in _OTHERS):
            return False
        return (path / INDEX).is_file() or any(path.glob(_RANKS))

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """The consolidated checkpoint. Raises InputError where each rank's pieces are alone."""
        if not (path / INDEX).is_file():
            raise InputError(
                f"{path} has each rank's own pieces ({next(path.glob(_RANKS)).name}) and no {INDEX}",
                hint="save with HuggingFaceStorageWriter(..., save_distributed=True, enable_consolidation=True)",
            )
        tensors = HuggingFaceReader().tensors(path)
        files = {name: path / shard for name, shard in read_json(path / INDEX)["weight_map"].items()}
        step = step_order(path)[0]
        return assemble(
            path,
            architecture,
            format="dcp-safetensors",
            tensors=tensors,
            weights=lambda: stored(files),
            optimizer=None,
            step=step if step >= 0 else None,
            parts=lambda: stored(files),
        )
