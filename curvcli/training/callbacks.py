"""Architecture warm-up and tracker as one callback that the trainers' callbacks translate their events to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.curvature.precision import mapped
from curvcli.curvature.problem import Loss
from curvcli.documents import Schedule
from curvcli.errors import UsageError
from curvcli.training.found import rank
from curvcli.training.tracker import CurvatureTracker
from curvcli.training.warmup import ArchitectureWarmup

_TRACKERS = {
    "weights", "tolerance", "update_ratio", "gradient_quotient", "attention", "spectral_norms", "sinks", "alerts",
    "reaction", "seed",
}  # fmt: skip


class Callbacks:
    """What a callback holds.

    Args:
        schedule: a curv.schedule/1 document or its path; None for the tracker alone.
        probe: frozen batches to measure curvature on; None for architecture warm-up alone.
        loss: `loss(model, batch)`, the mean loss of a batch; for transformers models their own.
        every: measure every so many steps, whatever that costs; in adaptive mode 10 by default.
        max_overhead: instead of `every`: seconds of measuring for each second of training, at most; 0.05 where neither is
            given. The tracker chooses how often, and how many batches of the probe.
        max_hvps: products that one measurement may take.
        log: JSONL file for the records; `curv watch` shows it.
        adaptive: let the measured rho decide when a phase begins, within the schedule's bounds.
        outputs: as ArchitectureWarmup's.
        more: CurvatureTracker's, by name: weights, tolerance, update_ratio, gradient_quotient, attention, spectral_norms,
            sinks, alerts, reaction, seed.

    Raises:
        UsageError: arguments that contradict each other.
    """

    def __init__(
        self,
        schedule: Schedule | Path | str | None = None,
        *,
        probe: Sequence[Any] | None = None,
        loss: Loss | None = None,
        every: int | None = None,
        max_overhead: float | None = None,
        max_hvps: int = 20,
        log: Path | str | None = None,
        adaptive: bool = False,
        outputs: Sequence[str] | None = None,
        **more: Any,
    ) -> None:
        if schedule is None and probe is None:
            raise UsageError("there is nothing to do", hint="pass a schedule, a probe to measure on, or both")
        if adaptive and (schedule is None or probe is None):
            raise UsageError("adaptive mode needs a schedule and a probe", hint="pass both")
        self.schedule, self.probe, self.loss = schedule, probe, loss or own_loss
        if adaptive and max_overhead is not None:
            raise UsageError("adaptive mode measures at fixed steps", hint="pass every=, and not max_overhead=")
        if every is not None and max_overhead is not None:
            raise UsageError("every and max_overhead both say when to measure", hint="pass one of them")
        if unknown := sorted(set(more) - _TRACKERS):
            raise UsageError(f"there is no option {unknown[0]}", hint=f"one of: {', '.join(sorted(_TRACKERS))}")
        self.every = 10 if adaptive and every is None else every
        self.max_overhead = 0.05 if self.every is None and max_overhead is None else max_overhead
        self.max_hvps, self.log, self.more = max_hvps, log, more
        self.adaptive, self.outputs = adaptive, outputs
        self.warmup: ArchitectureWarmup | None = None
        self.tracker: CurvatureTracker | None = None
        self._restored: Mapping[str, Any] | None = None

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Before the first forward pass, weights and optimizer as they will be trained on."""
        self.end()  # of a fit before, with the same callback
        if self.probe is not None:
            device = next(model.parameters()).device
            probe = [mapped(batch, lambda tensor: tensor.to(device)) for batch in self.probe]
            self.tracker = CurvatureTracker(
                model,
                optimizer,
                self.loss,
                probe=probe,
                every=self.every,
                max_overhead=self.max_overhead,
                max_hvps=self.max_hvps,
                log=self.log if rank() == 0 else None,
                split=True,  # trainers call back on every rank
                **self.more,
            )
        if self.schedule is not None:
            rho_source = self.tracker if self.adaptive else None
            self.warmup = ArchitectureWarmup(model, optimizer, self.schedule, outputs=self.outputs, rho_source=rho_source)
            if self.tracker is not None:
                self.tracker.warmup = self.warmup  # afterwards, as each wants the other
        # Trainers load a callback's state before there is a model to make warm-up and tracker for.
        if self._restored is not None:
            if self.warmup is not None:
                self.warmup.load_state_dict(self._restored["warmup"])
            if self.tracker is not None:
                self.tracker.load_state_dict(self._restored["tracker"])
            self._restored = None
        self.before(step)

    def before(self, step: int) -> None:
        """Before the forward pass of a global step."""
        if self.warmup is not None:
            self.warmup.step(step)

    def after(self, step: int, loss: float | None) -> None:
        """After the optimizer's and the scheduler's step."""
        if self.tracker is not None:
            self.tracker.step(step, loss=loss)

    def end(self) -> None:
        """After the last step: what the job does with the model from here on is its own affair."""
        if self.warmup is not None:
            self.warmup.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed job needs of the warm-up and the tracker: the argument of `load_state_dict`."""
        return {
            "warmup": self.warmup.state_dict() if self.warmup is not None else {"started": []},
            "tracker": self.tracker.state_dict() if self.tracker is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Kept until `begin`."""
        self._restored = state


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model returns for a batch with labels."""
    return model(**batch).loss  # type: ignore[no-any-return]
