"""Runs: the checkpoints in a directory or behind a pattern, in step order."""

from __future__ import annotations

import re
from collections.abc import Callable
from glob import glob
from pathlib import Path

from curvcli.errors import InputError

Accepts = Callable[[Path], bool]


def checkpoints_of(path: Path, accepts: Accepts) -> list[Path]:
    """The checkpoints meant by a path, in step order: itself, those of a run directory, or what a pattern matches.

    Raises:
        InputError: there is none, or the directory cannot be listed.
    """
    if not path.exists():
        found = [Path(p) for p in glob(str(path))] if any(c in str(path) for c in "*?[") else []  # noqa: PTH207
        if not found:
            raise InputError(f"{path} does not exist", hint="give a checkpoint, a run directory or a pattern in quotes")
        return sorted((p for p in found if accepts(p)), key=step_order)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} is no regular file", hint="a pipe or device cannot be read twice: save it first")
    numbered = [p for p in _listing(path) if step_of(p) is not None and accepts(p)]
    if numbered:
        return sorted(numbered, key=step_order)
    if accepts(path):
        return [path]
    single = path / "ckpt.pt"
    return [single] if single.exists() else []


def step_order(path: Path) -> tuple[int, str]:
    """What checkpoints are sorted by: the step in the name, then the path."""
    step = step_of(path)
    return (-1 if step is None else step, str(path))


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name: checkpoint-60, step-60, global_step60, epoch=0-step=60.ckpt, ckpt_60.pt."""
    stem = path.name if path.is_dir() else path.stem
    match = re.search(r"(?:step|iter|checkpoint|ckpt)[=_-]?(\d{1,15})", stem)
    return int(match[1]) if match else None


def _listing(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError as error:
        raise InputError(f"cannot list {path}: {error.strerror}", hint="check its permissions") from error
