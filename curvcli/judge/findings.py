"""Findings: pure functions from measured results to what explains them and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from curvcli.documents import (
    Attribution,
    Estimate,
    Finding,
    Optimizer,
    PartEstimate,
    Report,
    Severity,
    Update,
)
from curvcli.errors import FullDiskError
from curvcli.judge.calibration import settled_after
from curvcli.judge.clipping import clipping_findings, counted, unknown
from curvcli.judge.course import course_findings
from curvcli.judge.limits import STABLE_BELOW, at_rounding, certified, classify
from curvcli.judge.steepest import headline, steepest_findings
from curvcli.judge.unfinished import remedy, unfinished

# The shard's loss over the last one logged, or the other way round, and nats between them, from which on the two are taken
# for those of different things (docs/reference/findings.md).
LOSS_APART, NATS_APART = 1.4, 0.1
# What stands in for a learning rate of 0, by where it is from.
_ENDED = {"log": "the last one logged", "schedule": "its log has none, and that of the last step by the run's arguments"}


def explain(
    report: Report,
    *,
    idle: int,
    left_out: int,
    notes: dict[str, str],
    given: Sequence[Finding] = (),
    doubts: Sequence[str] = (),
    logged_loss: float | None = None,
    full_disk: FullDiskError | None = None,
) -> list[Finding]:
    """Findings in plain words, the verdict's own first, the others by severity.

    Args:
        report: complete but for its findings.
        idle: weights that never had a gradient; left_out: tensors that the optimizer does not move.
        notes: what the checkpoint's reader knows, by code.
        given: findings made before the measurement, on the files themselves.
        doubts: the optimizer's options and state that may change its update, and that are not known.
        logged_loss: last training loss in the run's own log, in nats per token.
        full_disk: what ended the measurement before it was done, if it was that.
    """
    found = [*given, *_loss(report.data.loss, logged_loss)]
    found += _preconditioner(report.optimizer, idle, left_out, notes, any(f.code == "projected-updates" for f in given))
    found += _update(report.update)
    found += _body(report)
    found += _shape(report.full, report.parts, report.outside, report.attribution)
    found += _quality(report, full_disk)
    order = {"error": 0, "warning": 1, "info": 2}
    of_loss = course_findings(report)
    # A network that is lost comes first, unless curvature has an error of its own to say. It has no odds, which `hot` tells.
    lost = of_loss[:1] if report.course and report.course.lost and report.verdict in ("unresolved", "hot") else []
    found = [*of_loss[len(lost) :], *found]
    first = lost or [headline(report, doubts) or _headline(report, doubts, full_disk)]
    found += [finding for finding in steepest_findings(report, doubts) if finding not in first]
    return [*first, *sorted(found, key=lambda f: order[f.severity])]


_WHY = {
    "asymmetric": ", products fail u.Gv = v.Gu: a kernel is differentiable once only, or weights have blown up and float32 "
    "resolves nothing; look at the loss",
    "non-finite": ", a product is not finite; look at the loss",
}


def _headline(report: Report, doubts: Sequence[str], full_disk: FullDiskError | None) -> Finding:
    verdict, full, optimizer = report.verdict, report.judged, report.optimizer
    # The first reason that applies, from what makes rho meaningless to what more data would settle.
    if optimizer.threshold is None:
        why = "no optimizer was taken" if optimizer.name == "none" else "no learning rate is known"
        return Finding(
            code="no-threshold",
            severity="warning",
            message=f"{why}, so lambda has no threshold and rho does not exist"
            + ("" if optimizer.name == "none" else "; pass --lr"),
        )
    if full.status == "skipped":  # the body: where not even the full model was reached there is no report
        without = (
            "the model was measured without the rows that this shard hardly looks up, on which its sharpest direction lies"
        )
        if full_disk is not None:
            message = f"the disk was full before {without}: no verdict; {full_disk.hint}"
            return Finding(code="unresolved-disk", severity="warning", message=message)
        message = f"the time budget ran out before {without}: no verdict; raise --budget"
        return Finding(code="unresolved-budget", severity="warning", message=message)
    if full.rho is None:
        return Finding(
            code=f"full-{full.status}",
            severity="error",
            message=f"the full model's curvature could not be estimated: {full.status}{_WHY.get(full.status, '')}",
        )
    if verdict == "early":
        return _early(report)
    if verdict == "hot":
        return _hot(report)
    if verdict == "unresolved":
        return _unresolved(report, doubts, full_disk)
    words = {
        "stable": "below the edge of stability: curvature does not limit this learning rate",
        "edge": _edge(full.rho, report.odds),
        "unstable": "past the edge of stability: along the sharpest direction each step overshoots by more than it "
        "gained; lower the learning rate, lengthen warm-up, or freeze layers until it falls",
    }
    severity: Severity = "info" if verdict == "stable" else "warning" if verdict == "edge" else "error"
    return Finding(code=verdict, severity=severity, message=f"rho {full.rho:.3g}, {words[verdict]}")


def _unresolved(report: Report, doubts: Sequence[str], full_disk: FullDiskError | None) -> Finding:
    full, optimizer, generalisation, data = report.judged, report.optimizer, report.generalisation, report.data
    rho = full.rho or 0.0
    if full.status != "converged":
        # Where time ran out, allowing more products would not help.
        late = any(part.status == "skipped" for part in report.parts)
        return Finding(
            code="unresolved-residual",
            severity="warning",
            message=f"rho {rho:.3g} is {full.status} (residual {full.residual or 0:.2g}); "
            + remedy(skipped=late, full_disk=full_disk, further=_further([full])),
        )
    if doubts:
        return Finding(
            code="unresolved-optimizer",
            severity="warning",
            message=f"rho {rho:.3g} is that of {optimizer.name}, and the optimizer has {', '.join(doubts[:4])}, "
            f"which may change its update: no verdict; pass --optimizer {optimizer.name.lower()} if it does not",
        )
    if optimizer.preconditioner == "estimated":
        return Finding(
            code="unresolved-estimate",
            severity="warning",
            message=f"rho {rho:.3g} rests on an estimated second moment, whose scale follows the size of the "
            "batches it is estimated on: no verdict; analyze a checkpoint with its optimizer state",
        )
    if (clipped := unknown(optimizer, rho)) and generalisation.rho_high is not None:
        return clipped
    if generalisation.rho_low is None:
        return Finding(
            code="unresolved-tokens",
            severity="warning",
            message=f"of {data.tokens:,} tokens nothing could be held out to check rho {rho:.3g} against; "
            f"run again with more, e.g. --tokens {4 * data.tokens}",
        )
    low, high = generalisation.rho_low, generalisation.rho_high or 0.0
    return Finding(
        code="unresolved-tokens",
        severity="warning",
        message=f"on {data.tokens:,} tokens rho is {rho:.3g}, and that of the data behind them lies between "
        f"{low:.3g} and {high:.3g}, which spans a verdict's limit; run again with more, e.g. --tokens {4 * data.tokens}",
    )


def _further(weak: Sequence[Estimate]) -> str:
    """The option that lets estimates converge: more products, or a tolerance that their rounding can meet."""
    if all(map(at_rounding, weak)):
        return "--tolerance: in float32 a residual hardly falls below 1e-07 of lambda, however many products there are"
    return "--max-hvps"


def _early(report: Report) -> Finding:
    optimizer, rho = report.optimizer, report.judged.rho
    whose, age = ("the optimizer", optimizer.step) if optimizer.step is not None else ("the run", report.checkpoint.step)
    settled = settled_after(optimizer.betas, optimizer.momentum)
    steps = "1 step" if age == 1 else f"{age:,} steps"
    return Finding(
        code="early",
        severity="info",
        message=f"{whose} has made {steps}, and before step {settled:,} its moments are those of a few gradients: "
        f"rho {rho or 0:.3g} says nothing yet; measure again from then on",
    )


def _edge(rho: float, odds: float | None) -> str:
    if rho < STABLE_BELOW and odds is not None:
        return (
            "below the edge of stability; with small batches runs at such a rho end badly with a chance of "
            f"{odds:.0%} by the calibration, so do not raise the learning rate"
        )
    return (
        "at the edge of stability, where training settles by itself; it can go on so for long, and it has no "
        "reserve against a larger learning rate or a sharp batch"
    )


def _hot(report: Report) -> Finding:
    held, odds = report.generalisation, report.odds or 0.0
    return Finding(
        code="hot",
        severity="warning",
        message=f"rho {report.judged.rho or 0:.3g}, on the data behind the tokens between "
        f"{held.rho_low or 0:.3g} and {held.rho_high or 0:.3g}, and at such a rho a run ends badly with a chance of "
        f"{odds:.0%} by the calibration; lower the learning rate, lengthen warm-up, or freeze layers until it falls",
    )


def _preconditioner(optimizer: Optimizer, idle: int, left_out: int, notes: dict[str, str], projects: bool) -> list[Finding]:
    found = [
        Finding(code=code, severity="info", message=message + (counted(optimizer) if code == "clipped-moments" else ""))
        for code, message in notes.items()
    ]
    found += clipping_findings(optimizer)
    if optimizer.preconditioner == "estimated":
        found.append(
            Finding(
                code="estimated-preconditioner",
                severity="warning",
                message="no optimizer state: the second moment is estimated from this shard's gradients, and the "
                "true one, of training batches and past weights, can differ several-fold",
            )
        )
    if optimizer.lr_source in _ENDED:
        found.append(
            Finding(
                code=f"lr-from-{optimizer.lr_source}",
                severity="info",
                message=f"the checkpoint's next learning rate is 0 (a finished schedule); {_ENDED[optimizer.lr_source]} is "
                f"used, {optimizer.lr:g} for the largest parameter group",
            )
        )
    # An estimated moment is of this shard's gradients, whatever the step.
    beta2 = optimizer.betas[1] if optimizer.betas and optimizer.preconditioner == "checkpoint" else 0.0
    # Fewer steps than it averages over.
    if optimizer.step is not None and beta2 and optimizer.step * (1 - beta2) < 1:
        found.append(
            Finding(
                code="young-preconditioner",
                severity="info",
                message=f"the second moment averages {1 / (1 - beta2):,.0f} steps and has seen {optimizer.step}: rare "
                "directions are scaled by few gradients and can look sharper than they will be",
            )
        )
    if idle:
        never = "never had a gradient (second moment 0, tokens not seen yet)"
        what = f"dimensions are projected away or {never}, which are" if projects else f"weights {never} and are"
        found.append(Finding(code="idle-entries", severity="info", message=f"{idle:,} {what} left out"))
    if left_out:
        found.append(
            Finding(
                code="frozen-tensors",
                severity="info",
                message=f"{left_out} tensors are in no optimizer group, have no state or never had a gradient, "
                "and are left out as frozen",
            )
        )
    return found


def _loss(measured: float, logged: float | None) -> list[Finding]:
    """A symptom of wrong data: the run did not see such a loss."""
    if logged is None or not 0 < logged < float("inf") or abs(measured - logged) < NATS_APART:
        return []
    if logged / LOSS_APART <= measured <= logged * LOSS_APART:
        return []
    return [
        Finding(
            code="loss-apart",
            severity="warning",
            message=f"the loss on this data is {measured:.3g}, the last one in the run's log {logged:.3g}: check that the "
            "data are the run's, and that tokenizer, labels and their mask, and sequence length are those of training; "
            "curvature is that of the loss measured here",
        )
    ]


def _update(update: Update) -> list[Finding]:
    if update.status == "uphill":
        return [
            Finding(
                code="update-uphill",
                severity="info",
                message="the momentum points uphill on this shard (g.u <= 0), as it often does after the first steps: "
                "no critical learning rate exists for the next update",
            )
        ]
    if update.ratio is not None and update.ratio > 1:
        return [
            Finding(
                code="update-overshoots",
                severity="warning",
                message=f"the next update is {update.ratio:.2g} times its critical length: "
                "to second order it raises this shard's loss",
            )
        ]
    return []


def _body(report: Report) -> list[Finding]:
    full, body = report.full, report.body
    if body is None or full.eigenvalue is None or body.eigenvalue is None:
        return []
    with_them = f"rho {full.rho:.3g}" if full.rho is not None else f"lambda {full.eigenvalue:.4g}"
    return [
        Finding(
            code="rare-rows",
            # If the run would be unstable with these rows, leaving them out deserves more than a note.
            severity="warning" if full.rho is not None and classify(full.rho) == "unstable" else "info",
            message=f"with the {body.rows:,} embedding rows that this shard looks up fewer than ten times it is "
            f"{with_them}: that is their few tokens' luck, and concerns their rows alone; the verdict leaves them out",
        )
    ]


def _shape(
    full: Estimate, parts: list[PartEstimate], ends: PartEstimate | None, attribution: list[Attribution]
) -> list[Finding]:
    found: list[Finding] = []
    if full.eigenvalue is not None and full.most_negative is not None and -full.most_negative > abs(full.eigenvalue):
        found.append(
            Finding(
                code="negative-dominates",
                severity="info",
                message=f"the most negative eigenvalue ({full.most_negative:.3g}) is larger in magnitude than the top "
                f"({full.eigenvalue:.3g}): power iteration would have found it instead",
            )
        )
    known = [(part, part.eigenvalue) for part in parts if part.eigenvalue is not None and certified(part)]
    if known and full.eigenvalue:
        sharpest, value = max(known, key=lambda pair: pair[1])
        written = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        found.append(
            Finding(
                code="sharpest-layer",
                severity="info",
                message=(
                    "embedding and head are sharper than any layer"
                    if sharpest is ends
                    else f"{sharpest.name} is the sharpest layer"
                )
                + f", lambda {written}, {value / full.eigenvalue:.0%} of the full model's",
            )
        )
    if ends is not None and ends.eigenvalue and full.eigenvalue and ends.eigenvalue > 0.5 * full.eigenvalue > 0:
        found.append(
            Finding(
                code="ends-dominate",
                severity="info",
                message=f"embedding and head alone reach {ends.eigenvalue / full.eigenvalue:.0%} of lambda: freezing "
                "layers would not lower it much",
            )
        )
    rows = [(mass.tensor, row, share) for mass in attribution if mass.rows_of == "tokens" for row, share in mass.rows or ()]
    if rows and (top := max(rows, key=lambda r: r[2]))[2] > 0.25:
        found.append(
            Finding(
                code="rare-tokens",
                severity="warning",
                message=f"token {top[1]} of {top[0]} holds {top[2]:.0%} of the sharpest direction: one token's row, "
                "usually a rare one with a tiny second moment, sets lambda",
            )
        )
    return found


def _quality(report: Report, full_disk: FullDiskError | None) -> list[Finding]:
    generalisation = report.generalisation
    found: list[Finding] = []
    parts: list[tuple[str, Estimate]] = [(e.name, e) for e in (report.ends,) if e]
    parts += [(f"layer {e.index}", e) for e in report.layers]
    for kind, curve in (("restricted", report.cumulative.restricted), ("truncated", report.cumulative.truncated)):
        parts += [(f"{kind} depth {e.depth}", e) for e in curve]
    skipped = [name for name, e in parts if e.status == "skipped"]
    found += unfinished(skipped, len(parts), full_disk)
    # What is empty has no parameter that moves, or none with a lambda: more products do not change that.
    parts = [(name, e) for name, e in parts if e.status != "empty"]
    # More products do not mend what is asymmetric, or overflows: the table says that of each, and the headline why.
    weak = {name: e for name, e in parts if e.status not in ("converged", "skipped", "asymmetric", "non-finite")}
    if weak:
        names = list(weak)
        found.append(
            Finding(
                code="unconverged-parts",
                severity="warning",
                message=f"not converged: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}; "
                + remedy(skipped=bool(skipped), full_disk=full_disk, further=_further(list(weak.values()))),
            )
        )
    # A bracket without a held-out value: a single batch in memory is taken to be all of the data.
    if generalisation.held_out is None and generalisation.rho_low is not None:
        found.append(
            Finding(
                code="no-held-out",
                severity="info",
                message="a single batch cannot be split: the verdict takes it for all of the data",
            )
        )
    return found
