"""The measurement: a problem and an optimizer in, a report out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import nn

from curvcli import documents
from curvcli.analysis.dividing import divided as divide
from curvcli.analysis.document import Provenance, write
from curvcli.analysis.measured import Measured
from curvcli.analysis.plan import GIB, fitted, limit_of, spare
from curvcli.analysis.solve import Measurement
from curvcli.analysis.stages import Progress
from curvcli.curvature.gathering import Weights
from curvcli.curvature.hvp import Mode
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.memory import leanest, spread
from curvcli.curvature.precision import Lifted
from curvcli.curvature.problem import Loss, Problem, check_lifted, measurable
from curvcli.curvature.ranks import agreed, current, same
from curvcli.curvature.shards import Shards
from curvcli.curvature.weighing import weighed
from curvcli.errors import UsageError
from curvcli.models.blocks import find_blocks, locate, survey
from curvcli.optimizers.adam import ESTIMATED
from curvcli.optimizers.base import OptimizerView
from curvcli.optimizers.estimated import estimate
from curvcli.optimizers.given import scaled
from curvcli.optimizers.preconditioner import Preconditioner, identity, live, prepare

T = TypeVar("T")
Shard: TypeAlias = Literal["vectors", "all"]
Live: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class Estimated:
    """In place of optimizer state that was not saved: estimate Adam's from the data, with these options."""

    options: dict[str, Any] = field(default_factory=lambda: dict(ESTIMATED))


def analyze(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    optimizer: Live | OptimizerView | Estimated | None = None,
    *,
    weights: Sequence[float] | None = None,
    layers: nn.ModuleList | nn.ModuleDict | nn.Sequential | None = None,
    lr: float | None = None,
    clip: float | None = None,
    mode: Mode | Literal["auto"] = "auto",
    tolerance: float = 1e-2,
    max_hvps: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
    deadline: float = float("inf"),
    parts: bool = True,
    depths: bool = True,
    truncated: bool | None = None,
    on_verdict: Callable[[documents.Report], None] | None = None,
    memory: int | str | None = None,
    shard: Shard | Weights | None = None,
    provenance: Provenance | None = None,
) -> documents.Report:
    """Curvature of a model as its optimizer sees it, in full, per layer and cumulative over depth.

    The method is that of arXiv 2606.16768; thresholds are from arXiv 2103.00065 and 2207.14484.
    Neither weights, gradients nor the optimizer are changed.

    Args:
        model: any module; its parameters that require a gradient are measured.
        loss: `loss(model, batch)`, the mean loss over the batch, a scalar tensor. It must call the model.
        batches: the frozen shard. At least two, so that half can be held out.
        optimizer: in memory, or its state by name, or Estimated(); None measures the Hessian itself.
        weights: predictions in each batch; needed where batches differ in size. Without them batches of one size weigh the
            same, or where labels of -100 leave some with fewer what these count in their loss, as a few of its rows tell.
        layers: the model's list of blocks; found by itself where there is one.
        lr: learning rate to use instead of the optimizer's: that of the largest parameter group that moves; the others
            keep their ratio to it.
        clip: share of its norm that clipping leaves of a gradient, above 0, 1 where nothing is clipped: max_norm over the
            usual norm, or better the mean of min(1, max_norm / norm) over steps. An optimizer does not know it.
        mode: how Hessian-vector products are made; "auto" keeps graphs where they fit, and is exact but under a limit of
            memory that no exact mode fits. "differences", of gradients, needs no second derivatives and is good to 0.1 %.
        tolerance: residual over lambda at which the full model and the restricted depths count as converged, if no
            eigenvalue lies more than three times that above (depths: up to ten times); layers and truncated networks take
            three times it, and ten times it above.
        max_hvps: products that one estimate may take.
        progress: called with what is being done and the fraction done.
        deadline: instant of `time.monotonic()` from which nothing more is started. What was not reached has the status
            "skipped"; the full model comes first.
        parts: measure embedding with head, and each layer, alone too; without them no depths are either.
        depths: measure the curve over depth too.
        truncated: measure the networks cut short too. They mean something near initialisation, and None measures them
            where the loss of the network cut to half its depth is near the whole's, and, of a checkpoint's shard of tokens,
            not below what their frequencies alone give.
        on_verdict: called with a report of the full model as soon as that is known; layers and depths are "skipped" in it,
            and no finding says so. Later parts can still show that the full model's estimate is none to rely on.
        memory: most that the process may take at its peak (on a GPU, the tensors there), in bytes or as "8GiB": how products
            are made, in how large batches, and how many vectors there are follow from it, freed memory goes back to
            the system at once, and state given by name is emptied once it has been read, and taken by no analysis any more.
            None plans with what is free.
        shard: where several processes measure together (`curvature.ranks.within`): "vectors" divides preconditioner and
            vectors over them, "all" weights and optimizer state too, for a model that nobody needs afterwards: it is left
            without its weights. Products are made on gathered weights, by fresh graphs; where these do not fit they are
            differences of gradients, and one block is gathered at a time. None divides the batches alone. Weights of a model
            that is divided already are as "all".
        provenance: what the report says of its inputs; needed only where they are files.

    Returns:
        The report, whose statuses say what could be estimated.

    Raises:
        UsageError: arguments that contradict each other, or `memory` does not do for any way to measure.
        UnsupportedError: an optimizer without a threshold, or a model without second derivatives.
        OutOfMemoryError: not even a product on one row fits; batches whose rows are independent are cut where that helps.
        OutOfTime: not even the full model was reached before the deadline.
    """

    def finish(work: Measurement, notes: dict[str, str]) -> documents.Report:
        said = provenance or Provenance(lr_source="optimizer" if lr is None else "option")
        said = replace(said, notes={**said.notes, **notes})

        def early(found: Measured) -> None:
            # Where slices are held, all have to write what rank 0 shows.
            if on_verdict is not None if shard is None else agreed(on_verdict is not None)[0]:
                report = _provisional(write(work, found, said, tokens))
                if on_verdict is not None:
                    on_verdict(report)

        return write(work, work.run(early), said, tokens)

    # Fail before anything is touched: these numbers alone rule out a certified result.
    check_effort(tolerance, max_hvps, depths=depths, truncated=truncated)
    tokens = sum(weights) if weights else None
    solver = Lanczos(tolerance, 3 * tolerance, max_products=max_hvps, seed=seed, deadline=deadline)
    return prepared(
        model, loss, batches, optimizer, finish, weights=weights, layers=layers, lr=lr, clip=clip, mode=mode, solver=solver,
        progress=progress, parts=parts, depths=depths, truncated=truncated,
        unigram=provenance.unigram if provenance else None, memory=memory, shard=shard,
    )  # fmt: skip


def prepared(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    optimizer: Live | OptimizerView | Estimated | None,
    finish: Callable[[Measurement, dict[str, str]], T],
    *,
    solver: Lanczos,
    weights: Sequence[float] | None = None,
    layers: nn.ModuleList | nn.ModuleDict | nn.Sequential | None = None,
    lr: float | None = None,
    clip: float | None = None,
    mode: Mode | Literal["auto"] = "auto",
    progress: Progress | None = None,
    parts: bool = True,
    depths: bool = True,
    truncated: bool | None = None,
    unigram: float | None = None,
    memory: int | str | None = None,
    shard: Shard | Weights | None = None,
) -> T:
    """What is made of a measurement that is set up and has not begun, by the leanest plan that memory does for.

    Args:
        finish: called with it, and with notes on the model and the batches by their finding's code; once more with a leaner
            one where memory runs out in it.
        solver: of the full model.
        unigram: entropy of the shard's targets by their frequencies, in nats; None where there is none. The others are as
            for `analyze`.

    Raises:
        CurvError: as `analyze` does.
    """
    limit = limit_of(memory)
    module: nn.Module = getattr(model, "_orig_mod", model)  # torch.compile's graph has no second derivative
    theirs, optimizer = optimizer, _by_name(module, optimizer, clip)
    say = progress or (lambda stage, done: None)
    with measurable(module) as lifted:

        def metric(problem: Problem) -> Preconditioner:
            found = _preconditioner(problem, optimizer, lr, shards)
            return found.aside(store.put) if store else found

        def set_up(problem: Problem, mode: Mode | Literal["auto"]) -> tuple[Measurement, dict[str, str]]:
            preconditioner = known or metric(problem)
            # An optimizer that maximises descends minus the loss, whose Hessian is the one with an edge.
            part = problem.negated() if preconditioner.ascends else problem
            blocks = None if not parts else locate(module, layers) if layers is not None else find_blocks(module)
            notes = {**_lifted(lifted, problem), **_cut(problem, len(whole.batches)), **_idle(problem)}
            basis, offload = None, False
            if limit is not None:
                part, chosen = fitted(
                    part, limit, mode, solver.max_products, sharded=shards is not None, aside=store is not None
                )
                mode, basis, offload = mode if mode == "forward" else chosen.mode, chosen.basis, chosen.offloaded > 0
                notes["memory-plan"] = f"of {limit / GIB:.2f} GiB: {chosen}"
            if blocks is not None:
                blocks, found = survey(part, blocks)
                notes |= found
            notes |= said
            work = Measurement(
                part, preconditioner, blocks, solver, mode, say, depths=depths, truncated=truncated,
                unigram=unigram, basis=basis, offload=offload, aside=store,
            )  # fmt: skip
            return work, notes

        def measure(problem: Problem, mode: Mode | Literal["auto"]) -> T:
            with problem.gathered():
                work, notes = set_up(problem, mode)
            return finish(work, notes)

        divided = shard if isinstance(shard, Weights) else None
        given = Problem.create(module, loss, [lifted.batch(batch) for batch in batches], weights)
        given = given if divided is None else replace(given, gathered=divided.whole, streamed=divided.streamed)
        check_lifted(given, lifted)
        state = optimizer.state if isinstance(optimizer, OptimizerView) else {}
        # Ranks that read different files would sum products of different functions, and no number would show it. Weights
        # that were read in slices were held against each other then.
        same("weights, optimizer state or data", {} if divided else given.parameters, given.batches, state)
        given = given if weights is not None else weighed(given, current())
        whole = spread(given, current())
        shards, known, said = None, None, dict[str, str]()
        if shard is not None:
            shards = Shards(current(), {n: p.shape for n, p in given.parameters.items()})
        store = None if limit is None else spare(whole, shards)
        slices = shard == "all" or divided is not None
        if isinstance(optimizer, OptimizerView) and (slices or limit is not None):
            with whole.gathered():  # once, so that its state makes room before anything is solved
                known = metric(whole)
            _empty(optimizer, theirs)  # with `clip` the one is a copy of the other
        if slices:
            return divide(whole, divided or Weights(module, current()), mode, limit, said, measure)
        return leanest(whole, mode, measure)


def _provisional(report: documents.Report) -> documents.Report:
    """Without what is said of parts that are still to come."""
    return report.model_copy(update={"findings": [f for f in report.findings if f.code != "out-of-time"]})


def check_effort(tolerance: float, max_hvps: int, *, depths: bool = True, truncated: bool | None = None) -> None:
    """Raises UsageError where no number could come out certified, or what is asked for is left out."""
    if truncated and not depths:
        raise UsageError("networks cut short are one of the two curves over depth", hint="drop --no-depths, or --truncated")
    if not 0 < tolerance < 1 or max_hvps < 3:  # NaN too; a residual of lambda's size certifies nothing
        raise UsageError("tolerance must be above 0 and below 1, max_hvps at least 3", hint="the defaults are 0.01 and 100")


def _by_name(
    module: nn.Module, optimizer: Live | OptimizerView | Estimated | None, clip: float | None
) -> OptimizerView | Estimated | None:
    """The optimizer's state by the parameters' names, with what clipping leaves of a gradient where that is given.

    Raises:
        UsageError: it has been emptied.
    """
    # An optimizer knows the parameters by identity: before copies take their place.
    if isinstance(optimizer, (torch.optim.Optimizer, Sequence)):
        optimizer = live(optimizer, {n: p for n, p in module.named_parameters() if p.requires_grad})
    if isinstance(optimizer, OptimizerView) and optimizer.emptied:
        raise UsageError(
            "this optimizer state was emptied by an analysis within a limit of memory", hint="read it again for each of them"
        )
    return replace(optimizer, clip=clip) if clip is not None and isinstance(optimizer, OptimizerView) else optimizer


def _empty(*optimizers: object) -> None:
    for view in optimizers:
        if isinstance(view, OptimizerView):
            view.empty()


def _preconditioner(
    problem: Problem, optimizer: OptimizerView | Estimated | None, lr: float | None, shards: Shards | None
) -> Preconditioner:
    parameters = problem.parameters
    if not parameters:
        raise UsageError("no parameter of the model requires a gradient", hint="unfreeze what is to be measured")
    if optimizer is None:
        return identity(parameters, shards)
    if isinstance(optimizer, Estimated):
        found = scaled(estimate(problem, optimizer.options, shards), parameters, lr)
        return prepare(found, parameters, kind="estimated", shards=shards)
    return prepare(scaled(optimizer, parameters, lr), parameters, shards=shards)


def _lifted(lifted: Lifted, problem: Problem) -> dict[str, str]:
    if not lifted.names:
        return {}
    return {
        "lifted-weights": f"{len(lifted.names)} of {len(dict(problem.model.named_parameters()))} weight tensors are in "
        f"{' and '.join(lifted.dtypes)}: measured as copies of the same numbers in float32"
    }


def _idle(problem: Problem) -> dict[str, str]:
    idle = problem.ranks.world - len(set(problem.owners)) if problem.owners else 0
    if not idle:
        return {}
    return {"idle-ranks": f"{idle} of {problem.ranks.world} ranks had no batch: the shard has {len(problem.batches)}"}


def _cut(problem: Problem, given: int) -> dict[str, str]:
    if len(problem.batches) == given:
        return {}
    return {
        "cut-batches": f"memory did not do for a product on whole batches: {given} were cut into {len(problem.batches)}, "
        "of which the mean loss is the same"
    }
