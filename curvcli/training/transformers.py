"""curv in the transformers Trainer: `Trainer(..., callbacks=[CurvCallback("schedule.json")])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from curvcli.errors import UsageError
from curvcli.training.callbacks import Callbacks

STATE = "curv.pt"


class CurvCallback(TrainerCallback):
    """Architecture warm-up, the curvature tracker, or both. Arguments are those of `Callbacks`.

    Steps are the Trainer's global steps: a record of step n is of the model after n updates. What a resumed
    job needs is in `checkpoint-N/curv.pt`.
    """

    def __init__(self, schedule: Any = None, **options: Any) -> None:
        self.callbacks = Callbacks(schedule, **options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins at the Trainer's global step, and in a resumed job takes up the state in the checkpoint.

        Raises UsageError where adaptive mode resumes and its state is missing.
        """
        # accelerate wraps the optimizer, and its hooks are those of what is inside.
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        if state.global_step:
            saved = _checkpoint(args, state) / STATE
            if saved.is_file():
                # Only tensors and plain values are loaded: a checkpoint is untrusted, and nothing in it may run.
                self.callbacks.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
            elif self.callbacks.adaptive:
                raise UsageError(
                    f"adaptive mode resumes at step {state.global_step}, and {saved} is missing",
                    hint="resume in the run's own output_dir, from a checkpoint that this callback saw",
                )
        self.callbacks.begin(kwargs["model"], optimizer, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells the warm-up the global step before the forward pass."""
        self.callbacks.before(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells the tracker the step, and the loss that the Trainer logged last."""
        # From the end: the history grows with the run, and this is called at every step.
        loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        self.callbacks.after(state.global_step, loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the warm-up off the model."""
        self.callbacks.end()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes `curv.pt` into the checkpoint, whole or not at all; on the main process alone."""
        if state.is_world_process_zero:
            target = _checkpoint(args, state) / STATE
            torch.save(self.callbacks.state_dict(), target.with_suffix(".tmp"))
            target.with_suffix(".tmp").replace(target)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
