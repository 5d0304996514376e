"""Weights that torch.distributed.checkpoint's HuggingFaceStorageWriter wrote: safetensors and an index, no config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from curvcli.errors import InputError
from curvcli.inputs.base import Architecture, Checkpoint
from curvcli.inputs.formats.dcp import assemble
from curvcli.inputs.formats.huggingface import INDEX, HuggingFaceReader
from curvcli.inputs.runs import step_order
from curvcli.inputs.safe import read_json

# The Trainer's own, which also saves weights without a config.json where the model is none of transformers'.
_OTHERS = ("config.json", "trainer_state.json", "optimizer.pt", "optimizer.safetensors")
_RANKS = "shard-*-model-*.safetensors"


class DCPSafetensorsReader:
    """model.safetensors.index.json and its shards without a config.json. The writer saves no optimizer."""

    def accepts(self, path: Path) -> bool:
        if not path.is_dir() or any((path / name).exists() for name in _OTHERS):
            return False
        return (path / INDEX).is_file() or any(path.glob(_RANKS))

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
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
            weights=lambda: _Shards(files),
            optimizer=None,
            step=step if step >= 0 else None,
        )


class _Shards(Mapping[str, Tensor]):
    """Tensors of several files, read one at a time."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        try:
            with safe_open(self._files[name], framework="pt") as handle:
                return handle.get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self._files[name]}: {name} cannot be read: {error}", hint="copy the file again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
