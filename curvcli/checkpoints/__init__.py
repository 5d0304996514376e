"""Files to problems: checkpoint readers, shard readers, the model and its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from curvcli.checkpoints.arguments import smoothed
from curvcli.checkpoints.base import Checkpoint, warning
from curvcli.checkpoints.formats import READERS
from curvcli.checkpoints.records import with_records
from curvcli.documents import LOG_NAME, Finding
from curvcli.errors import InputError
from curvcli.files.remote import checkpoints_behind, fetched
from curvcli.files.runs import AS_IT_IS, checkpoints_of, step_of, unfinished
from curvcli.models.base import Architecture

__all__ = ["fetched", "find_checkpoints", "newest_complete", "open_checkpoint", "passed_over", "step_of"]

_LOOK = 8  # checkpoints of a run that are looked at for one that is complete: behind a URL each is fetched for it


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run directory, a pattern, or the one checkpoint given, in step order. Raises InputError.

    Those of a run behind a URL are URLs, which `fetched` and `open_checkpoint` fetch one at a time.
    """
    return checkpoints_behind(path) or _local(fetched(path))


def open_checkpoint(path: Path, architecture: Architecture | None = None) -> Checkpoint:
    """Headers of the checkpoint that a path means; of a run, of the newest that is complete. Raises InputError.

    Args:
        architecture: the network, where the user names it; else it is found beside the weights.
    """
    found = find_checkpoints(path)
    if len(found) > 1:
        checkpoint, skipped = _newest(found, architecture)
    else:
        checkpoint, skipped = _read(fetched(found[0]), architecture), []
    # Named by its own path it is measured as it is: one before it that is complete is told of, and not taken.
    if found == [path]:
        return _with_findings(
            checkpoint, [_incomplete(checkpoint, older) for older in _older(path, checkpoint, architecture)]
        )
    return _with_findings(checkpoint, _skipped(skipped + unfinished(path, checkpoint.path, _known)))


def newest_complete(found: list[Path], architecture: Architecture | None = None) -> int:
    """Place of the newest complete checkpoint among those of a run. Raises InputError where none can be read."""
    return len(found) - 1 - len(_newest(found, architecture)[1])


def _skipped(skipped: Sequence[tuple[Path, str]]) -> list[Finding]:
    """Findings on what is newer than the checkpoint that was taken."""
    return [warning("skipped-checkpoint", f"{path} is newer and was skipped: {why}") for path, why in skipped]


def passed_over(path: Path, found: Sequence[Path]) -> list[Finding]:
    """Findings on what lies in a run and is newer than its last checkpoint, and is none. Raises InputError."""
    return _skipped(unfinished(path, found[-1], _known))


def _newest(found: list[Path], architecture: Architecture | None) -> tuple[Checkpoint, list[tuple[Path, str]]]:
    """The newest complete checkpoint and those newer than it, newest first, with what is wrong with each.

    One without optimizer state counts as complete where none of the newest has any.
    """
    skipped: list[tuple[Path, str]] = []
    bare: tuple[Checkpoint, int] | None = None
    damaged: InputError | None = None
    for path in found[: -_LOOK - 1 : -1]:  # newest first
        local = fetched(path)
        try:
            checkpoint = _read(local, architecture)
            if checkpoint.optimizer is not None:
                checkpoint.optimizer.summary()  # reads its headers
        except InputError as error:
            damaged = damaged or error
            skipped.append((path, error.message))
            continue
        if checkpoint.optimizer is not None:
            return checkpoint, skipped
        # Perhaps no checkpoint of the run has state, and then the newest is meant: that shows only at the end.
        bare = bare or (checkpoint, len(skipped))
        why = "it has no optimizer state, and checkpoints before it have: a save that did not finish looks so"
        skipped.append((path, why + AS_IT_IS))
    if bare is not None:
        return bare[0], skipped[: bare[1]]
    raise damaged or InputError(f"{found[-1]} cannot be read", hint="give another checkpoint")


def _older(path: Path, checkpoint: Checkpoint, architecture: Architecture | None) -> list[Path]:
    """A checkpoint before this one that has optimizer state, where this one has none."""
    step = step_of(path)
    if checkpoint.optimizer is not None or step is None:
        return []
    with suppress(InputError):
        before = [p for p in checkpoints_of(path.absolute().parent, _known) if (step_of(p) or 0) < step]
        if before and (older := _newest(before, architecture)[0]).optimizer is not None:
            return [older.path]
    return []


def _incomplete(checkpoint: Checkpoint, older: Path) -> Finding:
    what = (
        f"{checkpoint.path.name} has no optimizer state, and {older.name} beside it has: a save that did not finish looks so"
    )
    return warning("incomplete-checkpoint", what)


def _with_findings(checkpoint: Checkpoint, findings: Sequence[Finding]) -> Checkpoint:
    return replace(checkpoint, findings=(*findings, *checkpoint.findings))


def _read(path: Path, architecture: Architecture | None) -> Checkpoint:
    for reader in READERS:
        if reader.accepts(path):
            checkpoint = with_records(reader.read(path, architecture))
            return replace(checkpoint, findings=(*checkpoint.findings, *smoothed(checkpoint.path)))
    hint = "docs/how-to/checkpoints.md has the formats"
    if path.name == LOG_NAME:
        hint = "it is a job's log, which curv watch and curv report show: give a checkpoint or the run's directory"
    raise InputError(f"{path} is in no known checkpoint format", hint=hint)


def _known(path: Path) -> bool:
    return any(reader.accepts(path) for reader in READERS)


def _local(path: Path) -> list[Path]:
    found = checkpoints_of(path, _known)
    if not found:
        raise InputError(
            f"{path} holds no checkpoint that is known (checkpoint-N, config.json, .metadata, .pt, .ckpt, ...)",
            hint="docs/how-to/checkpoints.md has the formats; point at a checkpoint or a run directory",
        )
    return found
