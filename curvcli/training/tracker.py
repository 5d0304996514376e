"""Curvature of a model while it trains, in a few Hessian-vector products a step. It never changes the training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curvcli.curvature import resources
from curvcli.curvature.davidson import Davidson
from curvcli.curvature.hvp import HVP, Mode, build, random_direction
from curvcli.curvature.memory import spread
from curvcli.curvature.norms import largest_spectral_norm
from curvcli.curvature.operator import PreconditionedHessian
from curvcli.curvature.precision import all_finite, norm
from curvcli.curvature.problem import Loss, Problem, check_lifted, gradient, measurable
from curvcli.curvature.ranks import same, within
from curvcli.curvature.selftest import check_second_derivative
from curvcli.curvature.steepest import FrankWolfe
from curvcli.curvature.untouched import hushed, undrawn
from curvcli.curvature.weighing import weighed
from curvcli.documents import Record
from curvcli.errors import CurvError, LostError, UsageError, exhausted
from curvcli.judge.limits import certified
from curvcli.models.attention import attention
from curvcli.models.blocks import find_blocks
from curvcli.optimizers.preconditioner import Preconditioner, live, prepare
from curvcli.optimizers.update import gradient_quotient, next_update, update_rms
from curvcli.training.alerts import Alarm, Alerts, wandb
from curvcli.training.engine import Counting
from curvcli.training.found import Found, Known, bare, bare_names, calibrated, failed, finite, groups_of, mode_for, rank
from curvcli.training.log import Sink, open_log
from curvcli.training.outliers import SIGMAS, LossWatch, OwnRange
from curvcli.training.overhead import Ledger, budget_of
from curvcli.training.shadow import Shadow
from curvcli.training.steepest import in_norm
from curvcli.training.together import check_gathered, gathered, ranks_of

if TYPE_CHECKING:
    from curvcli.training.warmup import ArchitectureWarmup

logger = logging.getLogger("curvcli")


class CurvatureTracker:
    """Warm-started top eigenvalue of the preconditioned Hessian, every few steps of a training loop.

        tracker = CurvatureTracker(model, optimizer, loss, probe=batches, log="run/curvature.jsonl")
        for step, batch in enumerate(loader):
            ...
            optimizer.step()
            scheduler.step()
            tracker.step(step, loss=value.item())

    Gradients, weights, buffers, attributes of modules, optimizer state and torch's random numbers are bit-equal with and
    without it, and users' hooks do not fire (a forward hook that changes what a module gives is not measured).
    Whatever fails in it is a record with status "failed" and a reason, and the job goes on.

    Args:
        model: the training model, unwrapped from torch.compile and DistributedDataParallel. One under fully_shard is
            gathered for the measurement, which takes `split`; FSDP1 and tensor parallelism are "failed".
        optimizer: whose state is the preconditioner, and whose learning rates give rho. What it does not hold is left out.
            Muon and the Adam of the other parameters, as a list. Of Muon and Lion records have Z instead of rho.
        loss: `loss(model, batch)`, the mean loss of a batch, a scalar.
        probe: frozen batches to measure on; without them the batch given to `step`.
        weights: predictions in each batch of the probe, where they differ; as of `curvcli.analyze`.
        every: measure when the step is a multiple of it, whatever that costs; 1 without it and without `max_overhead`.
        max_overhead: instead of `every`: seconds of measuring for each second of training, at most, as 0.05. It chooses how
            often is measured and on how many of the probe's batches, by what both were measured to take; so give the probe
            as several batches. Of several ranks the first decides, which without `split` measures alone.
        tolerance: residual over lambda at which an estimate has converged; the value's error goes with its square.
        max_hvps: products that one estimate may take; it is "unconverged" where these do not do.
        update_ratio: measure the next update's own curvature too (one product more), and with its gradient whether that is
            out of the run's range: the six-sigma rule on the log of its norm.
        gradient_quotient: with it, the curvature along the gradient, g'Hg/g'g (one product more).
        attention: the largest attention logit and the smallest mean entropy of a layer (a forward pass of the first batch).
        spectral_norms: the largest spectral norm of a weight matrix of a block.
        log: a JSONL file that records are appended to (documents "curv.curvature/1"); `curv watch` shows it.
        sinks: called with each record, e.g. `curvcli.training.log.tensorboard(writer)`. An active
            Weights & Biases run gets the records, and alerts, without being named.
        alerts: called when a record's level rises, e.g. `curvcli.training.alerts.webhook(url)`; on the first rank alone.
        reaction: a JSON file that holds the newest record's level and what to do, replaced whole, for
            `curvcli.training.read_reaction`.
        warmup: leaves its locked parameters out, and logs the active depth.
        seed: of the first random start.
        split: on several ranks each measures its share of the probe, and all record the same. Every rank has to make the
            tracker, with the same probe, and to call `step` at the same steps. Without it each measures for itself.

    Raises:
        UsageError: `every` and `max_overhead` are both given, or `max_overhead` or an existing reaction file is none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        loss: Loss,
        *,
        probe: Sequence[Any] | None = None,
        weights: Sequence[float] | None = None,
        every: int | None = None,
        max_overhead: float | None = None,
        tolerance: float = 1e-2,
        max_hvps: int = 20,
        update_ratio: bool = True,
        gradient_quotient: bool = False,
        attention: bool = False,
        spectral_norms: bool = False,
        log: Path | str | None = None,
        sinks: Sequence[Sink] = (),
        alerts: Sequence[Alarm] = (),
        reaction: Path | str | None = None,
        warmup: ArchitectureWarmup | None = None,
        seed: int = 0,
        split: bool = False,
    ) -> None:
        self.model, self.optimizer, self.loss = bare(model), optimizer, loss
        self.probe, self.weights = probe, weights
        self.every, self.update_ratio, self.warmup = max(every or 1, 1), update_ratio, warmup
        self.gradient_quotient, self.attention, self.spectral_norms = gradient_quotient, attention, spectral_norms
        self.gradients, self.losses, self.ledger = OwnRange(), LossWatch(), Ledger()
        self.budget = budget_of(every, max_overhead, len(probe or ()), max_hvps, self.ledger)
        # The bottom of the spectrum is not looked at: with an infinite tolerance it is always found.
        self.solver = Davidson(tolerance=tolerance, bottom_tolerance=float("inf"), max_products=max(max_hvps, 1), seed=seed)
        self.sinks = [*open_log(log), *sinks]
        self.ranks = ranks_of(split)
        primary = rank() == 0
        self.alerts = Alerts((wandb, *alerts) if primary else (), Path(reaction) if reaction and primary else None)
        self.last: Record | None = None
        self._lost: LostError | None = None  # from then on ranks may be out of step, and are not met again
        self.shadow = Shadow()
        self._mode: Mode | None = None  # until the first measurement, which checks what need be checked once
        self._warned = False
        self._direction: dict[str, Tensor] = {}  # the top eigenvector in the parameters' own coordinates
        self._ahead: tuple[frozenset[str], float | None] = (frozenset(), None)  # what joins next, and rho with it

    def step(self, step: int, *, loss: float | None = None, batch: Any = None) -> Record | None:
        """Measure after an optimizer step, where it is this one's turn.

        Args:
            step: the global step whose update has just been made.
            loss: of that step, for the log.
            batch: to measure on, where there is no probe.

        Returns:
            The record, or None where it was not this step's turn.
        """
        self.ledger.enter()
        self.losses.see(loss)
        if not self._turn(step):
            return None
        device = next(self.model.parameters()).device
        resources.synchronize(device)
        self.ledger.rest()  # what a device had still to do was training
        try:
            found = self._found(step, batch)
            resources.synchronize(device)
        except Exception as error:  # a callback may not end the job, whatever the model or a kernel raises
            logger.warning("curvature at step %d failed: %s", step, str(error))
            found = failed(error)
        if found.status == "failed":
            resources.release(device)  # what an error still held would be missing in training
        seconds = self.ledger.charge()
        record = Record(
            step=step,
            loss=finite(loss),
            lr=finite(max((float(g["lr"]) for g in groups_of(self.optimizer) if g["lr"] is not None), default=None)),
            active_depth=self.warmup.active_depth if self.warmup else None,
            seconds=seconds,
            overhead=self.ledger.share,
            probe_batches=len(self._batches()) or None,
            **self.losses.told(),
            **found.__dict__,
        )
        if self.budget is not None:
            self.budget.paid(seconds, found.hvps)
        self.last = record
        for sink in self.sinks:
            try:
                sink(record)
            except Exception as error:
                logger.warning("curvature of step %d could not be logged: %s", step, str(error))
        if rank() == 0:
            self.alerts.see(record)
        self.ledger.charge()  # sinks and alerts are no training
        return record

    def _turn(self, step: int) -> bool:
        """Whether to measure after this step, on this rank."""
        if self.budget is None:
            return step % self.every == 0
        if self.ranks.world == 1 or self._lost:
            return rank() == 0 and self.budget.due
        try:
            return self.budget.turn(self.ranks)
        except LostError as error:
            self._lost = error
            return True  # a record says so

    def _batches(self) -> Sequence[Any]:
        """What of the probe is measured."""
        probe = self.probe or ()
        return probe if self.budget is None else probe[: self.budget.batches]

    def rho_with(self, names: frozenset[str]) -> float | None:
        """rho over what trains and the named parameters, by the last measurement; None without a certified one."""
        return self._ahead[1] if self._ahead[0] == names else None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed job needs to go on as if it had not stopped: the eigenvector and the shadow moments."""
        return {
            "direction": dict(self._direction),
            "shadow": self.shadow.state_dict(),
            "ahead": [sorted(self._ahead[0]), self._ahead[1]],
            "gradients": list(self.gradients.values),
            "losses": list(self.losses.range.values),
            "budget": self.budget.state_dict() if self.budget else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s."""
        device = next(self.model.parameters()).device
        self._direction = {n: t.to(device) for n, t in state["direction"].items()}
        self.shadow.load_state_dict(state["shadow"], device)
        self._ahead = (frozenset(state["ahead"][0]), state["ahead"][1])
        self.gradients, self.losses = OwnRange(state.get("gradients", ())), LossWatch(state.get("losses", ()))
        if self.budget is not None:
            self.budget.load_state_dict(state.get("budget", {}))

    def _found(self, step: int, batch: Any) -> Found:
        """The measurement; with fresh graphs where kept ones run out of memory, from then on."""
        if self._lost is not None:  # the job may still be well; its ranks are not met again by the tracker
            raise self._lost
        try:
            with within(self.ranks):
                if len(set(self.ranks.each(step))) > 1:
                    raise UsageError("ranks are at different steps", hint="call step on every rank, at the same steps")
                return self._tried(step, batch)
        except LostError as error:
            self._lost = error
            raise

    def _tried(self, step: int, batch: Any) -> Found:
        def attempt() -> Found:
            with self.ranks.together(), self._untouched(batch, known.gather) as problem:
                view = gathered(known.view) if known.gather else known.view
                return self._measure(problem, replace(known, view=view), step)

        with self.ranks.together():
            known = self._known(step)
        try:
            return attempt()
        except Exception as error:
            if self._mode != "kept" or not exhausted(error):
                raise
        self._mode = "fresh"  # for good, rather than run out at each measurement
        resources.release(next(self.model.parameters()).device)
        return attempt()

    def _known(self, step: int) -> Known:
        """What optimizer and warm-up know of the parameters by identity: asked before copies may take their place."""
        view = live(self.optimizer, {n: p for n, p in self.model.named_parameters() if p.requires_grad})
        held = [p for group in groups_of(self.optimizer) for p in group["params"]]
        gather = check_gathered(self.model, held, self.ranks)
        if self.warmup is None:
            return Known(view, gather=gather)
        locked, coming = bare_names(self.warmup.locked_parameters()), self.warmup.next_parameters(step)
        return Known(view, locked, coming, gather)

    @contextmanager
    def _untouched(self, batch: Any, gather: bool) -> Iterator[Problem]:
        """The frozen problem; modules, random numbers and hooks are as the job left them afterwards."""
        batches = self._batches() if self.probe is not None else None if batch is None else [batch]
        if self.probe is None and self.ranks.world > 1:
            raise UsageError("split=True needs a probe", hint="give every rank the same batches as probe=")
        if not batches:
            raise CurvError("there is nothing to measure on", hint="give a probe, or tracker.step(step, batch=batch)")
        with (
            undrawn(p.device for p in self.model.parameters()),
            measurable(self.model, gather=gather) as lifted,
            hushed(self.model) as still,
        ):
            if still and not self._warned:
                logger.warning("forward hooks do not fire in measurements, nor do they count in them: %s", ", ".join(still))
            self._warned = self._warned or bool(still)
            batches = [lifted.batch(part) for part in batches]
            weights = self.weights[: len(batches)] if self.weights is not None and self.probe is not None else None
            problem = Problem.create(self.model, self.loss, batches, weights, gathered=lifted.whole)
            if self._mode is None:
                same("batches to measure on", batches)
                check_lifted(problem, lifted)
                if lifted.names:
                    logger.info("%d weights in %s are measured in float32", len(lifted.names), " and ".join(lifted.dtypes))
            problem = spread(problem if weights else weighed(problem, self.ranks), self.ranks)
            yield problem

    def _measure(self, problem: Problem, known: Known, step: int) -> Found:
        parameters = problem.parameters
        if not all_finite(list(parameters.values())):
            return Found(status="non-finite", message="a weight of the model is NaN or inf")
        if not any(group["lr"] is None or float(group["lr"]) > 0 for group in groups_of(self.optimizer)):
            return Found(message="the learning rate is 0: no step is taken, and there is no edge")
        preconditioner = prepare(known.view, parameters).without(known.locked)
        if preconditioner.ascends:
            problem = problem.negated()
        if self._mode is None:
            most = problem.most if self.budget is None else self.budget.available  # it may come to measure on all of them
            self._mode = mode_for(problem, most)
            first = problem.subset([0]).alone()
            tangents = random_direction(first)
            check_second_derivative(first, tangents, build(first, "fresh").product(list(parameters), tangents))
        engine = Counting(build(problem, self._mode))
        names = [n for n in parameters if n in preconditioner.root]
        found, direction = self._top(engine, preconditioner, names, self._direction) if names else (Found(), None)
        found = calibrated(found, preconditioner, step)
        if preconditioner.balls:
            solver = FrankWolfe(self.solver.tolerance, self.solver.max_products)
            fields, sharpest = in_norm(problem, engine, preconditioner, self._direction, solver)
            fields |= {"status": found.status} if names else {}
            found, direction = replace(found, **fields), {**(direction or {}), **sharpest}
        if direction is not None:
            self._direction = direction
        if found.eigenvalue is not None or found.sharpness is not None:
            moving = [n for n in parameters if n in preconditioner.moving]
            found = self._beside(problem, engine, preconditioner, moving, found)
        if known.coming and not preconditioner.balls:  # of which no gradient tells what the state will be
            self._look_ahead(problem, engine, preconditioner, known)
        return replace(found, hvps=engine.products)

    def _beside(
        self, problem: Problem, engine: HVP, preconditioner: Preconditioner, names: list[str], found: Found
    ) -> Found:
        """With the cheap numbers that stand beside rho."""
        found = replace(found, update_rms=update_rms(preconditioner, names))
        if self.update_ratio:
            gradients = gradient(problem, names)
            update = next_update(problem, preconditioner, engine, names, gradients)
            size = norm(gradients)
            sigmas = self.gradients.sigmas(size)
            found = replace(
                found,
                update_ratio=update.ratio,
                gradient_norm=size,
                gradient_sigmas=sigmas,
                gradient_outlier=None if sigmas is None else sigmas > SIGMAS,
                gradient_quotient=gradient_quotient(engine, names, gradients) if self.gradient_quotient else None,
            )
        blocks = find_blocks(self.model) if self.attention or self.spectral_norms else None
        if blocks is not None and self.spectral_norms:
            norms = [largest_spectral_norm(module) for module in blocks.modules]
            found = replace(found, spectral_norm=None if None in norms else max(n for n in norms if n is not None))
        if blocks is not None and self.attention:
            seen = attention(blocks.modules, lambda: [problem.batch_loss(i) for i in problem.given[0]])
            logits = [one.logit for one in seen if one.logit is not None]
            entropies = [one.entropy for one in seen if one.entropy is not None]
            found = replace(found, attention_logit=max(logits, default=None), attention_entropy=min(entropies, default=None))
        return found

    def _look_ahead(self, problem: Problem, engine: HVP, preconditioner: Preconditioner, known: Known) -> None:
        """rho with the next group's blocks: their second moments, which no optimizer has yet, are shadowed."""
        self._ahead = (known.coming, None)
        inside = [n for n in problem.parameters if n in bare_names(known.coming)]
        roots = self.shadow.roots(known.view, problem, inside)
        if roots is None:
            return
        wider = replace(preconditioner, root=preconditioner.root.joined(roots, problem.parameters))
        names = [n for n in problem.parameters if n in wider.root]
        found, _ = self._top(engine, wider, names, self._direction)
        if certified(found):
            self._ahead = (known.coming, found.rho)

    def _top(
        self, engine: HVP, preconditioner: Preconditioner, names: list[str], near: Mapping[str, Tensor]
    ) -> tuple[Found, dict[str, Tensor] | None]:
        root = preconditioner.root.restrict(names)
        operator = PreconditionedHessian(engine, root, preconditioner.decay)
        start = [root.lower(near)] if near else []  # P has moved on; a direction of the weights is what lasts
        most = self.solver.max_products if self.budget is None else min(self.solver.max_products, self.budget.products)
        extremes = replace(self.solver, max_products=most).extremes(operator, start)
        if extremes.top is None or extremes.vector is None:
            return Found(status="non-finite", message="a Hessian-vector product overflowed"), None
        if extremes.status == "asymmetric":
            return Found(status="asymmetric", message="products fail u.Gv = v.Gu: a fused kernel, or blown-up weights"), None
        top = extremes.top
        direction = root.lift(extremes.vector)
        rho = (
            top.value / preconditioner.threshold
            if preconditioner.threshold is not None and not preconditioner.doubts
            else None
        )
        status = "converged" if extremes.status == "converged" else "unconverged"
        doubts = ", ".join(preconditioner.doubts[:4])
        said = f"no rho: the optimizer has {doubts}, which may change its update" if doubts else None
        return Found(eigenvalue=top.value, rho=rho, residual=top.residual, status=status, message=said), direction
