"""The report: what was solved for, as a document."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from curvcli import documents
from curvcli.analysis.measured import Measured, Solved
from curvcli.analysis.solve import Measurement
from curvcli.analysis.steepest import Norms
from curvcli.curvature import resources
from curvcli.curvature.folds import CONFIDENCE
from curvcli.curvature.problem import Problem
from curvcli.curvature.scratch import let_go
from curvcli.files.names import unwrapped
from curvcli.judge.calibration import calibrated
from curvcli.judge.clipping import lowest
from curvcli.judge.course import Logged, doubted, loss_course
from curvcli.judge.findings import explain
from curvcli.judge.limits import highest
from curvcli.judge.verdict import judge
from curvcli.models.rows import row_kinds
from curvcli.optimizers.preconditioner import Preconditioner


@dataclass(frozen=True)
class Provenance:
    """What the report says of its inputs, where they are files.

    Args:
        unigram: entropy of the shard's targets by their frequencies, in nats; None where there is none.
    """

    checkpoint: Callable[[int, int], documents.Checkpoint] | None = None
    data: Callable[[float], documents.Data] | None = None
    lr_source: Literal["checkpoint", "log", "schedule", "option", "optimizer", "none"] = "optimizer"
    notes: dict[str, str] = field(default_factory=dict)
    findings: tuple[documents.Finding, ...] = ()
    logged_loss: float | None = None
    log: Sequence[Logged] = ()
    unigram: float | None = None


def write(work: Measurement, found: Measured, provenance: Provenance, tokens: float | None) -> documents.Report:
    """The report of a finished measurement.

    Args:
        provenance: what is said of the inputs; without checkpoint and data of its own they are those in memory.
        tokens: predictions that the loss averages over, where known; otherwise the rows of the batches are counted.
    """
    return _Writer(work, found).report(provenance, tokens)


class _Writer:
    """A finished measurement as a document."""

    def __init__(self, work: Measurement, measured: Measured) -> None:
        self.work, self.measured = work, measured
        self.preconditioner, self.problem, self.names = work.preconditioner, work.problem, work.names
        self.whole = True

    def entry(self, solved: Solved, steepest: documents.Steepest | None = None) -> dict[str, Any]:
        """The fields of an Estimate; values that mean nothing stay null."""
        return {**self.values(solved), "steepest": steepest}

    def values(self, solved: Solved) -> dict[str, Any]:
        """Those of the eigensolver."""
        extremes = solved.extremes
        empty = dict.fromkeys(documents.Estimate.model_fields)
        if extremes is None:
            return {**empty, "hvps": 0, "status": "skipped" if solved.skipped else "empty"}
        # Products that are not symmetric have no real spectrum to report, whatever numbers came out.
        if extremes.top is None or extremes.status == "asymmetric":
            return {**empty, "hvps": extremes.products, "status": extremes.status}
        top, bottom, threshold = extremes.top, extremes.bottom, self.preconditioner.threshold
        status = "converged" if extremes.status == "converged" else "unconverged"
        return {
            "eigenvalue": top.value,
            "rho": top.value / threshold if threshold is not None else None,
            "residual": top.residual,
            "most_negative": bottom.value if bottom else None,
            "most_negative_residual": bottom.residual if bottom else None,
            "most_negative_status": None if bottom is None else "converged" if extremes.bottom_converged else "unconverged",
            "hvps": extremes.products,
            "status": "inconsistent" if solved.inconsistent else status,
            "ceiling": extremes.ceiling if extremes.ceiling < inf else None,
        }

    def report(self, provenance: Provenance, tokens: float | None) -> documents.Report:
        work, found = self.work, self.measured
        self.whole = provenance.data is None  # in memory: the batches are all of the data, not a sample of it
        layers, update = found.layers, found.update
        parameters = self.problem.parameters
        numel = {n: parameters[n].numel() for n in work.moving}
        checkpoint = (provenance.checkpoint or _in_memory)(sum(numel.values()), len(layers))
        # With `maximize` minus the loss was measured; the report gives the loss itself.
        loss = -found.loss if self.preconditioner.ascends else found.loss
        data = provenance.data(loss) if provenance.data else _batches(self.problem, loss, tokens)
        optimizer = _optimizer(self.preconditioner, provenance.lr_source, found.ratios)
        norm = Norms(found.norm, work.preconditioner, optimizer, sizes=numel, step=checkpoint.step)
        partial = bool(work.preconditioner.balls)
        estimate = documents.Estimate(**self.entry(found.full, norm.full))
        prefix = work.blocks.prefix if work.blocks else ""
        ends = None
        if found.ends is not None:
            size = sum(numel[n] for n in work.outer_moving)
            ends = documents.PartEstimate(
                **self.entry(found.ends, norm.ends(work.outer_moving)), name=documents.ENDS, parameters=size
            )
        layer_entries = [
            documents.LayerEstimate(
                **self.entry(s, norm.layer(i, work.layer_moving[i])),
                index=i,
                name=f"{prefix}.{i}",
                parameters=sum(numel[n] for n in work.layer_moving[i]),
                companions=found.beside[i] if found.beside else None,
            )
            for i, s in enumerate(layers)
        ]
        curves = documents.Cumulative(
            restricted=[
                documents.DepthEstimate(**self.entry(s, norm.depth(k, len(layers))), depth=k)
                for k, s in found.restricted.items()
            ],
            truncated=[documents.DepthEstimate(**self.entry(s), depth=k) for k, s in enumerate(found.truncated)],
        )
        body = None
        if found.body is not None:
            body = documents.BodyEstimate(**self.entry(found.body), rows=sum(found.rare.values()))
        generalisation = self.generalisation(body or estimate, optimizer)
        told = calibrated(
            body or estimate,
            generalisation,
            optimizer,
            step=checkpoint.step,
            parameters=checkpoint.parameters,
            doubts=bool(self.preconditioner.doubts),
            partial=partial,
        )
        verdict = judge(
            body or estimate,
            generalisation,
            early=told.early,
            odds=told.odds,
            odds_at_most=told.odds_at_most,
            partial=partial,
        )
        attribution, participation = self.attribution(found.full)
        course = loss_course(provenance.log, shard_loss=loss, unigram=data.unigram_loss, step=checkpoint.step)
        lost = course is not None and course.lost  # the rho of a lost network vouches for no learning rate
        report = documents.Report(
            checkpoint=checkpoint,
            data=data,
            optimizer=optimizer,
            full=estimate,
            body=body,
            ends=ends,
            layers=layer_entries,
            cumulative=curves,
            update=update,
            companions=found.companions,
            tokens=self.prefixes(body or estimate, data.tokens),
            generalisation=generalisation,
            attribution=attribution,
            participation=participation,
            verdict=doubted(verdict, course),
            steepest=norm.model,
            stable_lr=None if lost else told.stable_lr,
            odds=None if lost else told.odds,
            findings=[],
            course=course,
            cost=documents.Cost(
                hvps=round(work.hvps),  # folds count as shares of a product
                seconds=time.perf_counter() - work.started,
                peak_memory_bytes=work.peak or resources.peak_bytes(work.device),  # of an early report, that so far
                device=str(work.device),
                mode=work.choice.mode,
                ranks=work.ranks.world,
                mode_seconds={str(mode): seconds for mode, seconds in work.choice.seconds.items()},
            ),
            versions=documents.Versions.installed(),
        )
        findings = explain(
            report,
            idle=self.preconditioner.idle,
            left_out=len(self.preconditioner.left_out),
            notes={**provenance.notes, **work.notes, **self.left_out()},
            given=(*provenance.findings, *self.preconditioner.findings),
            doubts=self.preconditioner.doubts,
            logged_loss=provenance.logged_loss,
            full_disk=work.full_disk,
        )
        return report.model_copy(update={"findings": findings})

    def left_out(self) -> dict[str, str]:
        """Why networks cut short were not measured, where that is their loss."""
        if self.work.cut is None or self.work.cuts:
            return {}
        return {"truncated-left-out": self.work.cut.why_not(negated=self.preconditioner.ascends)}

    def generalisation(self, judged: documents.Estimate, optimizer: documents.Optimizer) -> documents.Generalisation:
        """The bracket, from what rho is where it is too high by as much as it may be."""
        threshold, folds = self.preconditioner.threshold, self.measured.folds
        spread = folds.spread() if folds and judged.status == "converged" else None
        said: dict[str, Any] = {"held_out": None, "rho_low": None, "rho_high": None}
        if spread:
            said.update(held_out=spread.held_out, standard_error=spread.error, folds=spread.folds, confidence=CONFIDENCE)
        # Of an estimated preconditioner the scale follows the size of the batches that it was estimated on: no bracket
        # holds it, nor that of an update which is not known in full.
        unknown = self.preconditioner.kind == "estimated" or bool(self.preconditioner.doubts)
        value, most = judged.eigenvalue, highest(judged)
        if value is None or most is None or threshold is None or unknown:
            return documents.Generalisation(**said)
        if spread:
            low, high = spread.bracket(value, most - value)
            return documents.Generalisation(
                **{**said, "rho_low": lowest(low / threshold, optimizer), "rho_high": high / threshold}
            )
        # One batch in memory is the user's whole problem; one batch of a file is a sample without a check.
        whole = self.whole and len(self.problem.batches) == 1
        rho = None if judged.rho is None else lowest(judged.rho, optimizer)
        return documents.Generalisation(**{**said, "rho_low": rho if whole else None, "rho_high": most / threshold})

    def prefixes(self, judged: documents.Estimate, tokens: int) -> list[documents.TokensPoint]:
        """The top eigenvalue on a quarter, half and all of the shard."""
        folds, threshold = self.measured.folds, self.preconditioner.threshold
        value = judged.eigenvalue if judged.status == "converged" else None
        points = [(1.0, value)]
        if folds and value is not None:
            count = len(folds.weights)
            # Rounded up to at least one fold; all folds together are the last point already.
            points = [*(folds.prefix(part) for part in sorted({-(-count // 4), -(-count // 2)} - {count})), *points]
        return [
            documents.TokensPoint(
                tokens=round(share * tokens),
                eigenvalue=value,
                rho=None if value is None or not threshold else value / threshold,
            )
            for share, value in points
        ]

    def attribution(self, full: Solved) -> tuple[list[documents.Attribution], float | None]:
        """Where the top eigenvector lives: by tensor, and by row where rows are tokens or positions."""
        vector = full.extremes.vector if full.extremes else None
        if vector is None:
            return [], None
        kinds = row_kinds(self.problem)
        root = self.preconditioner.root.restrict(self.names)
        each, shards = root.holders.each, root.shards
        pieces = vector.split(root.sizes)
        # Its norm is 1 up to float32's rounding. Piece by piece: in float64 the whole would be as much as four vectors.
        size = sum(each(sum(float(piece.cpu().double().square().sum()) for piece in pieces)))
        found, fourths = [], 0.0
        for name, part in zip(self.names, pieces, strict=True):
            parameter, own = self.problem.parameters[name], part.cpu().double().square() / size
            piece = own if shards is None else shards.gather([name], [own])[0].reshape(-1)
            fourths += float(own.square().sum())
            shape, rows, kind = parameter.shape, None, kinds.get(id(parameter))
            if kind is not None:
                shares, ids = piece.view(shape).sum(dim=1).topk(min(5, shape[0]))
                rows = [(int(i), float(s)) for i, s in zip(ids, shares, strict=True)]
            found.append(documents.Attribution(tensor=unwrapped(name), mass=float(piece.sum()), rows=rows, rows_of=kind))
        # The participation ratio: 1 if one entry has all, n if all have the same.
        let_go(vector)
        return sorted(found, key=lambda m: -m.mass), 1 / sum(each(fourths))


def _in_memory(parameters: int, layers: int) -> documents.Checkpoint:
    return documents.Checkpoint(path="(in memory)", format="module", step=None, parameters=parameters, layers=layers)


def _batches(problem: Problem, loss: float, tokens: float | None) -> documents.Data:
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            # As bytes: numpy has no bfloat16.
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):  # not dicts alone: a tokenizer's BatchEncoding is none
            for key in sorted(value):
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)

    feed(list(problem.batches))
    count = round(tokens) if tokens is not None else problem.rows
    return documents.Data(path="(in memory)", tokens=count, sequence_length=None, sha256=digest.hexdigest(), loss=loss)


def _optimizer(preconditioner: Preconditioner, lr_source: Any, ratios: tuple[float, float] | None) -> documents.Optimizer:
    def number(key: str) -> float | None:
        value = preconditioner.options.get(key)
        return None if value is None or isinstance(value, (tuple, list)) else float(value)  # Adafactor has two eps

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
        clip=preconditioner.clip,
        gradient_ratio=ratios[0] if ratios else None,
        batch_ratio=ratios[1] if ratios else None,
    )
