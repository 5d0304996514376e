"""What a checkpoint does not say of its run, from what lies beside it: a tracker's log, and the run's arguments."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from pathlib import Path

from curvcli.checkpoints.arguments import last_step_lr
from curvcli.checkpoints.base import Checkpoint, Logged, warning
from curvcli.documents import LOG_NAME, Finding, Record, load_records
from curvcli.errors import InputError


def with_records(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the log that a tracker wrote, where it has none of its own, and its last step's learning rate.

    The log is `curvature.jsonl` in the checkpoint or in the directory that it lies in, up to the checkpoint's step: without
    one, nothing says which records are of its run. A log that cannot be read is a finding.
    """
    if not checkpoint.log and checkpoint.step is not None and (file := _beside(checkpoint.path)) is not None:
        try:
            records = load_records(file).records
        except InputError as error:
            return _told(checkpoint, warning("unread-log", f"{file} was not read: {error.message}"))
        log = tuple(_logged(record) for record in records if record.step <= checkpoint.step)
        log = tuple(entry for entry in log if entry.loss is not None or entry.lr is not None or entry.non_finite)
        if log:
            said = f"losses and learning rates of the run are those that a tracker wrote to {file}"
            checkpoint = _told(replace(checkpoint, log=log), Finding(code="tracker-log", severity="info", message=said))
    if checkpoint.last_lr is not None:
        return checkpoint
    # DeepSpeed's own directory lies inside of the Trainer's.
    found = (last_step_lr(home) for home in (checkpoint.path, checkpoint.path.parent))
    return replace(checkpoint, ended_lr=next((lr for lr in found if lr is not None), None))


def _beside(path: Path) -> Path | None:
    return next((file for file in (path / LOG_NAME, path.parent / LOG_NAME) if file.is_file()), None)


def _logged(record: Record) -> Logged:
    finite = record.loss is not None and isfinite(record.loss)
    return Logged(record.step, record.loss if finite else None, record.lr, record.loss_finite is False)


def _told(checkpoint: Checkpoint, finding: Finding) -> Checkpoint:
    return replace(checkpoint, findings=(*checkpoint.findings, finding))
