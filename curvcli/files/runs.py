"""Runs: the checkpoints in a directory or behind a pattern, in step order."""

from __future__ import annotations

import re
from collections.abc import Callable
from glob import glob
from pathlib import Path

from curvcli.errors import InputError

Accepts = Callable[[Path], bool]

# Names begin a word, so that misstep-3 has no step; "ba" is Composer's count of batches.
_STEP = re.compile(r"(?:^|[^a-zA-Z])(?:step|iter|checkpoint|ckpt|ba)[=_-]?(\d{1,15})")
# Where a job's directory has its checkpoints in a folder of their own: torchtitan, Lightning.
_BELOW = ("checkpoint", "checkpoints")
# transformers 4.36 and 4.37 saved into tmp-checkpoint-N and renamed that; others write a suffix.
_ASIDE = re.compile(
    r"(?:^|[-_.])(?:te?mp|partial|incomplete|unfinished|staging|bak|backup|old|broken|corrupt(?:ed)?)\d*(?:[-_.]|$)|~$",
    re.IGNORECASE,
)
# What to do about one that was skipped, where there is something to measure.
AS_IT_IS = "; give its own path to measure it as it is"


def checkpoints_of(path: Path, accepts: Accepts) -> list[Path]:
    """The checkpoints meant by a path, in step order: itself, those of a run directory, or what a pattern matches.

    Raises:
        InputError: there is none, or the directory cannot be listed.
    """
    if not path.exists():
        # Only of what does not exist: a path with brackets in its name is meant as it is.
        found = [Path(p) for p in glob(str(path))] if any(c in str(path) for c in "*?[") else []  # noqa: PTH207
        if not found:
            if path.is_symlink():
                raise InputError(f"{path} is a link to nothing", hint="the checkpoint that it named is gone: name another")
            raise InputError(f"{path} does not exist", hint="give a checkpoint, a run directory or a pattern in quotes")
        return sorted((p for p in found if accepts(p)), key=step_order)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} is no regular file", hint="a pipe or device cannot be read twice: save it first")
    # Checkpoints inside come before the directory as one: the Trainer ends by saving the model into the run's own directory.
    for place in (path, *(path / name for name in _BELOW)):
        numbered = [p for p in _listing(place) if step_of(p) is not None and accepts(p)] if place.is_dir() else []
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
    """The step in a checkpoint's name: checkpoint-60, step-60, global_step60, epoch=0-step=60.ckpt, ep0-ba60-rank0.pt.

    A name that says its save is not finished, or set aside (tmp-checkpoint-90), has none.
    """
    stem = path.name if path.is_dir() else path.stem
    match = _STEP.search(stem)
    return int(match[1]) if match and not _aside(path) else None


def unfinished(run: Path, chosen: Path, accepts: Accepts) -> list[tuple[Path, str]]:
    """What lies in a run, is newer than a checkpoint by its number, and is none; each with the reason. Raises InputError."""
    # Only names of the same form say that a save of this kind was begun: logs and exports have numbers too.
    step, form = step_of(chosen), re.sub(r"\d+", "#", chosen.name)
    run = next((run / name for name in _BELOW if chosen.parent == run / name), run)
    found = []
    for path in sorted(_listing(run)) if run.is_dir() and step is not None else ():
        match = _STEP.search(path.name)
        if match is None or int(match[1]) <= (step or 0):
            continue
        if _aside(path):
            why = "its name is that of a save that did not finish or was set aside"
            found.append((path, why + AS_IT_IS * accepts(path)))
        elif re.sub(r"\d+", "#", path.name) == form and not accepts(path):
            found.append((path, "it holds no checkpoint"))
    return found


def _aside(path: Path) -> bool:
    return path.name.startswith(".") or _ASIDE.search(path.name) is not None


def _listing(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError as error:
        raise InputError(f"cannot list {path}: {error.strerror}", hint="check its permissions") from error
