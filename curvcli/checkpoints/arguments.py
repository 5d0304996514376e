"""What transformers' Trainer was told, as training_args.bin beside its checkpoints has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curvcli.documents import Finding
from curvcli.errors import InputError
from curvcli.files.foreign import Foreign
from curvcli.files.safe import load_pickle

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
