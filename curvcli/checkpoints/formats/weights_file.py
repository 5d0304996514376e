"""A file of weights given as the path itself: one .safetensors, or transformers' pytorch_model.bin."""

from __future__ import annotations

import re
from pathlib import Path

from curvcli.checkpoints.base import Checkpoint
from curvcli.checkpoints.formats.dcp import assemble
from curvcli.checkpoints.formats.huggingface import BIN, HuggingFaceReader
from curvcli.checkpoints.formats.torchfile import TorchFileReader
from curvcli.errors import InputError
from curvcli.files.runs import step_of
from curvcli.files.tensors import safetensors_header, stored
from curvcli.models.base import Architecture

# One of one is whole.
_SHARD = re.compile(r".+-\d{5}-of-(?!00001\.)\d{5}\.(?:safetensors|bin)")


class WeightsFileReader:
    """The checkpoint whose only weights the file is, with what lies beside it; else the file's weights alone."""

    def accepts(self, path: Path) -> bool:
        """Whether it is a file of weights alone, safetensors or `pytorch_model.bin`."""
        return path.is_file() and (
            path.suffix == ".safetensors" or path.name == BIN or _SHARD.fullmatch(path.name) is not None
        )

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """Its directory's checkpoint where that holds no other weights, else the weights alone. Raises InputError."""
        if _SHARD.fullmatch(path.name):
            raise InputError(f"{path} is one shard of several", hint="give its directory, which has all of them")
        if self._is_its_directory(path, architecture):
            return HuggingFaceReader().read(path.parent, architecture)
        if path.suffix != ".safetensors":
            return TorchFileReader().read(path, architecture)
        tensors = safetensors_header(path)
        return assemble(
            path,
            architecture,
            format="safetensors",
            tensors=tensors,
            weights=lambda: stored({tensor.name: path for tensor in tensors}),
            optimizer=None,
            step=step_of(path),
            parts=lambda: stored({tensor.name: path for tensor in tensors}),
        )

    def _is_its_directory(self, path: Path, architecture: Architecture | None) -> bool:
        """Whether the file is what transformers would read there: then its optimizer, log and tokenizer count too."""
        described = architecture is not None or (path.parent / "config.json").is_file()
        return described and path.name in ("model.safetensors", BIN) and [*HuggingFaceReader().files(path.parent)] == [path]
