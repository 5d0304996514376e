"""The measurement: a problem and an optimizer in, a report out."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvcli import resources, results
from curvcli.curvature.davidson import Davidson, Extremes
from curvcli.curvature.hvp import HVP, Choice, Mode, build, choose
from curvcli.curvature.operator import PreconditionedHessian
from curvcli.curvature.problem import Blocks, Loss, Problem, gradient
from curvcli.errors import UsageError
from curvcli.inputs.blocks import display, find_blocks, locate
from curvcli.optimizers.base import OptimizerView
from curvcli.optimizers.preconditioner import Preconditioner, estimate, identity, live, override, prepare
from curvcli.verdict import explain, judge

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Estimated:
    """In place of optimizer state that was not saved: estimate Adam's from the data, with these options."""

    options: dict[str, Any] = field(default_factory=lambda: {"betas": (0.9, 0.999), "eps": 1e-8})


@dataclass(frozen=True)
class Provenance:
    """What the report says of its inputs, where they are files."""

    checkpoint: Callable[[int, int], results.Checkpoint] | None = None
    data: Callable[[float], results.Data] | None = None
    lr_source: Literal["checkpoint", "log", "option", "optimizer", "none"] = "optimizer"
    notes: dict[str, str] = field(default_factory=dict)


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
    provenance: Provenance | None = None,
) -> results.Report:
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
        lr: learning rate to use instead of the optimizer's.
        mode: how Hessian-vector products are made; "auto" times the exact ones and takes the fastest.
        tolerance: residual over lambda at which an estimate counts as converged.
        max_hvps: products that one estimate may take.
        progress: called with what is being done and the fraction done.

    Returns:
        The report, whose statuses say what could be estimated.

    Raises:
        UsageError: arguments that contradict each other.
        UnsupportedError: an optimizer without a threshold, or a model without second derivatives.
    """
    if tolerance <= 0 or max_hvps < 3:
        raise UsageError("tolerance must be positive and max_hvps at least 3", hint="the defaults are 0.01 and 100")
    module: nn.Module = getattr(model, "_orig_mod", model)  # torch.compile's graph has no second derivative
    with _measurable(module):
        problem = Problem.create(module, loss, batches, weights)
        metric = _metric(problem, optimizer, lr)
        blocks = locate(module, layers) if layers is not None else find_blocks(module)
        solver = Davidson(tolerance=tolerance, max_products=max_hvps, seed=seed)
        work = _Measurement(problem, metric, blocks, solver, mode, progress or (lambda stage, done: None))
        return work.report(provenance or Provenance(), sum(weights) if weights else None)


@contextmanager
def _measurable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient checkpointing within, the user's modes restored after."""
    modes = {m: m.training for m in model.modules()}
    checkpointing = {m: m.gradient_checkpointing for m in model.modules() if getattr(m, "gradient_checkpointing", False)}
    for module in checkpointing:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _metric(
    problem: Problem, optimizer: torch.optim.Optimizer | OptimizerView | Estimated | None, lr: float | None
) -> Preconditioner:
    parameters = problem.parameters
    if not parameters:
        raise UsageError("no parameter of the model requires a gradient", hint="unfreeze what is to be measured")
    if optimizer is None:
        return identity(parameters)
    if isinstance(optimizer, Estimated):
        return prepare(override(estimate(problem, optimizer.options), lr=lr), parameters, kind="estimated")
    view = live(optimizer, parameters) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    return prepare(override(view, lr=lr), parameters)


@dataclass
class _Solved:
    """An estimate's raw form: the pairs, and the names that its vectors run over."""

    names: list[str]
    extremes: Extremes | None
    inconsistent: bool = False

    @property
    def value(self) -> float:
        top = self.extremes.top if self.extremes else None
        return top.value if top else float("-inf")

    @property
    def slack(self) -> float:
        top = self.extremes.top if self.extremes else None
        return top.residual if top else 0.0


class _Measurement:
    def __init__(
        self,
        problem: Problem,
        metric: Preconditioner,
        blocks: Blocks | None,
        solver: Davidson,
        mode: Mode | Literal["auto"],
        progress: Progress,
    ) -> None:
        self.problem, self.metric, self.blocks, self.solver = problem, metric, blocks, solver
        self.started = time.perf_counter()
        self.hvps = 0
        self.stages = _Stages(len(blocks.modules) if blocks else 0, progress)
        self.names = [n for n in problem.parameters if n in metric.scale]
        of_block = [{id(p) for p in block.parameters()} for block in (blocks.modules if blocks else ())]
        self.layer_names = [[n for n in self.names if id(problem.parameters[n]) in ids] for ids in of_block]
        inside = {n for names in self.layer_names for n in names}
        self.outer = [n for n in self.names if n not in inside]
        device = next(iter(problem.parameters.values())).device
        resources.reset_peak(device)
        self.stages.enter("choosing how to multiply")
        self.choice: Choice = choose(problem, mode=mode, memory=resources.free_bytes(device))
        size = sum(problem.parameters[n].numel() for n in self.names)
        itemsize = next(iter(problem.parameters.values())).element_size()
        room = int(resources.free_bytes(device) / 4 / (2 * size * itemsize))
        self.solver = replace(solver, basis=min(max(room, 6), 24))
        self.device = device

    # --- solving -----------------------------------------------------------------------------

    def operator(self, hvp: HVP, names: Sequence[str]) -> PreconditionedHessian:
        return PreconditionedHessian(hvp, names, dict(self.metric.scale), dict(self.metric.decay))

    def solve(self, hvp: HVP, names: list[str], start: Sequence[tuple[Sequence[str], Tensor]] = ()) -> _Solved:
        """Both ends of the spectrum over `names`, from vectors over other names carried over."""
        if not names:
            return _Solved(names, None)
        operator = self.operator(_Counting(hvp, self), names)
        vectors = [self.carry(operator, source, vector) for source, vector in start]
        return _Solved(names, self.solver.extremes(operator, vectors))

    def carry(self, operator: PreconditionedHessian, names: Sequence[str], vector: Tensor) -> Tensor:
        sizes = {n: p.numel() for n, p in self.problem.parameters.items()}
        return operator.carry(vector, names, sizes)

    def ends(self, *solved: _Solved) -> list[tuple[Sequence[str], Tensor]]:
        """Start vectors: the eigenvectors found at both ends."""
        found = [(s.names, s.extremes) for s in solved if s.extremes]
        return [(names, pair.vector) for names, e in found for pair in (e.top, e.bottom) if pair]

    # --- the parts ---------------------------------------------------------------------------

    def report(self, provenance: Provenance, tokens: float | None) -> results.Report:
        self.stages.enter("gradient")
        gradients = gradient(self.problem, self.names)
        loss = self.problem.mean_loss()
        hvp = build(self.problem, self.choice.mode)
        ladder, held_out = self.ladder(hvp)
        hint = ladder[-1][1] if ladder else None
        layers = self.layers(hvp, hint)
        restricted = self.restricted(hvp, hint, layers)
        full = restricted[-1]
        ladder.append((1.0, full))
        update = self.update(hvp, gradients)
        del hvp  # its graphs make room for those of the shortened networks
        truncated = self.truncated(full)
        return self.assemble(provenance, tokens, loss, ladder, held_out, full, update, layers, restricted, truncated)

    def ladder(self, hvp: HVP) -> tuple[list[tuple[float, _Solved]], float | None]:
        """The full model on growing prefixes of the shard, each warm from the last; and the held-out quotient."""
        count = len(self.problem.batches)
        half = -(-count // 2)
        solved: list[tuple[float, _Solved]] = []
        held_out: float | None = None
        for prefix in sorted({-(-count // 4), half} - {count}):
            self.stages.enter("full model on part of the shard")
            answer = self.solve(hvp.subset(range(prefix)), self.names, self.ends(*(s for _, s in solved[-1:])))
            solved.append((sum(self.problem.weights[:prefix]), answer))
            if prefix == half and answer.extremes and answer.extremes.top:
                rest = self.operator(_Counting(hvp.subset(range(prefix, count)), self), self.names)
                vector = answer.extremes.top.vector
                quotient = float(vector @ rest.matvec(vector))
                held_out = quotient if abs(quotient) < float("inf") else None
        return solved, held_out

    def update(self, hvp: HVP, gradients: list[Tensor]) -> results.Update:
        """Curvature along the optimizer's own next step (one product)."""
        if self.metric.direction is None or self.metric.rate is None:
            return results.Update(critical_lr=None, ratio=None, status="unavailable")
        self.stages.enter("next update")
        step = [self.metric.direction[n] for n in self.names]
        decays = [self.metric.decay.get(n, 0.0) for n in self.names]
        weights = [self.problem.parameters[n].detach() for n in self.names]
        image = _Counting(hvp, self).product(self.names, step)
        # A coupled weight decay is part of the function that the optimizer descends.
        slope = sum(float(((g + d * w) * u).sum()) for g, d, w, u in zip(gradients, decays, weights, step, strict=True))
        bend = sum(float(((h.detach() + d * u) * u).sum()) for h, d, u in zip(image, decays, step, strict=True))
        if slope <= 0:
            return results.Update(critical_lr=None, ratio=None, status="uphill")
        if bend <= 0:
            return results.Update(critical_lr=None, ratio=None, status="concave")
        critical = 2 * slope / bend
        return results.Update(critical_lr=critical, ratio=self.metric.rate / critical, status="ok")

    def layers(self, hvp: HVP, hint: _Solved | None) -> list[_Solved]:
        """Each block alone, the rest of the network held still."""
        solved = []
        for i, names in enumerate(self.layer_names):
            self.stages.enter(f"layer {i}")
            solved.append(self.solve(hvp, names, self.ends(*([hint] if hint else []))))
        return solved

    def restricted(self, hvp: HVP, hint: _Solved | None, layers: list[_Solved]) -> list[_Solved]:
        """Embedding, head and the first k blocks of the intact network; the last is the full model.

        One basis serves all depths, so the curve cannot fall. It takes in each block's own top
        vector, so that it does not stay under any of its blocks either (Cauchy interlacing).
        """
        operator = self.operator(_Counting(hvp, self), self.names)
        depths = range(len(layers) + 1)

        def supports() -> Iterator[tuple[Tensor, list[Tensor]]]:
            for depth in depths:
                last = depth == depths[-1]
                self.stages.enter("full model" if last else f"restricted to depth {depth}")
                mask = operator.mask(self.upto(depth))
                start = self.ends(*([hint] if hint and (depth == 0 or last) else []))
                start += self.ends(layers[depth - 1])[:1] if depth else []
                yield mask, [self.carry(operator, names, vector) * mask for names, vector in start]

        found = self.solver.nested(operator, supports())
        curve = [_Solved(self.names if self.upto(k) else [], e) for k, e in zip(depths, found, strict=True)]
        for depth, solved in enumerate(curve):
            lower = [*curve[depth - 1 : depth], *layers[:depth]] if depth else []
            solved.inconsistent = any(_violates(part, solved) for part in lower)
        return curve

    def truncated(self, full: _Solved) -> list[_Solved]:
        """The network of the first k blocks alone; the last is the full model."""
        if not self.blocks:
            return []
        curve: list[_Solved] = []
        for depth in range(len(self.layer_names)):
            self.stages.enter(f"truncated at depth {depth}")
            hvp = build(self.problem.truncated(self.blocks, depth), self.choice.mode)
            curve.append(self.solve(hvp, self.upto(depth), self.ends(full, *curve[-1:])))
        return [*curve, full]

    def upto(self, depth: int) -> list[str]:
        inside = {n for names in self.layer_names[:depth] for n in names} | set(self.outer)
        return [n for n in self.names if n in inside]

    # --- the document ------------------------------------------------------------------------

    def entry(self, solved: _Solved) -> dict[str, Any]:
        """The fields of an Estimate; values that mean nothing stay null."""
        extremes = solved.extremes
        empty = dict.fromkeys(results.Estimate.model_fields)
        if extremes is None:
            return {**empty, "hvps": 0, "status": "empty"}
        if extremes.top is None or extremes.bottom is None or extremes.status == "asymmetric":
            return {**empty, "hvps": extremes.products, "status": extremes.status}
        top, bottom, threshold = extremes.top, extremes.bottom, self.metric.threshold
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

    def assemble(
        self,
        provenance: Provenance,
        tokens: float | None,
        loss: float,
        ladder: list[tuple[float, _Solved]],
        held_out: float | None,
        full: _Solved,
        update: results.Update,
        layers: list[_Solved],
        restricted: list[_Solved],
        truncated: list[_Solved],
    ) -> results.Report:
        self.stages.enter("report")
        parameters = self.problem.parameters
        numel = {n: parameters[n].numel() for n in self.names}
        checkpoint = (provenance.checkpoint or _in_memory)(sum(numel.values()), len(layers))
        data = provenance.data(loss) if provenance.data else _batches(self.problem, loss, tokens)
        optimizer = _optimizer(self.metric, provenance.lr_source)
        estimate = results.Estimate(**self.entry(full))
        prefix = self.blocks.prefix if self.blocks else ""
        layer_entries = [
            results.LayerEstimate(**self.entry(s), index=i, name=f"{prefix}.{i}", parameters=sum(numel[n] for n in s.names))
            for i, s in enumerate(layers)
        ]
        curves = results.Cumulative(
            restricted=[results.DepthEstimate(**self.entry(s), depth=k) for k, s in enumerate(restricted)],
            truncated=[results.DepthEstimate(**self.entry(s), depth=k) for k, s in enumerate(truncated)],
        )
        generalisation = self.generalisation(estimate, held_out)
        attribution, participation = self.attribution(full)
        points = []
        for share, solved in ladder:
            entry = self.entry(solved)
            usable = entry["status"] == "converged"
            points.append(
                results.TokensPoint(
                    tokens=round(share * data.tokens),
                    eigenvalue=entry["eigenvalue"] if usable else None,
                    rho=entry["rho"] if usable else None,
                )
            )
        verdict = judge(estimate, generalisation)
        findings = explain(
            verdict=verdict,
            checkpoint=checkpoint,
            data=data,
            optimizer=optimizer,
            full=estimate,
            layers=layer_entries,
            cumulative=curves,
            update=update,
            generalisation=generalisation,
            attribution=attribution,
            idle=self.metric.idle,
            left_out=len(self.metric.left_out),
            notes=provenance.notes,
        )
        return results.Report(
            checkpoint=checkpoint,
            data=data,
            optimizer=optimizer,
            full=estimate,
            layers=layer_entries,
            cumulative=curves,
            update=update,
            tokens=points,
            generalisation=generalisation,
            attribution=attribution,
            participation=participation,
            verdict=verdict,
            findings=findings,
            cost=results.Cost(
                hvps=self.hvps,
                seconds=time.perf_counter() - self.started,
                peak_memory_bytes=resources.peak_bytes(self.device),
                device=str(self.device),
                mode=self.choice.mode,
                mode_seconds={str(mode): seconds for mode, seconds in self.choice.seconds.items()},
            ),
            versions=results.Versions.model_validate({**resources.versions(), "python": platform.python_version()}),
        )

    def generalisation(self, full: results.Estimate, held_out: float | None) -> results.Generalisation:
        threshold = self.metric.threshold
        if full.rho is None or full.residual is None or threshold is None:
            return results.Generalisation(held_out=held_out, rho_low=None, rho_high=None)
        low = full.rho if held_out is None else min(held_out / threshold, full.rho)
        return results.Generalisation(held_out=held_out, rho_low=low, rho_high=full.rho + full.residual / threshold)

    def attribution(self, full: _Solved) -> tuple[list[results.Mass], float | None]:
        """Where the top eigenvector lives: by tensor, and by token row where rows are tokens."""
        top = full.extremes.top if full.extremes else None
        if top is None:
            return [], None
        vocabularies = {m.num_embeddings for m in self.problem.model.modules() if isinstance(m, nn.Embedding)}
        squares = top.vector.double().square()
        squares /= squares.sum()
        sizes = [self.problem.parameters[n].numel() for n in self.names]
        found = []
        for name, piece in zip(self.names, squares.split(sizes), strict=True):
            shape = self.problem.parameters[name].shape
            rows = None
            if len(shape) == 2 and shape[0] in vocabularies:
                shares, ids = piece.view(shape).sum(dim=1).topk(min(5, shape[0]))
                rows = [(int(i), float(s)) for i, s in zip(ids, shares, strict=True)]
            found.append(results.Mass(tensor=display(name), mass=float(piece.sum()), rows=rows))
        return sorted(found, key=lambda m: -m.mass), float(1 / squares.square().sum())


class _Counting:
    """An engine that counts its products and moves the progress on."""

    def __init__(self, hvp: HVP, work: _Measurement) -> None:
        self.hvp, self.work = hvp, work

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        self.work.hvps += 1
        self.work.stages.tick()
        return self.hvp.product(names, tangents)

    def subset(self, indices: Sequence[int]) -> HVP:
        return _Counting(self.hvp.subset(indices), self.work)


class _Stages:
    """Progress in stages whose cost is guessed beforehand in products of the full model."""

    def __init__(self, layers: int, progress: Progress) -> None:
        self.progress = progress
        self.total = 14.0 + layers * (6 + 5 + 5)
        self.done, self.planned, self.ticks, self.name = 0.0, 0.0, 0, ""

    def enter(self, name: str) -> None:
        self.done += self.planned
        kind = name.split()[0]
        self.planned = {"full": 4.0, "layer": 6.0, "restricted": 5.0, "truncated": 5.0}.get(kind, 1.0)
        self.ticks, self.name = 0, name
        self._say()

    def tick(self) -> None:
        self.ticks += 1
        self._say()

    def _say(self) -> None:
        # Within a stage: towards its planned cost and never past it, however many products it takes.
        within = self.planned * (1 - 0.75**self.ticks)
        self.progress(self.name, min((self.done + within) / self.total, 1.0))


def _violates(lower: _Solved, upper: _Solved) -> bool:
    """Whether `upper`, over more parameters, came out below `lower` by more than rounding."""
    if lower.extremes is None or upper.extremes is None or lower.inconsistent:
        return False
    return upper.value < lower.value - upper.slack - 1e-5 * abs(lower.value)


def _in_memory(parameters: int, layers: int) -> results.Checkpoint:
    return results.Checkpoint(path="(in memory)", format="module", step=None, parameters=parameters, layers=layers)


def _batches(problem: Problem, loss: float, tokens: float | None) -> results.Data:
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
    return results.Data(path="(in memory)", tokens=count, sequence_length=None, sha256=digest.hexdigest(), loss=loss)


def _optimizer(metric: Preconditioner, lr_source: Any) -> results.Optimizer:
    def number(key: str) -> float | None:
        value = metric.options.get(key)
        return None if value is None else float(value)

    betas = metric.options.get("betas")
    return results.Optimizer(
        name=metric.name,
        lr=metric.rate,
        lr_source=lr_source if metric.rate is not None else "none",
        betas=(float(betas[0]), float(betas[1])) if betas is not None else None,
        eps=number("eps"),
        weight_decay=number("weight_decay"),
        momentum=number("momentum"),
        step=metric.step,
        threshold=metric.threshold,
        preconditioner=metric.kind,
    )
