"""The measurement: a problem and an optimizer in, a report out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvcli import documents
from curvcli.analysis.solve import Directions, Measured, Measurement, Progress, Solved, missed
from curvcli.curvature import resources
from curvcli.curvature.davidson import Davidson
from curvcli.curvature.hvp import Mode
from curvcli.curvature.problem import Loss, Problem, measurable
from curvcli.errors import UsageError
from curvcli.judge.verdict import explain, judge
from curvcli.models.blocks import display, find_blocks, locate, survey
from curvcli.models.rows import row_kinds
from curvcli.optimizers.adam import ESTIMATED
from curvcli.optimizers.base import OptimizerView
from curvcli.optimizers.given import scaled
from curvcli.optimizers.preconditioner import Preconditioner, estimate, identity, live, prepare


@dataclass(frozen=True)
class Estimated:
    """In place of optimizer state that was not saved: estimate Adam's from the data, with these options."""

    options: dict[str, Any] = field(default_factory=lambda: dict(ESTIMATED))


@dataclass(frozen=True)
class Provenance:
    """What the report says of its inputs, where they are files."""

    checkpoint: Callable[[int, int], documents.Checkpoint] | None = None
    data: Callable[[float], documents.Data] | None = None
    lr_source: Literal["checkpoint", "log", "option", "optimizer", "none"] = "optimizer"
    notes: dict[str, str] = field(default_factory=dict)
    findings: tuple[documents.Finding, ...] = ()
    logged_loss: float | None = None


@dataclass(frozen=True)
class Analysis:
    """A report, and what the next checkpoint's analysis may start from.

    Attributes:
        warm_start: what the given start saved, measured on the first part of the shard; None after a cold start.
    """

    report: documents.Report
    directions: Directions
    warm_start: documents.WarmStart | None


def analyze(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer | OptimizerView | Estimated | None = None,
    *,
    weights: Sequence[float] | None = None,
    layers: nn.ModuleList | nn.Sequential | None = None,
    lr: float | None = None,
    mode: Mode | Literal["auto"] = "auto",
    tolerance: float = 1e-2,
    max_hvps: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
    deadline: float = float("inf"),
    depths: bool = True,
) -> documents.Report:
    """Curvature of a model as its optimizer sees it, in full, per layer and cumulative over depth.

    The method is that of arXiv 2606.16768; thresholds are from arXiv 2103.00065 and 2207.14484.
    Neither weights, gradients nor the optimizer are changed.

    Args:
        model: any module; its parameters that require a gradient are measured.
        loss: `loss(model, batch)`, the mean loss over the batch, a scalar tensor. It must call the model.
        batches: the frozen shard. At least two, so that half can be held out.
        optimizer: in memory, or its state by name, or Estimated(); None measures the Hessian itself.
        weights: predictions in each batch; needed where batches differ in size.
        layers: the model's list of blocks; found by itself where there is one.
        lr: learning rate to use instead of the optimizer's: that of the largest parameter group that moves; the others
            keep their ratio to it.
        mode: how Hessian-vector products are made; "auto" times the exact ones and takes the fastest.
        tolerance: residual over lambda at which the full model and the restricted depths count as converged;
            layers, truncated networks and parts of the shard take three times it.
        max_hvps: products that one estimate may take.
        progress: called with what is being done and the fraction done.
        deadline: instant of `time.monotonic()` from which nothing more is started. The full model is then measured
            first, and what was not reached has the status "skipped".
        depths: measure the two curves over depth too, which take about half of the products.

    Returns:
        The report, whose statuses say what could be estimated.

    Raises:
        UsageError: arguments that contradict each other.
        UnsupportedError: an optimizer without a threshold, or a model without second derivatives.
        OutOfTime: not even the full model was reached before the deadline.
    """
    return examine(
        model, loss, batches, optimizer, weights=weights, layers=layers, lr=lr, mode=mode, tolerance=tolerance,
        max_hvps=max_hvps, seed=seed, progress=progress, deadline=deadline, depths=depths,
    ).report  # fmt: skip


def examine(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer | OptimizerView | Estimated | None = None,
    *,
    weights: Sequence[float] | None = None,
    layers: nn.ModuleList | nn.Sequential | None = None,
    lr: float | None = None,
    mode: Mode | Literal["auto"] = "auto",
    tolerance: float = 1e-2,
    max_hvps: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
    deadline: float = float("inf"),
    depths: bool = True,
    start: Directions | None = None,
    provenance: Provenance | None = None,
) -> Analysis:
    """`analyze`, from the eigenvector of another checkpoint (`start`), with its own in the result."""
    check_effort(tolerance, max_hvps)
    module: nn.Module = getattr(model, "_orig_mod", model)  # torch.compile's graph has no second derivative
    with measurable(module):
        problem = Problem.create(module, loss, batches, weights)
        preconditioner = _preconditioner(problem, optimizer, lr)
        if preconditioner.ascends:
            problem = problem.negated()
        blocks = locate(module, layers) if layers is not None else find_blocks(module)
        notes: dict[str, str] = {}
        if blocks is not None:
            blocks, notes = survey(problem, blocks)
        solver = Davidson(tolerance=tolerance, max_products=max_hvps, seed=seed, deadline=deadline)
        say = progress or (lambda stage, done: None)
        work = Measurement(problem, preconditioner, blocks, solver, mode, say, start=start, depths=depths)
        found = work.run()
        said = provenance or Provenance(lr_source="optimizer" if lr is None else "option")
        said = replace(said, notes={**said.notes, **notes})
        report = _Writer(work, found).report(said, sum(weights) if weights else None)
        return Analysis(report, found.directions, _warm_start(found, report))


def check_effort(tolerance: float, max_hvps: int) -> None:
    """Raises UsageError where no number could come out certified."""
    if not 0 < tolerance < 1 or max_hvps < 3:  # NaN too; a residual of lambda's size certifies nothing
        raise UsageError("tolerance must be above 0 and below 1, max_hvps at least 3", hint="the defaults are 0.01 and 100")


def _warm_start(found: Measured, report: documents.Report) -> documents.WarmStart | None:
    if found.both is None:
        return None
    warm, cold = found.both
    if warm.extremes is None or cold.extremes is None:
        return None
    return documents.WarmStart(
        tokens=round(found.prefixes[0][0] * report.data.tokens),
        hvps=warm.extremes.products,
        cold_hvps=cold.extremes.products,
        converged=warm.converged and cold.converged and not missed(warm, cold),
    )


def _preconditioner(
    problem: Problem, optimizer: torch.optim.Optimizer | OptimizerView | Estimated | None, lr: float | None
) -> Preconditioner:
    parameters = problem.parameters
    if not parameters:
        raise UsageError("no parameter of the model requires a gradient", hint="unfreeze what is to be measured")
    if optimizer is None:
        return identity(parameters)
    if isinstance(optimizer, Estimated):
        return prepare(scaled(estimate(problem, optimizer.options), parameters, lr), parameters, kind="estimated")
    view = live(optimizer, parameters) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    return prepare(scaled(view, parameters, lr), parameters)


class _Writer:
    """A finished measurement as a document."""

    def __init__(self, work: Measurement, measured: Measured) -> None:
        self.work, self.measured = work, measured
        self.preconditioner, self.problem, self.names = work.preconditioner, work.problem, work.names
        self.whole = True

    def entry(self, solved: Solved) -> dict[str, Any]:
        """The fields of an Estimate; values that mean nothing stay null."""
        extremes = solved.extremes
        empty = dict.fromkeys(documents.Estimate.model_fields)
        if extremes is None:
            return {**empty, "hvps": 0, "status": "skipped" if solved.skipped else "empty"}
        if extremes.top is None or extremes.bottom is None or extremes.status == "asymmetric":
            return {**empty, "hvps": extremes.products, "status": extremes.status}
        top, bottom, threshold = extremes.top, extremes.bottom, self.preconditioner.threshold
        status = "converged" if extremes.status == "converged" else "unconverged"
        return {
            "eigenvalue": top.value,
            "rho": top.value / threshold if threshold is not None else None,
            "residual": top.residual,
            "most_negative": bottom.value,
            "most_negative_residual": bottom.residual,
            "most_negative_status": "converged" if extremes.bottom_converged else "unconverged",
            "hvps": extremes.products,
            "status": "inconsistent" if solved.inconsistent else status,
        }

    def report(self, provenance: Provenance, tokens: float | None) -> documents.Report:
        work, found = self.work, self.measured
        self.whole = provenance.data is None
        layers, update = found.layers, found.update
        parameters = self.problem.parameters
        numel = {n: parameters[n].numel() for n in self.names}
        checkpoint = (provenance.checkpoint or _in_memory)(sum(numel.values()), len(layers))
        loss = -found.loss if self.preconditioner.ascends else found.loss
        data = provenance.data(loss) if provenance.data else _batches(self.problem, loss, tokens)
        optimizer = _optimizer(self.preconditioner, provenance.lr_source)
        estimate = documents.Estimate(**self.entry(found.full))
        prefix = work.blocks.prefix if work.blocks else ""
        ends = None
        if found.ends is not None:
            size = sum(numel[n] for n in found.ends.names)
            ends = documents.PartEstimate(**self.entry(found.ends), name=documents.ENDS, parameters=size)
        layer_entries = [
            documents.LayerEstimate(
                **self.entry(s), index=i, name=f"{prefix}.{i}", parameters=sum(numel[n] for n in s.names)
            )
            for i, s in enumerate(layers)
        ]
        curves = documents.Cumulative(
            restricted=[documents.DepthEstimate(**self.entry(s), depth=k) for k, s in enumerate(found.restricted)],
            truncated=[documents.DepthEstimate(**self.entry(s), depth=k) for k, s in enumerate(found.truncated)],
        )
        generalisation = self.generalisation(estimate)
        attribution, participation = self.attribution(found.full)
        points = []
        for share, solved in found.prefixes:
            entry = self.entry(solved)
            usable = entry["status"] == "converged"
            points.append(
                documents.TokensPoint(
                    tokens=round(share * data.tokens),
                    eigenvalue=entry["eigenvalue"] if usable else None,
                    rho=entry["rho"] if usable else None,
                )
            )
        report = documents.Report(
            checkpoint=checkpoint,
            data=data,
            optimizer=optimizer,
            full=estimate,
            ends=ends,
            layers=layer_entries,
            cumulative=curves,
            update=update,
            tokens=points,
            generalisation=generalisation,
            attribution=attribution,
            participation=participation,
            verdict=judge(estimate, generalisation),
            findings=[],
            cost=documents.Cost(
                hvps=work.hvps,
                seconds=time.perf_counter() - work.started,
                peak_memory_bytes=resources.peak_bytes(work.device),
                device=str(work.device),
                mode=work.choice.mode,
                mode_seconds={str(mode): seconds for mode, seconds in work.choice.seconds.items()},
            ),
            versions=documents.Versions.installed(),
        )
        findings = explain(
            report,
            idle=self.preconditioner.idle,
            left_out=len(self.preconditioner.left_out),
            notes=provenance.notes,
            given=(*provenance.findings, *self.preconditioner.findings),
            doubts=self.preconditioner.doubts,
            logged_loss=provenance.logged_loss,
        )
        return report.model_copy(update={"findings": findings})

    def generalisation(self, full: documents.Estimate) -> documents.Generalisation:
        threshold, held_out = self.preconditioner.threshold, self.measured.held_out
        # Of an estimated preconditioner the scale follows the size of the batches that it was estimated on: no bracket
        # holds it, nor that of an update which is not known in full.
        unknown = self.preconditioner.kind == "estimated" or bool(self.preconditioner.doubts)
        if full.rho is None or full.residual is None or threshold is None or unknown:
            return documents.Generalisation(held_out=held_out, rho_low=None, rho_high=None)
        high = full.rho + full.residual / threshold
        if held_out is not None:
            low: float | None = min(held_out / threshold, full.rho)
            high = max(high, held_out / threshold)
        else:
            # One batch in memory is the user's whole problem; one batch of a file is a sample without a check.
            low = full.rho if self.whole and len(self.problem.batches) == 1 else None
        return documents.Generalisation(held_out=held_out, rho_low=low, rho_high=high)

    def attribution(self, full: Solved) -> tuple[list[documents.Attribution], float | None]:
        """Where the top eigenvector lives: by tensor, and by row where rows are tokens or positions."""
        top = full.extremes.top if full.extremes else None
        if top is None:
            return [], None
        kinds = row_kinds(self.problem)
        squares = top.vector.double().square()
        squares /= squares.sum()
        sizes = [self.problem.parameters[n].numel() for n in self.names]
        found = []
        for name, piece in zip(self.names, squares.split(sizes), strict=True):
            parameter = self.problem.parameters[name]
            shape, rows, kind = parameter.shape, None, kinds.get(id(parameter))
            if kind is not None:
                shares, ids = piece.view(shape).sum(dim=1).topk(min(5, shape[0]))
                rows = [(int(i), float(s)) for i, s in zip(ids, shares, strict=True)]
            found.append(documents.Attribution(tensor=display(name), mass=float(piece.sum()), rows=rows, rows_of=kind))
        return sorted(found, key=lambda m: -m.mass), float(1 / squares.square().sum())


def _in_memory(parameters: int, layers: int) -> documents.Checkpoint:
    return documents.Checkpoint(path="(in memory)", format="module", step=None, parameters=parameters, layers=layers)


def _batches(problem: Problem, loss: float, tokens: float | None) -> documents.Data:
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value):
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)

    feed(list(problem.batches))
    count = round(tokens) if tokens is not None else problem.rows
    return documents.Data(path="(in memory)", tokens=count, sequence_length=None, sha256=digest.hexdigest(), loss=loss)


def _optimizer(preconditioner: Preconditioner, lr_source: Any) -> documents.Optimizer:
    def number(key: str) -> float | None:
        value = preconditioner.options.get(key)
        return None if value is None else float(value)

    betas = preconditioner.options.get("betas")
    return documents.Optimizer(
        name=preconditioner.name,
        lr=preconditioner.lr,
        lr_source=lr_source if preconditioner.lr is not None else "none",
        betas=(float(betas[0]), float(betas[1])) if betas is not None else None,
        eps=number("eps"),
        weight_decay=number("weight_decay"),
        momentum=number("momentum"),
        step=preconditioner.step,
        threshold=preconditioner.threshold,
        preconditioner=preconditioner.kind,
    )
