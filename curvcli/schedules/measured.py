"""Policies that plan from a measured report: grow a fresh run, or freeze a resumed one. No torch.

The prediction holds lambda as measured and scales rho with the learning rate: rho(k, lr) = rho_k lr / lr_report.
The threshold of a decoupled weight decay wd is (2/lr - wd) rather than 2/lr; leaving that out changes rho by a
share of wd (lr - lr_report) / 2, under 0.1 % for wd 0.1 and learning rates below 0.02.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context
from math import inf
from pathlib import Path
from typing import Any, Literal

from curvcli.documents import (
    DepthEstimate,
    Finding,
    LockRule,
    LrSchedule,
    Phase,
    Report,
    Schedule,
    ScheduleProvenance,
    Severity,
    Versions,
    digested_report,
)
from curvcli.errors import CurvError, InputError, UsageError
from curvcli.judge.limits import STABLE_BELOW, certified
from curvcli.schedules.lr import highest_from, lr_at, settles
from curvcli.schedules.plan import INTERVAL, phases, split, within

MARGIN = STABLE_BELOW
# A truncated network is solved to 3 %; sharper than the whole by more than that is the truncation's doing.
CUT_TOLERANCE = 1.03
# What a report says about its own lambda, and so about every prediction from it.
BEARING = (
    *("loss-no-number", "loss-over-best", "no-context"),
    *("early", "estimated-preconditioner", "young-preconditioner", "unresolved-tokens", "rare-rows", "rare-tokens"),
)
# What makes a curve that a report lacks.
_MISSING = {
    "restricted": "analyze again without --no-depths",
    "truncated": "analyze again with curv analyze --truncated; of a network that cannot be cut short there is none (see the "
    "findings)",
}


@dataclass(frozen=True)
class Measured:
    """A report to plan from, and the file that it came from, where it did."""

    report: Report
    path: Path | None = None
    sha256: str | None = None

    @classmethod
    def read(cls, path: Path) -> Measured:
        """From the file of a report. Raises InputError."""
        report, sha256 = digested_report(path)
        return cls(report, path, sha256)

    @property
    def lr(self) -> float:
        """Learning rate that rho was measured at. Raises InputError where the report has none."""
        if not self.report.optimizer.lr:
            raise InputError(f"{self.name} has no learning rate, so rho is unknown", hint="analyze again with --lr")
        return self.report.optimizer.lr

    @property
    def name(self) -> str:
        """What to call it in an error."""
        return str(self.path or self.report.checkpoint.path)

    def provenance(self) -> ScheduleProvenance:
        """Where a schedule made from this comes from."""
        return ScheduleProvenance(
            report=str(self.path) if self.path else None,
            report_sha256=self.sha256,
            checkpoint=self.report.checkpoint.path,
            versions=Versions.installed(),
        )


@dataclass(frozen=True)
class Curve:
    """rho by number of active blocks at one learning rate, all of it converged; Z where it is larger or there is no rho."""

    rho: dict[int, float]
    lr: float

    def at(self, depth: int, lr: float) -> float:
        """Predicted rho at another learning rate."""
        return self.rho[depth] * lr / self.lr

    def limit(self, depth: int, margin: float) -> float:
        """Largest learning rate that keeps rho at most `margin`; curvature that is not positive sets none."""
        # rho is proportional to the learning rate, so the limit is where the line meets the margin.
        return inf if self.rho[depth] <= 0 else margin * self.lr / self.rho[depth]


def read_curve(measured: Measured, kind: Literal["restricted", "truncated"], least: int) -> Curve:
    """The curve from depth `least` to the full model. Raises InputError where any of it is missing or not converged."""
    report = measured.report
    depth = report.checkpoint.layers
    if depth < 1:
        raise InputError(f"{measured.name} is of a model without blocks", hint="a schedule needs a stack of them")
    lr = measured.lr
    found = {e.depth: e for e in getattr(report.cumulative, kind)}
    rho: dict[int, float] = {}
    bad: list[str] = []
    for k in range(least, depth + 1):
        estimate = found.get(k)
        value = _edge(estimate) if estimate else None
        if estimate is None or value is None:
            bad.append(f"{k} ({estimate.status if estimate and not certified(estimate) else 'missing'})")
        else:
            rho[k] = value
    if bad and kind == "truncated" and report.steepest is not None:
        raise InputError(
            f"{measured.name} is of {report.optimizer.name}, which has no rho, and Z is not measured of a network cut short",
            hint="plan from --depth alone, or from a run's checkpoint with --resume",
        )
    if bad:
        raise InputError(
            f"{measured.name} has no converged {kind} rho at depth {', '.join(bad[:6])}{' ...' if len(bad) > 6 else ''}",
            hint="analyze again with a larger --max-hvps" if found else _MISSING[kind],
        )
    return Curve(rho, lr)


def _edge(estimate: DepthEstimate) -> float | None:
    """rho, or Z of the parameters whose step is steepest in a norm where it is larger; both are 1 at their edge.

    None where one that there should be is not known. 0 where nothing moves.
    """
    norm, empty = estimate.steepest, estimate.status == "empty"
    rho = 0.0 if empty and norm is not None else estimate.rho if certified(estimate) else None
    if norm is None or rho is None or norm.status == "flat":
        return rho
    return None if norm.z is None else max(rho, norm.z)


def grow_from(
    measured: Measured, *, lr: LrSchedule, margin: float = MARGIN, groups: int | None = None, interval: int = INTERVAL
) -> Schedule:
    """A fresh run's schedule from the truncated curve: the deepest start that the peak learning rate allows.

    A group joins at the first step past the learning rate's warm-up from which on the deeper network stays under the margin.

    Raises:
        InputError: the curve is not converged throughout, or has no rho.
        CurvError: no start fits, or a group never does; it says at which learning rate it would.
    """
    curve = read_curve(measured, "truncated", 1)
    depth = max(curve.rho)
    peak = highest_from(lr, 0)
    start = _deepest(curve, peak, margin)
    findings = [_held(measured), *_bearing(measured)]
    sharpest = max(range(1, depth), key=curve.rho.__getitem__, default=depth)
    if curve.rho[sharpest] > CUT_TOLERANCE * curve.rho[depth]:
        findings.append(
            _finding(
                "cut-sharper",
                "warning",
                f"cut after {sharpest} of {depth} blocks, the network is sharper than whole (rho {curve.rho[sharpest]:.3g} "
                f"against {curve.rho[depth]:.3g}): a trained network does not work cut short; use a report near step 0",
            )
        )
    if start == depth:
        findings.insert(
            0,
            _finding(
                "no-warm-up-needed",
                "info",
                f"the full depth stays under margin {margin:g}: rho {curve.at(depth, peak):.3g} at the peak "
                f"lr {peak:g}; no architecture warm-up is needed",
            ),
        )
    parts = split(range(start, depth), groups)
    steps = _releases(curve, parts, lr, margin, first=0)
    return Schedule(
        mode="grow",
        lock="zero-output",
        phases=_phases(curve, parts, [0, *steps], lr, interval),
        # Warnings first, and among them the order in which they were added: the sort is stable.
        findings=sorted(findings, key=lambda finding: finding.severity == "info"),
        **_shared(measured, margin, lr),
    )


def freeze(
    measured: Measured,
    *,
    lr: LrSchedule,
    margin: float = MARGIN,
    groups: int | None = None,
    interval: int = INTERVAL,
    hold: int | None = None,
) -> Schedule:
    """A resumed run's schedule from the restricted curve: keep the deepest prefix that stays under the margin.

    The prefix has to survive the highest learning rate from the checkpoint's step on, which is the present one
    past warm-up. Under a constant learning rate that never lets the others back, one group is released every
    `interval` steps after `hold` (default: `interval`) steps, and a finding says at which rho.

    Raises:
        InputError: the report has no step or no converged curve.
        UsageError: the learning rate schedule ends before the checkpoint's step, or before the last release.
        CurvError: embedding and head alone are over the margin, or a decaying schedule never lets a group back.
    """
    curve = read_curve(measured, "restricted", 0)
    depth = max(curve.rho)
    step = measured.report.checkpoint.step
    if step is None:
        raise InputError(f"{measured.name} does not say at which step it is", hint="give a checkpoint of a training run")
    if lr.total_steps is not None and step >= lr.total_steps:
        raise UsageError(
            f"the checkpoint is at step {step}, and the schedule ends at {lr.total_steps}",
            hint="steps count from the run's beginning: pass a larger --total-steps",
        )
    peak, now = highest_from(lr, step), lr_at(lr, step)
    active = _deepest(curve, peak, margin)
    findings = [_held(measured), *_bearing(measured)]
    # The run's own schedule gives its rate to rounding; a per cent is another schedule.
    if abs(now - measured.lr) > 0.01 * measured.lr:
        findings.append(
            _finding(
                "lr-differs",
                "warning",
                f"the schedule has lr {now:.4g} at step {step}, the report {measured.lr:.4g}: check that "
                "it is the run's own",
            )
        )
    if active == depth:
        findings.insert(
            0,
            _finding(
                "nothing-to-freeze",
                "info",
                f"the full model stays under the margin {margin:g}: rho {curve.at(depth, peak):.3g} at lr {peak:g}; "
                "nothing needs freezing",
            ),
        )
    parts = split(range(active, depth), groups)
    if parts and lr.kind == "constant":
        # Deeper than the deepest that fits: no group ever does, so only the clock can release them.
        begin = max(step, lr.warmup_steps) + (interval if hold is None else hold)
        steps = [begin + i * interval for i in range(len(parts))]
        within([step, *steps], lr.total_steps)
        worst = curve.at(depth, lr.peak)
        findings.insert(
            0,
            _finding(
                "released-over-margin",
                "warning",
                f"at the constant lr {lr.peak:g} the frozen blocks never fit under the margin {margin:g}: they are "
                f"released from step {begin} on all the same, at a predicted rho of up to {worst:.3g}, {worst / margin:.2g} "
                "times the margin; use adaptive mode, which waits for the measured rho, or a decaying learning rate",
            ),
        )
    else:
        steps = _releases(curve, parts, lr, margin, first=step)
    return Schedule(
        mode="freeze",
        lock="no-update",
        phases=_phases(curve, parts, [step, *steps], lr, interval),
        findings=sorted(findings, key=lambda finding: finding.severity == "info"),
        **_shared(measured, margin, lr),
    )


def _deepest(curve: Curve, lr: float, margin: float) -> int:
    """The most blocks whose rho the margin allows at a learning rate."""
    # All depths, not the first that fails: rho of truncated networks may fall again with depth.
    fits = [k for k in curve.rho if curve.at(k, lr) <= margin]
    if fits:
        return max(fits)
    best = min(curve.rho, key=curve.rho.__getitem__)
    least = f"depth {best}, the least sharp, has" if best else "embedding and head alone have"
    raise CurvError(
        f"no depth fits under the margin {margin:g} at lr {lr:g}: {least} rho {curve.at(best, lr):.3g}",
        hint=f"an lr of at most {_rounded_down(curve.limit(best, margin))} would do: lower --lr, or raise --margin",
    )


def _releases(curve: Curve, parts: list[list[int]], lr: LrSchedule, margin: float, *, first: int) -> list[int]:
    """Step at which each part joins. Raises CurvError where one never can."""
    steps: list[int] = []
    for part in parts:
        active = part[-1] + 1
        # A part joins as a whole, so the depth that has to fit is that of its last block.
        limit = curve.limit(active, margin)
        step = settles(lr, limit, [first, *steps][-1] + 1)
        if step is None:
            raise CurvError(
                f"{active} blocks never fit under the margin {margin:g}: their rho is {curve.at(active, lr.peak):.3g} at lr "
                f"{lr.peak:g}, and the {lr.kind} schedule does not fall far enough",
                hint=f"it would have to fall to {_rounded_down(limit)} and stay there: give one that does (--lr-schedule, "
                "--min-lr-ratio, --total-steps), lower --lr, or raise --margin",
            )
        steps.append(step)
    return steps


def _phases(curve: Curve, parts: list[list[int]], steps: list[int], lr: LrSchedule, interval: int) -> list[Phase]:
    def rho(active: int, step: int) -> float:
        # The first blocks train through whatever comes; later ones join where the rate is past its highest.
        return curve.at(active, highest_from(lr, step) if step == steps[0] else lr_at(lr, step))

    start = max(curve.rho) - sum(map(len, parts))
    return phases(range(start), parts, steps=steps, interval=interval, lr=lr, rho=rho)


def _shared(measured: Measured, margin: float, lr: LrSchedule) -> dict[str, Any]:
    return {
        "depth": measured.report.checkpoint.layers,
        "order": "last",
        "blocks": [layer.name for layer in measured.report.layers],
        "rule": LockRule(),
        "margin": margin,
        "lr_schedule": lr,
        "provenance": measured.provenance(),
    }


def _finding(code: str, severity: Severity, message: str) -> Finding:
    return Finding(code=code, severity=severity, message=message)


def _held(measured: Measured) -> Finding:
    step = measured.report.checkpoint.step
    return _finding(
        "lambda-held",
        "info",
        f"the prediction holds lambda as measured{f' at step {step}' if step is not None else ''} and scales rho with the "
        "learning rate alone; lambda moves in training: measure again, or use adaptive mode",
    )


def _bearing(measured: Measured) -> list[Finding]:
    found = [finding for finding in measured.report.findings if finding.code in BEARING]
    norm = measured.report.steepest
    if norm is None:
        return found
    message = (
        "what is planned is Z, a lower bound, of the parameters that have no rho, or rho of the others where it is larger; "
        "a Z under the margin proves no stability"
    )
    return [_finding("planned-by-z", "warning", message), *found]


def _rounded_down(value: float) -> str:
    """Three digits, never above the value: typed back in, it has to fit."""
    return f"{float(Context(prec=3, rounding=ROUND_FLOOR).create_decimal(value)):.3g}"
