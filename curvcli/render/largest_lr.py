"""The largest stable learning rate, the chance of a bad end and what to do: the same words in every output."""

from __future__ import annotations

from curvcli.documents import Record, Report, StableLr
from curvcli.judge.calibration import settled_after
from curvcli.judge.level import lower_lr
from curvcli.judge.limits import certified

# What a reading of Z asks for, where no verdict asks for anything.
_READ = {
    "past": "watch the loss of the next steps, and lower the learning rate if it rises",
    "edge": "go on, and do not raise the learning rate",
    "below": "go on; nothing proves that a larger learning rate would be stable",
    "early": "wait until the momentum is more than that of a few gradients, then measure again",
}


def lr_line(found: StableLr, lr: float | None) -> str:
    """As "largest stable lr 0.021 (0.008 to 0.09 in 90 % of ramps); you are at 0.03"."""
    ends = f"over {found.low:.2g}" if found.high is None else f"{found.low:.2g} to {found.high:.2g}"
    here = "" if lr is None else f"; you are at {lr:.2g}"
    return f"largest stable lr {found.value:.2g} ({ends} in {_percent(found.confidence)} of ramps){here}"


def record_lines(record: Record) -> list[str]:
    """What the calibration says of a training job's record, a sentence a line; empty where it says nothing."""
    lines = [] if record.stable_lr is None else [lr_line(record.stable_lr, record.lr)]
    return lines if record.odds is None else [*lines, odds_line(record.odds)]


def odds_line(odds: float) -> str:
    """As "chance of a bad end at such a rho: 56 %"."""
    return f"chance of a bad end at such a rho: {_percent(odds)}"


def told(report: Report) -> list[str]:
    """What the calibration says of a report, a sentence a line; empty where it says nothing."""
    lines = []
    if report.stable_lr is not None:
        lines.append(lr_line(report.stable_lr, report.optimizer.lr))
        if report.stable_lr.uncovered:
            lines.append(f"not covered by the ramps: {'; '.join(report.stable_lr.uncovered)}")
    elif report.judged.rho is not None and report.judged.rho <= 0 and certified(report.judged):
        lines.append("no curvature is positive, so none sets a largest learning rate")
    if report.odds is not None:
        lines.append(odds_line(report.odds))
    return lines


def action(report: Report) -> str:
    """What to do, in a few words."""
    if report.course is not None and report.course.lost:
        return f"stop: the run is {report.course.name}; restart, from before that if it can be, at a lower learning rate"
    if report.verdict == "early":
        return f"wait until {_settled(report)}, then measure again"
    if report.verdict in ("unstable", "hot"):
        rate = lower_to(report)
        return "lower the learning rate" + (f" to about {rate:.2g}" if rate is not None else "")
    if report.verdict == "edge":
        return "go on, and do not raise the learning rate"
    if report.verdict == "unresolved" and report.steepest is not None and report.steepest.reading in _READ:
        return _READ[report.steepest.reading]
    return "go on" if report.verdict == "stable" else "no verdict: see the first finding"


def lower_to(report: Report) -> float | None:
    """Where to lower the learning rate to: the low end of the largest stable one, else where rho would be stable."""
    return lower_lr(report.optimizer.lr, report.judged.rho, report.stable_lr)


def _settled(report: Report) -> str:
    """The step from which on rho means something."""
    optimizer, step = report.optimizer, report.checkpoint.step
    settled = settled_after(optimizer.betas, optimizer.momentum)
    age = step if optimizer.step is None else optimizer.step
    if step is None or age is None:
        return f"step {settled:,} of the optimizer"
    return f"step {step + settled - age:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "over 99 %"
