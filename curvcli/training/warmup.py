"""Architecture warm-up inside a training job: blocks are locked and join as the schedule says.

Source of the method: arXiv 2606.16768. The modules, the parameter groups and the graph stay as they
are, so that torch.compile does not compile again and DistributedDataParallel sees the same gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from curvcli.documents import Schedule, load_schedule
from curvcli.errors import UsageError
from curvcli.judge.limits import STABLE_BELOW
from curvcli.models.blocks import find_blocks, locate
from curvcli.training.alive import DeadBlockError, Stillness, Watch
from curvcli.training.gates import Gate
from curvcli.training.identity import prove
from curvcli.training.locks import check_shared, find_locks
from curvcli.training.updates import bare, follow, following, has_stepped, held, unfollow

logger = logging.getLogger("curvcli")


class RhoSource(Protocol):
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
    its gradients are zeroed as they are computed and dropped when an optimizer steps, or has called its closure. What
    is locked is a pure function of the global step, so a resumed job needs the file and its step only.

    Args:
        model: bare, compiled, or wrapped in DistributedDataParallel or fully_shard.
        optimizer: over all parameters, or a list of optimizers that are so together; their groups are not touched.
        schedule: a curv.schedule/1 document or its path.
        layers: the model's list of blocks; found by itself where there is one.
        outputs: paths within a block of the modules that write to the residual stream, where the
            architecture is not known.
        rho_source: measures curvature (a CurvatureTracker); turns adaptive mode on: a phase begins when
            the measured rho with its blocks is under the schedule's margin, between its `step` and
            `latest`. Then `state_dict()` belongs into the job's checkpoints.
        margin: of adaptive mode, instead of the schedule's (0.8 where that has none).
        patience: updates with a positive learning rate after which a block that joined must have moved.

    Raises:
        UsageError: the schedule does not fit the model; the rho_source measures by a budget; a block that is to be locked
            could not join, since its outputs require no gradient, or is not in the optimizers. From `step`: steps that go
            back, parameters that were replaced, locked weights that moved. From an optimizer's step: one that was not given
            trains locked weights.
        UnsupportedError: no output projections are known for these blocks, or a locked block shares its weights.
        DeadBlockError: from the optimizer's step, when a block that joined does not move.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        schedule: Schedule | Path | str,
        *,
        layers: nn.ModuleList | nn.ModuleDict | nn.Sequential | None = None,
        outputs: Sequence[str] | None = None,
        rho_source: RhoSource | None = None,
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
        if rho_source is not None and self.schedule.gates:
            raise UsageError(
                "gates open by the step alone: there is no unlock to decide", hint="drop rho_source or adaptive=True"
            )
        if getattr(rho_source, "budget", None) is not None:
            raise UsageError(
                "adaptive mode needs measurements at fixed steps: by a clock, a resumed job would decide otherwise",
                hint="give the tracker every=, and not max_overhead=",
            )
        self.growing = self.schedule.lock == "zero-output"
        self.blocks, self.locks = blocks, find_locks(blocks, outputs, resting=self.growing)
        self.model, self.optimizers, self.rho_source, self.patience = model, bare(optimizer), rho_source, patience
        self.margin = margin or self.schedule.margin or STABLE_BELOW
        self.locked: frozenset[int] = frozenset()
        self.current: int | None = None
        self._resting: frozenset[int] | None = None  # without state in a checkpoint that is about to be loaded
        self.started: list[int] = []  # in adaptive mode: the step at which each phase began
        everything = frozenset(range(self.schedule.depth))
        phases = [everything - frozenset(phase.active) for phase in self.schedule.phases]
        check_shared(self.locks, model, phases)
        self.lockable = [self.locks[i] for i in sorted(frozenset().union(*phases))]
        self._watches: list[Watch] = []
        self._still: dict[int, Stillness] = {}
        self._hooked: set[int] = set()
        self.gates: list[Gate] = []
        self._check_outputs()
        self._handles: list[Any] = []
        self._hook_gradients()
        for other in following():
            if isinstance(other, ArchitectureWarmup) and other.lockable_ids() & self.lockable_ids():
                other.detach()  # this one takes its place: two would lock what either does
        self._attached = True
        follow(self)

    @property
    def active_depth(self) -> int:
        """Blocks that train; of gates, those that are open."""
        closed = sum(gate.value < 1 for gate in self.gates)
        return self.schedule.depth - len(self.locked) - closed

    def step(self, step: int) -> None:
        """Say which global step comes: locks and unlocks what the schedule wants for its update.

        Call it before the step's forward pass. Under gradient accumulation `step` counts updates; the same step may be
        told more than once.
        """
        if not self._attached:
            raise UsageError("this warm-up was detached", hint="make a new ArchitectureWarmup")
        if self.current is not None and step < self.current:
            raise UsageError(
                f"step {step} comes after step {self.current}: blocks that train would be locked again",
                hint="count steps over the whole run, not within an epoch; for a run that is set back make a new warm-up "
                "from the weights that it is set back to",
            )
        # At each step: an adapter, or requires_grad_, may have come since the last.
        self._check_parameters()
        self._hook_gradients()
        if self.current is None:
            self._begin(step)
        if self.locked:
            # One block a step: what moves weights past an optimizer's hooks moves every block.
            self._still[sorted(self.locked)[step % len(self.locked)]].check(step)
        wanted = self._wanted(step)
        joining = sorted(self.locked - wanted)
        if self.current is None:
            self._still = {i: Stillness(self.locks[i]) for i in wanted}
        self._gate(step)
        self.locked, self.current = wanted, step
        if joining:
            logger.info("step %d: blocks %s join, %d of %d train", step, joining, self.active_depth, self.schedule.depth)
            self._watches += [Watch(self.locks[i], self.growing) for i in joining]

    def locked_parameters(self) -> frozenset[str]:
        """Names, in the model, of the parameters that may not move now."""
        return self._names(self.locked)

    def next_parameters(self, step: int, horizon: int = 100) -> frozenset[str]:
        """Adaptive mode: names of the parameters that join next, from `horizon` steps before they may."""
        # Before, so that their second moments (shadow.py) are no longer young when the phase may begin.
        phase = len(self.started)
        if (
            self.rho_source is None
            or phase >= len(self.schedule.phases)
            or step < self.schedule.phases[phase].step - horizon
        ):
            return frozenset()
        return self._names(frozenset(self.schedule.phases[phase].unlock))

    def state_dict(self) -> dict[str, Any]:
        """Adaptive mode's decisions: the step at which each phase began."""
        return {"started": list(self.started)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Repeat the decisions of the job that is resumed. Raises UsageError after the first `step`."""
        if self.current is not None:
            raise UsageError(
                f"the job's decisions come after step {self.current} began", hint="load them before the first warmup.step"
            )
        self.started = [int(step) for step in state["started"]]

    def resume_at(self, step: int) -> None:
        """Say which step the job resumes at, before torch.distributed.checkpoint loads into its optimizer.

        For a place to load into, that has a new optimizer make its state, in a step at learning rate 0. Blocks that were
        locked in the update before `step` get none, as they have none in the checkpoint. In adaptive mode load the
        job's decisions first.
        """
        self._resting = self._decided(step - 1)

    def detach(self) -> None:
        """Let go of model and optimizers; nothing is locked any longer. A new warm-up on the model does so, too."""
        for handle in (*self._handles, *self.gates):
            handle.remove()
        if half := [gate.index for gate in self.gates if gate.value < 1]:
            logger.warning("gates of blocks %s were not open: without them the model is another function", half)
        self._handles.clear()
        self.gates.clear()
        unfollow(self)
        self._attached, self.locked = False, frozenset()

    def _begin(self, step: int) -> None:
        """Make locked blocks identities in a fresh run; see that they are in a resumed one."""
        if self.rho_source is not None and not self.started:
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
        if fresh and any(has_stepped(optimizer) for optimizer in self.optimizers):
            raise UsageError(
                f"step {step} begins the schedule, but the optimizer has taken steps: blocks would lose what they learned",
                hint="pass the global step of the resumed run",
            )
        self._check_outputs()
        for index in sorted(wanted):
            lock = self.locks[index]
            if fresh:
                lock.close()
                prove(lock, self.model, partial(self._is_locked, index))
            elif moved := lock.moved():
                raise UsageError(
                    f"block {index} is locked at step {step} and its {moved[0]} is not at rest",
                    hint="load the checkpoint's weights first, and use the schedule that the run began with",
                )

    def _gate(self, step: int) -> None:
        """Set each block's gate for a step; open ones are taken away, so that the model is itself again, to the bit."""
        alphas = self.schedule.alphas_at(step)
        if self.current is None:
            self.gates = [Gate(lock.index, lock.block) for lock in self.locks if alphas[lock.index] < 1]
        for gate in self.gates:
            gate.set(alphas[gate.index])
            if gate.value >= 1:
                gate.remove()
        self.gates = [gate for gate in self.gates if gate.value < 1]

    def _wanted(self, step: int) -> frozenset[int]:
        if self.rho_source is None:
            return self.schedule.locked_at(step)
        phases = self.schedule.phases
        while (phase := len(self.started)) < len(phases) and step >= phases[phase].step:
            rho = self.rho_source.rho_with(self._names(frozenset(phases[phase].unlock)))
            allowed = rho is not None and rho <= self.margin
            # One decision for all ranks, which may have measured rho on different sides of the margin.
            if not _agreed(allowed or step >= phases[phase].latest, self.model):
                break
            why = f"rho {rho:.3g} with it is within {self.margin:g}" if allowed else f"latest step {phases[phase].latest}"
            logger.info("step %d: phase %d begins, %s", step, phase, why)
            self.started.append(step)
        return self._decided(step)

    def _decided(self, step: int) -> frozenset[int]:
        """What is locked at a step, by the decisions made so far."""
        if self.rho_source is None:
            return self.schedule.locked_at(step)
        phases = self.schedule.phases
        # A resumed job may have loaded decisions that lie ahead of this step.
        begun = sum(1 for began in self.started if began <= step)
        return frozenset(range(self.schedule.depth)) - frozenset(phases[max(begun - 1, 0)].active)

    def _names(self, indices: frozenset[int]) -> frozenset[str]:
        inside = {id(p) for i in indices for p in self.locks[i].parameters.values()}
        return frozenset(n for n, p in self.model.named_parameters() if id(p) in inside)

    def lockable_ids(self) -> set[int]:
        """Identities of the parameters that this warm-up locks at some step."""
        return {id(p) for lock in self.lockable for p in lock.parameters.values()}

    def _is_locked(self, index: int) -> bool:
        return index in self.locked

    def _check_outputs(self) -> None:
        """An identity whose outputs may not move would be one for ever."""
        for lock in self.lockable if self.growing else []:
            if fixed := [n for n, p, _ in lock.resting if not p.requires_grad]:
                raise UsageError(
                    f"block {lock.index} is to begin as an identity, and its {fixed[0]} does not require a gradient: it "
                    "would lose its weights and never train",
                    hint="requires_grad_(True) on it before, or a schedule of mode freeze, which leaves weights as they are",
                )

    def _check_parameters(self) -> None:
        """Locks hold the parameters that were there at the beginning."""
        blocks = list(getattr(self.blocks.parent, self.blocks.attribute).children())
        for lock in self.lockable:
            now = list(blocks[lock.index].parameters()) if lock.index < len(blocks) else []
            known = {id(p) for p in lock.parameters.values()}
            whole = not any(hasattr(p, "to_local") for p in now)
            if whole and any(hasattr(p, "to_local") for p in lock.parameters.values()):
                continue  # gathered by fully_shard for the moment
            if {id(p) for p in now} != known:
                raise UsageError(
                    f"parameters of block {lock.index} were replaced since the warm-up was made",
                    hint="make it after fully_shard, adapters and whatever else changes the model's parameters",
                )

    def _hook_gradients(self) -> None:
        """Zero the gradients of locked blocks as they come, of parameters that began to require them too."""
        trained = [(lock.index, n, p) for lock in self.lockable for n, p in lock.parameters.items() if p.requires_grad]
        waiting = [each for each in trained if id(each[2]) not in self._hooked]
        # At the first step all of them, for an engine may have taken the optimizer over since.
        asked = trained if self.current is None else waiting
        given = set().union(*(held(optimizer) for optimizer in self.optimizers)) if asked else set()
        for index, name, parameter in asked:
            if id(parameter) not in given:
                raise UsageError(
                    f"{name} of block {index} is in no optimizer that the warm-up was given",
                    hint="pass all of them as a list, or requires_grad_(False) on what is not to train; an engine that "
                    "flattens parameters (DeepSpeed, apex) is not supported",
                )
        for index, _, parameter in waiting:
            if hasattr(parameter, "to_local"):
                # A sharded gradient is set by fully_shard after its reduction, past a tensor's own hooks.
                handle = parameter.register_post_accumulate_grad_hook(partial(self._zero_sharded, index))
            else:
                handle = parameter.register_hook(partial(self._zero, index))
            self._hooked.add(id(parameter))
            self._handles.append(handle)

    def _zero(self, index: int, gradient: Tensor) -> Tensor | None:
        # zeros, not gradient * 0: an overflow in a locked block is no concern of the others
        return torch.zeros_like(gradient) if index in self.locked else None

    def _zero_sharded(self, index: int, parameter: Tensor) -> None:
        if index in self.locked and parameter.grad is not None:
            parameter.grad.zero_()

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Drops the gradients of locked blocks, so that the optimizer leaves those blocks as they are.

        Raises UsageError where the schedule was not told the step, or where an optimizer that the warm-up was not given
        would train a locked block.
        """
        making = self.current is None and all(float(group["lr"]) == 0 for group in optimizer.param_groups)
        locked = self._resting if making and self._resting is not None else self.locked
        with_gradient = [(i, n, p) for i in locked for n, p in self.locks[i].parameters.items() if p.grad is not None]
        if not any(optimizer is own for own in self.optimizers):
            inside = held(optimizer) if with_gradient else set()
            for index, name, parameter in with_gradient:
                if id(parameter) in inside:
                    raise UsageError(
                        f"a {type(optimizer).__name__} that the warm-up was not given would train {name} of block "
                        f"{index}, which is locked",
                        hint="pass every optimizer as a list, and make a new warm-up for one that is made later; "
                        "warmup.detach() ends the locks",
                    )
            return
        if self.current is None and (not making or self._resting is None):
            remedy = "warmup.resume_at(step) before a checkpoint is loaded by DCP" if making else "warmup.step(step) first"
            raise UsageError("the optimizer steps before the schedule was told the step", hint=f"call {remedy}")
        for _, _, parameter in with_gradient:
            # None and not zeros: for a zero gradient an optimizer creates state and applies weight decay.
            parameter.grad = None
        for watch in self._watches:
            watch.see_gradients()

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Sees whether the blocks that joined have come alive.

        Raises DeadBlockError where one has not within `patience` updates.
        """
        if not self._watches or not any(optimizer is own for own in self.optimizers) or self.current is None:
            return
        moving = held(optimizer, moving=True)
        for watch in self._watches:
            watch.see_update(moving, self.current)
        self._watches = [w for w in self._watches if not w.alive()]
        for watch in self._watches:
            if watch.updates >= self.patience:
                since = f"joined {watch.updates} updates before step {self.current}"
                raise DeadBlockError(
                    f"block {watch.lock.index} {since}: {watch.complaint()}",
                    hint="check that its weights are not all zero, require gradients and are in the optimizer",
                )


def _agreed(decision: bool, model: nn.Module) -> bool:
    """Rank 0's decision, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decision
    flag = torch.tensor(float(decision), device=next(model.parameters()).device)
    torch.distributed.broadcast(flag, src=0)
    return bool(flag)
