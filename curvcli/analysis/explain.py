"""Why a checkpoint is sharp: where its sharpest direction lies, which data carry it, and what is left without them."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from curvcli import documents
from curvcli.analysis.api import prepared
from curvcli.analysis.budget import Budget
from curvcli.analysis.carriers import Carriers, Predictions, Rest, carriers, rests
from curvcli.analysis.checkpoint import Opened, Options, Ready, open_for_analysis
from curvcli.analysis.document import Provenance, write
from curvcli.analysis.measured import Measured, Solved
from curvcli.analysis.options import options_of
from curvcli.analysis.solve import Measurement
from curvcli.analysis.stages import Progress, products
from curvcli.curvature import resources
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.precision import wide
from curvcli.curvature.spread import spread_gradient
from curvcli.data.examples import IGNORED
from curvcli.data.words import Words, words_of
from curvcli.errors import FullDiskError, OutOfTime, UnsupportedError, memory_named
from curvcli.files.names import unwrapped
from curvcli.judge.limits import certified
from curvcli.models.roles import Roles
from curvcli.models.rows import lookups, row_kinds
from curvcli.optimizers.update import ratios

HEADS, ROWS, SEQUENCES, TOKENS = 20, 10, 5, 5  # how many of each are named
WIDE = 1e-2  # of lambda, by which sequences may add up to something else before it is said
CONTEXT = 12  # tokens before a prediction that are shown with it
# Of the whole work: the solve, the data along its direction, and the solve without each of two parts of them.
_FIRST, _CARRIERS, _REST = 0.35, 0.15, 0.25


def explain(
    path: Path | str, *, budget: Budget | float | None = None, progress: Progress | None = None, **options: Any
) -> documents.Explanation:
    """Why a checkpoint is sharp: `curv explain` from Python.

    Args:
        path: the checkpoint, or a run's directory.
        budget: seconds, after which nothing more is started: what was not reached is left out, and a finding says so.
        progress: called with what is being done and the fraction done.
        **options: by the names of `curvcli.analysis.options.Options` (data, tokens, sequence_length, lr, ...).

    Returns:
        The top eigenvector of what the verdict is on by part, kind of matrix, head and row; the sequences and predictions
        that carry its eigenvalue; and lambda and the verdict without the 1 % of them that carry most.

    Raises:
        CurvError: the checkpoint cannot be read or measured, or an option is none.
        OutOfTime: the budget ran out before the direction was known.
    """
    limit = budget if isinstance(budget, Budget) else Budget(inf if budget is None else budget)
    how = options_of(options, fixed=("depths", "deadline", "truncated", "shard"))
    return explain_checkpoint(Path(path), replace(how, deadline=limit.deadline), progress)


def explain_checkpoint(path: Path, options: Options, progress: Progress | None = None) -> documents.Explanation:
    """As `explain`, of options that are checked."""
    say = progress or (lambda stage, done: None)
    say("reading", 0.0)
    opened = open_for_analysis(path, options)
    options = opened.options
    with memory_named(f"while {opened.checkpoint.path} is explained"):
        ready = opened.ready()
        margin = 3 * options.tolerance
        solver = Lanczos(
            options.tolerance, margin, max_products=options.max_hvps, seed=options.seed or 0, deadline=options.deadline
        )
        return prepared(
            ready.model, opened.loss, ready.batches, ready.optimizer,
            lambda work, notes: _Explainer(work, opened, ready, notes, say).explanation(),
            weights=ready.weights, mode=options.mode, solver=solver, memory=options.memory, depths=False,
            progress=lambda stage, done: say(stage, _FIRST * done),
        )  # fmt: skip


class _Explainer:
    """A measurement that is set up, and has not begun."""

    def __init__(self, work: Measurement, opened: Opened, ready: Ready, notes: dict[str, str], say: Progress) -> None:
        self.work, self.opened, self.ready, self.notes, self.say = work, opened, ready, notes, say
        self.words: Words = words_of(opened.checkpoint)
        self.negated = work.preconditioner.ascends
        self.hvps = 0.0
        self.out_of_time = False
        self.full_disk: FullDiskError | None = None
        if not work.names:
            raise UnsupportedError(
                f"{work.preconditioner.name} has no lambda, whose eigenvector this explains: its step is steepest in a norm",
                hint="curv analyze measures sharpness in that norm; --optimizer none explains the loss's own curvature",
            )
        work.stages.total = products(0)  # of the full model alone, whatever layers there are

    def explanation(self) -> documents.Explanation:
        """Everything, as a document."""
        report, found = self.solved(self.work)
        direction: Literal["full", "body"] = "body" if report.body is not None else "full"
        solved = found.body if found.body is not None else found.full
        vector = solved.extremes.vector if solved.extremes else None
        told: dict[str, Any] = {}
        if vector is not None and report.judged.eigenvalue is not None:
            told = self.masses(vector)
            try:
                told |= self.carried(report, solved, vector)
            except OutOfTime:
                self.out_of_time = True
        self.say("report", 1.0)
        findings = [f for f in report.findings if f.severity != "info" and f.code not in (report.verdict, "disk-full")]
        extra = [*told.pop("findings", []), *self.short()]
        blank: dict[str, Any] = {
            "participation": None, "per": "nothing", "sum": None, "decay": 0.0,
            **{name: [] for name in ("parts", "kinds", "heads", "rows", "sequences", "tokens", "removals")},
        }  # fmt: skip
        cost = report.cost.model_copy(
            update={
                "hvps": round(self.hvps),
                "seconds": time.perf_counter() - self.work.started,
                "peak_memory_bytes": resources.peak_bytes(self.work.device),
            }
        )
        return documents.Explanation(
            checkpoint=report.checkpoint,
            data=report.data,
            optimizer=report.optimizer,
            direction=direction,
            estimate=_plain(report.judged),
            generalisation=report.generalisation,
            verdict=report.verdict,
            findings=[*extra, *findings],
            cost=cost,
            versions=report.versions,
            **{**blank, **told},
        )

    def solved(self, work: Measurement) -> tuple[documents.Report, Measured]:
        """The full model, and its body where rare rows carry it; no layers, no depths."""
        if work.step is not None:
            raise UnsupportedError(
                "what carries curvature is told by exact products, and these are differences of gradients",
                hint="explain it without --mode differences, on fewer tokens (--tokens) or with more --memory",
            )
        work.in_time()
        loss, looked_up = lookups(work.problem)
        found = work.full(work.build(work.problem), loss, looked_up)
        if found.body is not None and found.body.skipped:  # the direction that the verdict is on is not known
            raise OutOfTime
        found.ratios = ratios(work.preconditioner, work.moving, *spread_gradient(work.problem, work.moving))
        self.hvps += work.hvps
        self.full_disk = work.full_disk
        provenance = self.ready.provenance
        said = Provenance(
            provenance.checkpoint, provenance.data, provenance.lr_source, {**provenance.notes, **self.notes},
            provenance.findings, provenance.logged_loss,
        )  # fmt: skip
        return write(work, found, said, None), found

    def short(self) -> list[documents.Finding]:
        """Says that the budget ran out, or the disk was full, where that was so."""
        if not self.out_of_time and self.full_disk is None:
            return []
        left = "which data carry lambda, or what is left without them, was not measured"
        if (full := self.full_disk) is not None:
            message = f"the disk was full: {full.message}; {left}; {full.hint}"
            return [documents.Finding(code="disk-full", severity="warning", message=message)]
        message = f"the budget ran out: {left}; raise it"
        return [documents.Finding(code="out-of-time", severity="warning", message=message)]

    # --- the direction -----------------------------------------------------------------------

    def masses(self, vector: Tensor) -> dict[str, Any]:
        """A unit vector's shares by part, kind, head and row."""
        work, parameters = self.work, self.work.problem.parameters
        kinds_of_rows = row_kinds(work.problem)
        roles = Roles(work.problem.model, kinds_of_rows)
        layer = {n: i for i, names in enumerate(work.layer_names) for n in names}
        prefix = work.blocks.prefix if work.blocks else ""
        parts, kinds = defaultdict[str, float](float), defaultdict[str, float](float)
        heads = defaultdict[tuple[int, int, Any], float](float)
        rows: list[documents.RowMass] = []
        squares = vector.cpu().double().square()
        squares /= squares.sum()
        for name, piece in zip(work.names, squares.split([parameters[n].numel() for n in work.names]), strict=True):
            parameter = parameters[name]
            shaped = piece.view(parameter.shape)
            place = layer.get(name)
            part = roles.outside(name, parameter) if place is None else f"{prefix}.{place}"
            parts[part] += float(piece.sum())
            for share in roles.shares(name, parameter, shaped):
                kinds[share.kind] += share.mass
                for head, mass in enumerate(share.heads or ()):
                    if place is not None:
                        heads[place, head, share.heads_of] += mass
            if (of := kinds_of_rows.get(id(parameter))) is not None:
                rows += self.rows(unwrapped(name), of, shaped.flatten(1).sum(dim=1))
        found = [documents.HeadMass(layer=n, head=h, of=of, mass=mass) for (n, h, of), mass in heads.items()]
        return {
            "participation": float(1 / squares.square().sum()),
            "parts": [documents.Mass(name=name, mass=mass) for name, mass in parts.items()],
            "kinds": sorted((documents.Mass(name=n, mass=m) for n, m in kinds.items()), key=lambda m: -m.mass),
            "heads": sorted(found, key=lambda m: -m.mass)[:HEADS],
            "rows": sorted(rows, key=lambda m: -m.mass)[:ROWS],
        }

    def rows(self, tensor: str, of: Any, masses: Tensor) -> list[documents.RowMass]:
        """The heaviest rows of a matrix."""
        shares, ids = masses.topk(min(ROWS, len(masses)))
        return [
            documents.RowMass(
                tensor=tensor, rows_of=of, row=row, mass=mass, text=self.words([row]) if of == "tokens" else None
            )
            for row, mass in zip(ids.tolist(), shares.tolist(), strict=True)
        ]

    # --- the data ----------------------------------------------------------------------------

    def carried(self, report: documents.Report, solved: Solved, vector: Tensor) -> dict[str, Any]:
        """Which data carry the eigenvalue, and what is left without the top of them."""
        work, value = self.work, solved.value
        root = work.preconditioner.root.restrict(work.names)
        direction = root.lift(vector)
        # A coupled weight decay is part of lambda, but of no sequence's own curvature.
        weights = work.preconditioner.decay
        decay = sum(weights.get(n, 0.0) * float(wide(u).square().sum()) for n, u in direction.items())
        self.say("sequences and predictions", _FIRST)
        work.in_time()
        found = carriers(work.problem, self.opened.loss, self.opened.task, direction, value - decay, negated=self.negated)
        self.hvps += 1  # three backward passes of each prediction's loss, or a product on each sequence
        removals: list[documents.Removal] = []
        try:
            for place, rest in enumerate(rests(work.problem, found, negated=self.negated)):
                removals.append(self.removal(rest, report, _FIRST + _CARRIERS + _REST * place))
        except OutOfTime:  # what was finished stands
            self.out_of_time = True
        except FullDiskError as error:
            self.full_disk = error
        told = found.per != "nothing" and found.total != 0
        return {
            "per": found.per,
            "sum": found.total + decay,
            "decay": decay,
            "sequences": self.sequences(found) if told else [],
            "tokens": self.tokens(found.predictions) if found.predictions and self.opened.task != "classification" else [],
            "removals": removals,
            "findings": _findings(found, removals, report.verdict, value - decay),
        }

    def removal(self, rest: Rest, before: documents.Report, done: float) -> documents.Removal:
        """The verdict on what is left of a shard, solved for anew."""
        work, stage = self.work, f"without {rest.removed:,} of {rest.total:,} {rest.what}"
        again = Measurement(
            # No layers: only the verdict is asked for again.
            rest.problem, work.preconditioner, None, work.solver, work.choice.mode,
            lambda inner, part: self.say(f"{stage}: {inner}", done + _REST * part), depths=False, basis=work.solver.basis,
            offload=work.solver.store is not None, threads=work.threads,
        )  # fmt: skip
        report, _ = self.solved(again)
        if again.full_disk is not None:  # a solve that was not done says nothing of what is left
            raise again.full_disk
        if again.late and not certified(report.judged):  # cut short, and its "unresolved" says nothing of the data
            raise OutOfTime
        return documents.Removal(
            what=rest.what,
            removed=rest.removed,
            total=rest.total,
            share=rest.share,
            estimate=_plain(report.judged),
            generalisation=report.generalisation,
            verdict=report.verdict,
            changes=report.verdict != before.verdict,
        )

    def sequences(self, found: Carriers) -> list[documents.SequenceShare]:
        """Those with the largest shares."""
        shares = found.shares
        tokens = found.predictions
        every = []
        for row in shares.topk(min(SEQUENCES, len(shares))).indices.tolist():
            mine = (tokens.row == row).nonzero().flatten() if tokens is not None else torch.zeros(0, dtype=torch.int64)
            heavy: list[documents.TokenShare] = []
            if tokens is not None and found.per == "prediction":
                top = tokens.curvature[mine].topk(min(TOKENS, len(mine))).indices
                heavy = [self.token(found, tokens, index) for index in mine[top].tolist()]
            every.append(
                documents.SequenceShare(
                    sequence=row,
                    predictions=len(mine) if tokens is not None else 1,
                    loss=float(tokens.loss[mine].mean()) if tokens is not None else None,
                    quotient=float(found.quotients[row]),
                    share=float(shares[row]),
                    tokens=heavy,
                )
            )
        return every

    def token(self, found: Carriers, tokens: Predictions, index: int) -> documents.TokenShare:
        """One prediction."""
        row, position, label = (int(column[index]) for column in (tokens.row, tokens.position, tokens.label))
        return documents.TokenShare(
            sequence=row,
            position=position,
            token=label,
            text=None if self.opened.task == "classification" else self.words([label]),
            context=self.context(found, row, position),
            loss=float(tokens.loss[index]),
            curvature=float(tokens.curvature[index]),
            share=float(tokens.curvature[index] / tokens.curvature.sum()),
        )

    def context(self, found: Carriers, row: int, position: int) -> str | None:
        """What stands before a prediction: the inputs up to it, or a decoder's own labels."""
        columns, task = found.columns or {}, self.opened.task
        labels, ids = columns["labels"][row], columns.get("input_ids")
        # A causal model has seen the input at the position it predicts from; a masked token or a decoder's label it has not.
        own = task != "seq2seq" and ids is not None and ids[row].shape == labels.shape
        end = position + (1 if own and task in ("causal-lm", "classification") else 0)
        before = (ids[row] if own and ids is not None else labels)[max(0, end - CONTEXT) : end].tolist()
        return self.words([i for i in before if i != IGNORED])

    def tokens(self, tokens: Predictions) -> list[documents.TokenKind]:
        """The labels with the largest shares, over all of their predictions."""
        labels, place = tokens.label.unique(return_inverse=True)
        sums = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, place, tokens.curvature)
        counts = torch.bincount(place, minlength=len(labels))
        total = float(sums.sum())
        return [
            documents.TokenKind(
                token=int(labels[i]), text=self.words([int(labels[i])]), count=int(counts[i]), share=float(sums[i]) / total
            )
            for i in sums.topk(min(TOKENS, len(labels))).indices.tolist()
        ]


def _plain(estimate: documents.Estimate) -> documents.Estimate:
    """Without what a body says besides."""
    return documents.Estimate(**{name: getattr(estimate, name) for name in documents.Estimate.model_fields})


def _findings(found: Carriers, removals: list[documents.Removal], verdict: str, expected: float) -> list[documents.Finding]:
    """What a reader should know of the shares and of the verdict's ground."""
    few = [
        f"without {r.removed:,} of {r.total:,} {r.what}, which have {r.share:.0%} of lambda, the verdict is {r.verdict} "
        f"and not {verdict}"
        for r in removals
        if r.changes
    ]
    every = [documents.Finding(code="verdict-of-few", severity="warning", message=message) for message in few]
    if found.why:
        told = "not told apart" if found.per == "nothing" else "told apart by sequences, with a product on each"
        message = f"lambda is {told}: {found.why}"
        every.append(documents.Finding(code="predictions-together", severity="info", message=message))
    if abs(found.total - expected) > WIDE * abs(expected):
        message = f"sequences add up to {found.total:.4g} where lambda is {expected:.4g}: do not rely on their shares"
        every.append(documents.Finding(code="sum-apart", severity="warning", message=message))
    return every
