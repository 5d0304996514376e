"""Files to problems: checkpoint readers, shard readers, configuration, the model and its blocks."""

from __future__ import annotations

import re
from pathlib import Path

from curvcli.errors import InputError
from curvcli.inputs.base import Checkpoint, CheckpointReader
from curvcli.inputs.huggingface import HuggingFaceReader
from curvcli.inputs.nanogpt import NanoGPTReader

READERS: tuple[CheckpointReader, ...] = (HuggingFaceReader(), NanoGPTReader())


def resolve(path: Path) -> Path:
    """The checkpoint meant by a path: itself, or the newest of a run directory. Raises InputError."""
    if not path.exists():
        raise InputError(f"{path} does not exist", hint="give a checkpoint or a run directory")
    if path.is_file():
        return path
    steps = [(int(m[1]), p) for p in _listing(path) if p.is_dir() and (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    if steps:
        return max(steps)[1]
    if (path / "config.json").exists():
        return path
    if (path / "ckpt.pt").exists():
        return path / "ckpt.pt"
    raise InputError(
        f"{path} holds no checkpoint (no checkpoint-N, no config.json, no ckpt.pt)",
        hint="point at a transformers checkpoint, a run directory, or a nanoGPT ckpt.pt",
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """Headers of the checkpoint that a path means. Raises InputError."""
    found = resolve(path)
    for reader in READERS:
        if reader.accepts(found):
            return reader.read(found)
    raise InputError(
        f"{found} is in no known checkpoint format", hint="known: transformers directories and nanoGPT .pt files"
    )


def _listing(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError as error:
        raise InputError(f"cannot list {path}: {error.strerror}", hint="check its permissions") from error
