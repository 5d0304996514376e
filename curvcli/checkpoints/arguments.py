"""What transformers' Trainer was told, as training_args.bin beside its checkpoints has it."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, cos, isfinite, pi
from pathlib import Path
from typing import Any

from curvcli.documents import Finding
from curvcli.errors import InputError
from curvcli.files.foreign import Foreign
from curvcli.files.safe import load_pickle, read_json

ARGUMENTS = "training_args.bin"
SMOOTHED = "label-smoothing"


def arguments(directory: Path) -> dict[str, Any]:
    """The arguments by name; none where the file is not there, not to be read, or another class's."""
    file = directory / ARGUMENTS
    try:
        found = load_pickle(file) if file.is_file() else None
    except (InputError, OSError):  # of classes that are not known: nothing is said of the run then
        return {}
    return dict(found.attributes) if isinstance(found, Foreign) else {}


def smoothed(path: Path) -> list[Finding]:
    """A warning where the Trainer smoothed labels, which no loss here does.

    Args:
        path: the checkpoint. A DeepSpeed directory or one file has the arguments beside it.
    """
    where = next((place for place in (path, path.parent) if (place / ARGUMENTS).is_file()), None)
    share = arguments(where).get("label_smoothing_factor") if where else None
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        return []
    what = (
        f"the run's loss smoothed labels by {share:.3g} ({ARGUMENTS}), and the losses of --loss do not: curvature of the "
        "plain cross-entropy is another, and rho with it; pass --loss package.module:function of a function that smooths "
        f"them, as torch's cross_entropy(..., label_smoothing={share:.3g})"
    )
    return [Finding(code=SMOOTHED, severity="warning", message=what)]


def last_step_lr(path: Path) -> float | None:
    """Learning rate of a finished run's last step, by its arguments: of the linear and the cosine schedule, which end at 0.

    As transformers.get_scheduler has it (tests/checkpoints/test_ended.py compares both). None where the run has not come to
    its end, or the record does not say: of another schedule, or one with arguments of its own.

    Args:
        path: directory of the arguments and of the trainer_state.json, which has the number of steps.
    """
    try:
        state = read_json(path / "trainer_state.json")
    except (InputError, OSError):
        return None
    steps, done = (
        (_count(state.get(key)) for key in ("max_steps", "global_step")) if isinstance(state, dict) else (None, None)
    )
    said = arguments(path)
    peak, warmup, kind = said.get("learning_rate"), _warmup(said, steps), said.get("lr_scheduler_type")
    name = kind.arguments[0] if isinstance(kind, Foreign) and kind.arguments else kind
    if not (steps and done and done >= steps) or warmup is None or said.get("lr_scheduler_kwargs"):
        return None
    if not isinstance(peak, float) or not isfinite(peak) or peak <= 0 or warmup >= steps:
        return None
    left = 1 / (steps - warmup)  # of the decay, before the last step; all of it where there is one step alone
    if name == "linear":
        return peak * left
    return peak * 0.5 * (1 + cos(pi * (1 - left))) if name == "cosine" else None


def _warmup(said: Mapping[str, Any], steps: int | None) -> int | None:
    """Steps of warm-up: transformers 5 takes a share of all steps as a number below 1, versions before by another name."""
    given, share = said.get("warmup_steps", 0), said.get("warmup_ratio") or 0
    numbers = (int, float)
    if not isinstance(given, numbers) or not isinstance(share, numbers) or not (given >= 0 and 0 <= share <= 1):
        return None
    if given >= 1:
        return int(given) if given < 2**53 else None
    return ceil((steps or 0) * max(given, share))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53 else None
