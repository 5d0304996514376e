"""Architecture warm-up inside a training job: blocks are locked and join as the schedule says.

Source of the method: arXiv 2606.16768. The modules, the parameter groups and the graph stay as they
are, so that torch.compile does not compile again and DistributedDataParallel sees the same gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from curvcli.errors import CurvError, UnsupportedError, UsageError
from curvcli.inputs.networks.blocks import find_blocks, locate
from curvcli.results import Schedule, load_schedule
from curvcli.training.locks import Lock, find_locks, local

logger = logging.getLogger("curvcli")


class DeadBlockError(CurvError):
    """A block that may train and does not: its gradient is zero or its weights stand still."""


class Gauge(Protocol):
    """What adaptive mode asks: the curvature that the next phase would have (CurvatureTracker)."""

    def rho_with(self, names: frozenset[str]) -> float | None:
        """rho over what trains and the named parameters, by the last measurement; None where there is none."""
        ...


class ArchitectureWarmup:
    """Obeys a schedule in a PyTorch training loop.

        warmup = ArchitectureWarmup(model, optimizer, "schedule.json")
        for step in range(start, total):
            warmup.step(step)  # before the forward pass
            ...

    A locked block takes no update, no optimizer state, no decay and no share in gradient clipping:
    its gradients are zeroed as they are computed and dropped when the optimizer steps. What is locked is a pure
    function of the global step, so a resumed job needs the file and its step only.

    Args:
        model: bare, compiled, or wrapped in DistributedDataParallel or fully_shard.
        optimizer: over all parameters; its groups are not touched.
        schedule: a curv.schedule/1 document or its path.
        layers: the model's list of blocks; found by itself where there is one.
        outputs: paths within a block of the modules that write to the residual stream, where the
            architecture is not known.
        gauge: measures curvature (a CurvatureTracker); turns adaptive mode on: a phase begins when
            the measured rho with its blocks is under the schedule's margin, between its `step` and
            `latest`. Then `state_dict()` belongs into the job's checkpoints.
        margin: of adaptive mode, instead of the schedule's (0.8 where that has none).
        patience: updates with a positive learning rate after which a block that joined must have moved.

    Raises:
        UsageError: the schedule does not fit the model.
        UnsupportedError: no output projections are known for these blocks.
        DeadBlockError: from the optimizer's step, when a block that joined does not move.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule | Path | str,
        *,
        layers: nn.ModuleList | nn.Sequential | None = None,
        outputs: Sequence[str] | None = None,
        gauge: Gauge | None = None,
        margin: float | None = None,
        patience: int = 10,
    ) -> None:
        self.schedule = schedule if isinstance(schedule, Schedule) else load_schedule(Path(schedule))
        blocks = locate(model, layers) if layers is not None else find_blocks(model)
        if blocks is None or len(blocks.modules) != self.schedule.depth:
            depth = len(blocks.modules) if blocks else 0
            raise UsageError(
                f"the schedule is for depth {self.schedule.depth}, the model has {depth} blocks",
                hint=f"make one with curv schedule --depth {depth}" if depth else "pass layers=model.layers",
            )
        self.growing = self.schedule.mode == "grow"
        self.locks = find_locks(blocks, outputs, resting=self.growing)
        self.model, self.optimizer, self.gauge, self.patience = model, optimizer, gauge, patience
        self.margin = margin or self.schedule.margin or 0.8
        self.locked: frozenset[int] = frozenset()
        self.current: int | None = None
        self.started: list[int] = []  # in adaptive mode: the step at which each phase began
        self._watches: list[_Watch] = []
        self._handles: list[Any] = []
        self._attach()

    @property
    def active_depth(self) -> int:
        """Blocks that train."""
        return self.schedule.depth - len(self.locked)

    def step(self, step: int) -> None:
        """Say which global step comes: locks and unlocks what the schedule wants for its update.

        Call it before the step's forward pass. Under gradient accumulation `step` counts updates.
        """
        if self.current is None:
            self._begin(step)
        wanted = self._wanted(step)
        joining = sorted(self.locked - wanted)
        self.locked, self.current = wanted, step
        if joining:
            logger.info("step %d: blocks %s join, %d of %d train", step, joining, self.active_depth, self.schedule.depth)
            self._watches += [_Watch(self.locks[i], self.growing) for i in joining]

    def locked_parameters(self) -> frozenset[str]:
        """Names, in the model, of the parameters that may not move now."""
        return self._names(self.locked)

    def next_parameters(self, step: int, horizon: int = 100) -> frozenset[str]:
        """Adaptive mode: names of the parameters that join next, from `horizon` steps before they may."""
        phase = len(self.started)
        if self.gauge is None or phase >= len(self.schedule.phases) or step < self.schedule.phases[phase].step - horizon:
            return frozenset()
        return self._names(frozenset(self.schedule.phases[phase].unlock))

    def state_dict(self) -> dict[str, Any]:
        """Adaptive mode's decisions: the step at which each phase began."""
        return {"started": list(self.started)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Repeat the decisions of the job that is resumed. Call it before the first `step`."""
        self.started = [int(step) for step in state["started"]]

    def detach(self) -> None:
        """Let go of model and optimizer; nothing is locked any longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.locked = frozenset()

    def _begin(self, step: int) -> None:
        """Make locked blocks identities in a fresh run; see that they are in a resumed one."""
        if self.gauge is not None and not self.started:
            if step > self.schedule.phases[0].step:
                raise UsageError(
                    f"adaptive mode resumes at step {step} without the decisions of the job before",
                    hint="save warmup.state_dict() with the checkpoint and load it",
                )
            self.started = [self.schedule.phases[0].step]
        wanted = self._wanted(step)
        if not self.growing:
            return
        fresh = step <= self.schedule.phases[0].step
        if fresh and any(self.optimizer.state.values()):
            raise UsageError(
                f"step {step} begins the schedule, but the optimizer has taken steps: blocks would lose what they learned",
                hint="pass the global step of the resumed run",
            )
        for index in sorted(wanted):
            lock = self.locks[index]
            if fresh:
                lock.close()
                self._prove(lock)
            elif moved := lock.moved():
                raise UsageError(
                    f"block {index} is locked at step {step} and its {moved[0]} is not at rest",
                    hint="load the checkpoint's weights first, and use the schedule that the run began with",
                )

    def _prove(self, lock: Lock) -> None:
        """At its first forward pass the block's output must be its input, or its projections were misjudged."""
        if hasattr(self.model, "_orig_mod") or any(m._compiled_call_impl is not None for m in self.model.modules()):
            return  # a hook would change the compiled graph; `curv schedule verify` gives the same proof

        def compare(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            handle.remove()
            hidden = args[0] if args else kwargs.get("hidden_states")
            result = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and lock.index in self.locked and not torch.equal(hidden, result):
                raise UnsupportedError(
                    f"block {lock.index}, a {type(block).__name__}, is no identity with {lock.resting[0][0]} at rest",
                    hint="name what writes to its residual stream: outputs=['attn.proj', 'mlp.fc2']; "
                    "a block that normalises the stream itself (BERT) cannot be one",
                )

        handle = lock.block.register_forward_hook(compare, with_kwargs=True)

    def _wanted(self, step: int) -> frozenset[int]:
        if self.gauge is None:
            return self.schedule.locked_at(step)
        phases = self.schedule.phases
        while (phase := len(self.started)) < len(phases) and step >= phases[phase].step:
            rho = self.gauge.rho_with(self._names(frozenset(phases[phase].unlock)))
            allowed = rho is not None and rho <= self.margin
            if not _agreed(allowed or step >= phases[phase].latest, self.model):
                break
            why = f"rho {rho:.3g} with it is within {self.margin:g}" if allowed else f"latest step {phases[phase].latest}"
            logger.info("step %d: phase %d begins, %s", step, phase, why)
            self.started.append(step)
        begun = sum(1 for began in self.started if began <= step)
        return frozenset(range(self.schedule.depth)) - frozenset(phases[max(begun - 1, 0)].active)

    def _names(self, indices: frozenset[int]) -> frozenset[str]:
        inside = {id(p) for i in indices for p in self.locks[i].parameters.values()}
        return frozenset(n for n, p in self.model.named_parameters() if id(p) in inside)

    def _attach(self) -> None:
        for lock in self.locks:
            for parameter in lock.parameters.values():
                if hasattr(parameter, "to_local"):
                    # A sharded gradient is set by fully_shard after its reduction, past a tensor's own hooks.
                    hook = partial(self._zero_sharded, lock.index)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
                else:
                    self._handles.append(parameter.register_hook(partial(self._zero, lock.index)))
        self._handles.append(self.optimizer.register_step_pre_hook(self._before_update))
        self._handles.append(self.optimizer.register_step_post_hook(self._after_update))

    def _zero(self, index: int, gradient: Tensor) -> Tensor | None:
        # zeros, not gradient * 0: an overflow in a locked block is no concern of the others
        return torch.zeros_like(gradient) if index in self.locked and not _measuring else None

    def _zero_sharded(self, index: int, parameter: Tensor) -> None:
        if index in self.locked and parameter.grad is not None:
            parameter.grad.zero_()

    def _before_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.current is None:
            raise UsageError(
                "the optimizer steps before the schedule was told the step", hint="call warmup.step(step) first"
            )
        for index in self.locked:
            for parameter in self.locks[index].parameters.values():
                parameter.grad = None
        for watch in self._watches:
            watch.see_gradients()

    def _after_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._watches or not any(float(group["lr"]) > 0 for group in optimizer.param_groups):
            return
        for watch in self._watches:
            watch.updates += 1
        self._watches = [w for w in self._watches if not w.alive()]
        for watch in self._watches:
            if watch.updates >= self.patience:
                since = f"joined {watch.updates} updates before step {self.current}"
                raise DeadBlockError(
                    f"block {watch.lock.index} {since}: {watch.complaint()}",
                    hint="check that its weights are not all zero, require gradients and are in the optimizer",
                )


class _Watch:
    """Sees whether a block that joined comes alive: its outputs move, and a gradient comes through them."""

    SAMPLE = 65536

    def __init__(self, lock: Lock, growing: bool) -> None:
        self.lock, self.updates = lock, 0
        here = {n: p for n, p in lock.parameters.items() if local(p).numel()}  # of a sharded block, this rank's part
        matrices = {n: p for n, p in here.items() if p.dim() >= 2}
        outputs = {n: p for n, p, _ in lock.resting if n in here} if growing else matrices or here
        waiting = {n: p for n, p in outputs.items() if n in matrices} or outputs
        self.before = {n: (p, self._sample(p)) for n, p in waiting.items()}
        self.inner = [p for n, p in matrices.items() if n not in waiting] if growing else []
        self.learning = not self.inner

    def see_gradients(self) -> None:
        """Note whether a gradient reached the matrices behind the outputs; called before an update."""
        self.learning = self.learning or any(p.grad is not None and bool((local(p.grad) != 0).any()) for p in self.inner)

    def still(self) -> list[str]:
        """Outputs that have not moved, by kind: of many experts, some may wait for their first token."""
        moved = {_kind(n) for n, (p, sample) in self.before.items() if not torch.equal(sample, self._sample(p))}
        return [n for n in self.before if _kind(n) not in moved]

    def alive(self) -> bool:
        return self.learning and not self.still()

    def complaint(self) -> str:
        still = self.still()
        return f"its {still[0]} has not moved" if still else "no gradient has come through its outputs"

    def _sample(self, parameter: Tensor) -> Tensor:
        flat = local(parameter).reshape(-1)
        return flat[:: max(1, flat.numel() // self.SAMPLE)].clone()


def _kind(name: str) -> str:
    """A parameter's name without the indices of experts."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


_measuring = False


@contextmanager
def measuring() -> Iterator[None]:
    """Within it, gradients of locked blocks are left as they are: a tracker looks at what would join."""
    global _measuring
    before, _measuring = _measuring, True
    try:
        yield
    finally:
        _measuring = before


def _agreed(decision: bool, model: nn.Module) -> bool:
    """Rank 0's decision, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decision
    flag = torch.tensor(float(decision), device=next(model.parameters()).device)
    torch.distributed.broadcast(flag, src=0)
    return bool(flag)
