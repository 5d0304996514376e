"""A schedule from depth alone, from a report, or for a run that resumes. Imports torch only to measure a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from curvcli.analysis.options import options_of
from curvcli.documents import Finding, LrSchedule, Report, Schedule
from curvcli.errors import UsageError
from curvcli.schedules import INTERVAL, WARMUP, Measured, freeze, gated, grow, grow_from, lr_at
from curvcli.schedules import lr_schedule as made

ORDERS = ("last", "interleaved")
LOCKS = ("zero-output", "residual-gate")


def schedule(
    depth: int | None = None,
    *,
    report: Path | str | Report | None = None,
    resume: Path | str | Report | None = None,
    margin: float | None = None,
    order: str | None = None,
    start: int | None = None,
    groups: int | None = None,
    interval: int = INTERVAL,
    hold: int | None = None,
    lock: str | None = None,
    gate_steps: int | None = None,
    lr: float | None = None,
    lr_schedule: str | None = None,
    warmup_steps: int | None = None,
    total_steps: int | None = None,
    min_lr_ratio: float | None = None,
    decay_steps: int | None = None,
    data: Path | str | None = None,
    tokens: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Schedule:
    """Plan when which blocks train: `curv schedule` from Python. Errors name options as the command line does.

    One of `depth`, `report` and `resume` says what is planned from: nothing but the depth; a report's truncated curve, for
    a fresh run; or a restricted curve, for which blocks a run freezes as it resumes. Only a checkpoint to resume imports
    torch, as it is measured first.

    Args:
        depth: blocks of the model.
        report: a report near step 0, or its path.
        resume: a checkpoint's path, its report, or the report's path (.json).
        margin: largest predicted rho to allow, 0.8 by default; 1 is the edge of stability.
        order: which blocks are locked at the start, from depth alone: the "last" (default), or "interleaved" ones.
        start: blocks that train from step 0, from depth alone; half of them by default.
        groups: how many groups the others join in, 4 by default.
        interval: steps between two groups, where the clock decides.
        hold: with `resume` at a constant learning rate, steps to the first group; by default `interval`.
        lock: from depth alone, how blocks are locked: "zero-output" (default), or "residual-gate".
        gate_steps: with residual gates, the step at which the last one is open; 3,500 by default.
        lr: peak learning rate; by default what gives the report's, and a finding says so.
        lr_schedule: "constant" (default), "linear", "cosine", "wsd", "inverse-sqrt", or the path of a .csv with step, lr.
        warmup_steps: of the learning rate, 2,000 by default, with `resume` 0.
        total_steps: of the run.
        min_lr_ratio: least learning rate over the peak (linear, cosine, wsd).
        decay_steps: length of the decay at the end (wsd).
        data: with a checkpoint to resume, training data; of curv.toml by default.
        tokens: with a checkpoint to resume, predictions to average over.
        progress: called with what is being done and the fraction done, while a checkpoint is measured.

    Returns:
        The schedule, which `curvcli.ArchitectureWarmup` obeys; the document is `schedule.to_json()`.

    Raises:
        UsageError: options are missing, out of range, or contradict each other.
        InputError: a file cannot be read, or its curve is not converged.
        CurvError: no start fits under the margin, or a group never does.
    """
    if margin is not None and not 0 < margin < inf:
        raise UsageError(f"--margin {margin} is no limit for rho", hint="pass a positive number; 1 is the edge")
    _check_order(order)
    rates = _Rates(lr, lr_schedule, warmup_steps, total_steps, min_lr_ratio, decay_steps)
    limit = {} if margin is None else {"margin": margin}
    pace = {"groups": groups, "interval": interval}
    sample: dict[str, object] = {"--data": data, "--tokens": tokens}
    gates: dict[str, object] = {"--lock": lock, "--gate-steps": gate_steps}
    if lock not in (None, *LOCKS):
        raise UsageError(f"--lock {lock} is not planned", hint=f"pass {' or '.join(LOCKS)}")
    if resume is not None:
        is_report = isinstance(resume, Report) or Path(resume).suffix == ".json"
        refuse("a plan for --resume", {"--from": report, "--start": start, **gates})
        refuse(f"the report {_name(resume)}", sample if is_report else {})
        _only_last(order, "the restricted curve that --resume measures")

        def measured() -> Measured:
            return _read(resume) if is_report else Measured(_measure(Path(str(resume)), data, tokens, progress))

        plan = _freeze(measured, rates, **limit, hold=hold, **pace)
    elif report is not None:
        refuse("a plan with --from", {"--start": start, "--hold": hold, **sample, **gates})
        _only_last(order, "the truncated curve that --from reads")
        plan = _grow_from(_read(report), rates, **limit, **pace)
    elif depth is not None:
        refuse("a plan from --depth alone", {"--margin": margin, "--hold": hold, **sample})
        if lock == "residual-gate":
            refuse("a plan of residual gates", {"--start": start, "--groups": groups, "--order": order})
            plan = _grow(depth, rates, open_at=gate_steps)
        else:
            refuse("a plan without --lock residual-gate", {"--gate-steps": gate_steps})
            plan = _grow(depth, rates, start=start, order=order or "last", **pace)
    else:
        raise UsageError(
            "nothing to plan from",
            hint="pass --depth N, --from report.json or --resume CHECKPOINT; see curv schedule --help",
        )
    if depth is not None and depth != plan.depth:
        raise UsageError(f"--depth {depth}, but the model measured has {plan.depth} blocks", hint="drop --depth")
    return plan


def refuse(where: str, options: dict[str, object]) -> None:
    """Raises UsageError where one of the options, by its flag, is given (not None)."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(
            f"{where} takes no {', '.join(given)}", hint=f"drop {' and '.join(given)}; see curv schedule --help"
        )


@dataclass(frozen=True)
class _Rates:
    """The options of the learning rate."""

    peak: float | None
    kind: str | None
    warmup_steps: int | None
    total_steps: int | None
    min_ratio: float | None
    decay_steps: int | None

    @property
    def from_file(self) -> bool:
        return self.kind is not None and self.kind.lower().endswith(".csv")

    @property
    def from_report(self) -> bool:
        """Whether the peak has to come from the report."""
        return self.peak is None and not self.from_file

    def schedule(self, *, peak: float | None, warmup_steps: int) -> LrSchedule:
        """The schedule with this peak (None with a file); `warmup_steps` is the default of a formula's."""
        default = None if self.from_file else warmup_steps
        return made(
            self.kind or "constant",
            peak=peak,
            warmup_steps=default if self.warmup_steps is None else self.warmup_steps,
            total_steps=self.total_steps,
            min_ratio=self.min_ratio,
            decay_steps=self.decay_steps,
        )


def _grow(depth: int, rates: _Rates, **options: Any) -> Schedule:
    gates = "open_at" in options
    if rates.peak is None and rates.kind is None:
        refuse("a plan without a learning rate", {"--min-lr-ratio": rates.min_ratio, "--decay-steps": rates.decay_steps})
        warmup = WARMUP if rates.warmup_steps is None else rates.warmup_steps
        if gates:
            refuse("a plan of residual gates without a learning rate", {"--warmup-steps": rates.warmup_steps})
            return gated(depth, total_steps=rates.total_steps, **options)
        return grow(depth, warmup_steps=warmup, total_steps=rates.total_steps, **options)
    lr = rates.schedule(peak=rates.peak, warmup_steps=WARMUP)
    if gates:
        return gated(depth, total_steps=lr.total_steps, lr=lr, **options)
    return grow(depth, warmup_steps=lr.warmup_steps, total_steps=lr.total_steps, lr=lr, **options)


def _grow_from(measured: Measured, rates: _Rates, **options: Any) -> Schedule:
    lr = rates.schedule(peak=measured.lr if rates.from_report else rates.peak, warmup_steps=WARMUP)
    return _noted(grow_from(measured, lr=lr, **options), rates, _peak_of(measured.report.checkpoint.step))


def _freeze(measure: Callable[[], Measured], rates: _Rates, **options: Any) -> Schedule:
    # Before a minute of measuring, not after it: what is wrong with the schedule is known from its options.
    lr = rates.schedule(peak=1.0 if rates.from_report else rates.peak, warmup_steps=0)
    measured = measure()
    step = measured.report.checkpoint.step
    if rates.from_report and step is not None:
        # The schedule's peak is 1 so far, so that this is a share of the peak.
        share = lr_at(lr, step)
        if not share > 0:
            raise UsageError(
                f"the schedule's learning rate is 0 at the checkpoint's step {step}", hint="pass its peak with --lr"
            )
        lr = lr.model_copy(update={"peak": measured.lr / share})
    return _noted(freeze(measured, lr=lr, **options), rates, "is what gives the report's learning rate")


def _read(report: Path | str | Report) -> Measured:
    return Measured(report) if isinstance(report, Report) else Measured.read(Path(report))


def _measure(checkpoint: Path, data: Path | str | None, tokens: int | None, progress: Any) -> Report:
    if progress:
        progress("importing torch", 0.0)
    from curvcli.analysis.checkpoint import analyze_checkpoint

    return analyze_checkpoint(checkpoint, options_of({"data": data, "tokens": tokens, "truncated": False}), progress)


def _name(report: Path | str | Report) -> str:
    return report.checkpoint.path if isinstance(report, Report) else str(report)


def _peak_of(step: int | None) -> str:
    if not step:
        return "is the report's learning rate"
    return f"is the report's learning rate at step {step:,}, and a run's own peak may be higher: pass --lr"


def _noted(plan: Schedule, rates: _Rates, what: str) -> Schedule:
    """The schedule, with a finding where its peak learning rate was taken from the report."""
    if not rates.from_report or plan.lr_schedule is None:
        return plan
    message = f"no --lr was given: the peak, {plan.lr_schedule.peak:.4g}, {what}"
    return plan.model_copy(
        update={"findings": [*plan.findings, Finding(code="lr-from-report", severity="info", message=message)]}
    )


def _check_order(order: str | None) -> None:
    if order not in (None, *ORDERS):
        why = ": locking the first blocks made training worse at every learning rate tried" if order == "first" else ""
        raise UsageError(f"--order {order} is not planned{why}", hint=f"pass {' or '.join(ORDERS)}")


def _only_last(order: str | None, what: str) -> None:
    if order not in (None, "last"):
        raise UsageError(
            f"--order {order} cannot be predicted: {what} is of the first blocks, the last ones locked",
            hint="drop --order, or plan from --depth alone",
        )
