"""Files to problems: checkpoint readers, shard readers, the model and its blocks."""

from __future__ import annotations

from pathlib import Path

from curvcli.errors import InputError
from curvcli.inputs.base import Architecture, Checkpoint
from curvcli.inputs.formats import READERS
from curvcli.inputs.remote import checkpoints_behind, fetched
from curvcli.inputs.runs import checkpoints_of, step_of

__all__ = ["fetched", "find_checkpoints", "open_checkpoint", "step_of"]


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run directory, a pattern, or the one checkpoint given, in step order. Raises InputError.

    Those of a run behind a URL are URLs, which `fetched` and `open_checkpoint` fetch one at a time.
    """
    return checkpoints_behind(path) or _local(fetched(path))


def open_checkpoint(path: Path, architecture: Architecture | None = None) -> Checkpoint:
    """Headers of the checkpoint that a path means, the newest of a run. Raises InputError.

    Args:
        architecture: the network, where the user names it; else it is found beside the weights.
    """
    found = _local(fetched(path))[-1]
    for reader in READERS:
        if reader.accepts(found):
            return reader.read(found, architecture)
    raise InputError(f"{found} is in no known checkpoint format", hint="docs/checkpoints.md has the formats")


def _local(path: Path) -> list[Path]:
    found = checkpoints_of(path, lambda candidate: any(reader.accepts(candidate) for reader in READERS))
    if not found:
        raise InputError(
            f"{path} holds no checkpoint that is known (checkpoint-N, config.json, .metadata, .pt, .ckpt, ...)",
            hint="docs/checkpoints.md has the formats; point at a checkpoint or a run directory",
        )
    return found
