"""curv in Lightning: `Trainer(callbacks=[CurvCallback("schedule.json")])`. Needs the extra `curvcli[lightning]`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from curvcli.errors import UsageError
from curvcli.training.callbacks import Callbacks


class CurvCallback(Callback):
    """Architecture warm-up, the curvature tracker, or both. Arguments are those of `Callbacks`.

    `loss(module, batch)` takes the LightningModule. Its state goes into Lightning's own checkpoints. One optimizer.
    """

    def __init__(self, schedule: Any = None, **options: Any) -> None:
        self.callbacks = Callbacks(schedule, **options)
        self.measured = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins at the Trainer's global step. Raises UsageError where the module has not exactly one optimizer."""
        if len(trainer.optimizers) != 1:
            raise UsageError(f"the module has {len(trainer.optimizers)} optimizers", hint="curv follows one")
        self.measured = trainer.global_step
        self.callbacks.begin(pl_module, trainer.optimizers[0], trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Tells the warm-up the global step before the forward pass."""
        self.callbacks.before(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tells the tracker a step and its loss, once for each update of the weights."""
        # Under gradient accumulation most batches end without an update.
        if trainer.global_step > self.measured:
            self.measured = trainer.global_step
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            self.callbacks.after(trainer.global_step, float(loss) if loss is not None else None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Takes the warm-up off the model."""
        self.callbacks.end()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed job needs; Lightning writes it into its checkpoint."""
        return self.callbacks.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; it has its effect when training starts."""
        self.callbacks.load_state_dict(state_dict)
