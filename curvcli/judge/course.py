"""The course of a run's loss: wrecked, collapsed or healthy, from its own log and one entropy. Pure functions.

A run is held against its own past alone: what it might have reached at another learning rate, no log of it tells.
docs/how-to/track.md has the limits in words, and what they were tried on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log, sqrt
from statistics import median
from typing import Protocol

from curvcli.documents import Finding, LossCourse, Report, VerdictName

# Fewer logged losses than these say nothing of a course. A median is over a tenth of them, within bounds.
LEAST, SHARE, WINDOWS = 20, 10, (5, 100)
MOST = 2000  # losses that are gone through; of a longer log each is the median of some
# What the loss may lie over the run's own best: a share of it, some nats, and some standard errors of a median.
RISE, NATS, SIGMAS = 0.10, 0.05, 6.0
RESTART_RISE = 0.50  # the same share where the learning rate was raised again after it had fallen
NO_NUMBERS = 3  # losses in a row at the end that are no numbers
# A loss of this share of the tokens' entropy uses no context. It says so from as many steps on, less where lr has decayed.
CONTEXT, SETTLED, UNLOGGED = 0.98, 300, 1000
DECAYED = 0.5  # lr over its peak, from which on it counts as decayed
BLOWN = 2.0  # the smoothed loss over the first one logged: no run that trains rises as far
NO_BETTER = 0.95  # of the first losses logged, or as much over them: there a loss that has risen so far is where it began
# A logged loss under this share of the entropy says that training does use context: the shard is unlike it. It is less than
# CONTEXT, since the Trainer's log divides by all tokens of a window, and a window of 32 has 31 predictions.
LOGGED_CONTEXT = 0.95
# What one loss has to stand over the median before it to be a spike: a share of it, and standard deviations of a loss.
_SPIKE, _SPIKE_SIGMAS = 0.2, 8.0


class Logged(Protocol):
    """A line of a run's log."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        ...

    @property
    def loss(self) -> float | None:
        """In nats per token; None where the line has none that is a number."""
        ...

    @property
    def lr(self) -> float | None:
        """Learning rate in force."""
        ...

    @property
    def non_finite(self) -> bool:
        """Whether a loss was logged that is no number."""
        ...


@dataclass(frozen=True)
class _Curve:
    """Logged losses in step order, smoothed: `medians[i]` is of the `window` losses from place i on."""

    steps: list[int]
    losses: list[float]
    window: int
    medians: list[float]

    @property
    def noise(self) -> float:
        """Standard deviation of a median about its course: 1.25 sigma / sqrt(n) of white noise, or what wanders."""
        # sqrt(pi / 2) = 1.25 is the standard error of a median of normal numbers over that of their mean.
        return max(1.25 * _white(self.losses) / sqrt(self.window), _wander(self))

    @property
    def best(self) -> int:
        """Place in `medians` of the lowest."""
        return min(range(len(self.medians)), key=self.medians.__getitem__)

    def step_of(self, place: int) -> int:
        """Step at which a median's window ends."""
        return self.steps[place + self.window - 1]


def loss_course(
    entries: Sequence[Logged], *, shard_loss: float | None = None, unigram: float | None = None, step: int | None = None
) -> LossCourse | None:
    """What the loss says of a run.

    Args:
        entries: the run's own log up to a checkpoint; lines without a loss, out of order or of another start may be among
            them: of two lines for a step, and of all after it, the later counts.
        shard_loss: mean loss of that checkpoint on the shard, in nats per token.
        unigram: entropy of the shard's targets by their frequencies, in nats per token.
        step: of the checkpoint.

    Returns:
        None where there is neither a log nor an entropy.
    """
    rows = _in_order(entries)
    found = _found(rows, entries, shard_loss, unigram, step)
    return found and found.model_copy(update=_rates(entries, found.step if found.lost else None))


def _found(
    rows: list[Logged], entries: Sequence[Logged], shard_loss: float | None, unigram: float | None, step: int | None
) -> LossCourse | None:
    if not rows and (unigram is None or shard_loss is None):
        return None
    # First, since losses that are not finite are not on the curve below, which would end before them.
    if lost := _no_numbers(rows):
        return lost
    curve = _curve([(row.step, row.loss) for row in rows if row.loss is not None])
    found = LossCourse(name="short") if curve is None else _over_best(curve, entries)
    if unigram is None and curve is not None and not found.lost:
        return _never_back(found, curve)
    if found.lost or shard_loss is None or unigram is None or shard_loss < CONTEXT * unigram:
        return found
    if curve is not None and (blown := _blown_up(found, curve, shard_loss, unigram)):
        return blown
    share = _rates(entries, None)["lr_share"]
    return _no_context(found, curve, shard_loss, unigram, step, decayed=share is not None and share <= DECAYED)


def doubted(verdict: VerdictName, course: LossCourse | None) -> VerdictName:
    """The verdict on rho, which a loss that is lost leaves unresolved where it would say that nothing is wrong."""
    # A verdict that warns stands: a lost network can be too sharp as well.
    return "unresolved" if course is not None and course.lost and verdict in ("stable", "edge") else verdict


def course_findings(report: Report) -> list[Finding]:
    """What the course of the loss says, the weightiest first: for a headline where it took the verdict away."""
    course, rho = report.course, report.judged.rho
    if course is None:
        return []
    found = []
    if course.lost:
        code = "no-context" if course.name == "collapsed" else "loss-over-best" if course.best else "loss-no-number"
        of_rho = "" if rho is None else f"; rho {rho:.3g} is that of a lost network, and vouches for no learning rate"
        found.append(Finding(code=code, severity="error", message=f"the run is {course.name}: {course.reason}{of_rho}"))
    if course.spikes:
        several = f"{len(course.spikes)} times, last" if len(course.spikes) > 1 else "once,"
        message = f"the loss jumped {several} at step {course.spikes[-1]:,}, and came back"
        found.append(Finding(code="loss-spikes", severity="info", message=message))
    found += _unlike(report, course)
    share, source = course.lr_share, report.optimizer.lr_source
    # A learning rate that the user passed is unrelated to the log's peak.
    if share is not None and 0 < share <= DECAYED and rho is not None and source in ("checkpoint", "log"):
        message = (
            f"the learning rate has decayed to {100 * share:.2g} % of its peak; at the peak's this rho would be "
            f"about {rho / share:.3g}"
        )
        found.append(Finding(code="lr-decayed", severity="info", message=message))
    return found


def _unlike(report: Report, course: LossCourse) -> list[Finding]:
    """A shard on which the network does no better than frequencies, though the run's log says that it does in training."""
    loss, unigram = report.data.loss, report.data.unigram_loss
    if course.lost or course.loss is None or unigram is None:
        return []
    if loss < CONTEXT * unigram or course.loss >= LOGGED_CONTEXT * unigram:
        return []
    message = (
        f"the loss on the shard is {loss:.3g}, where its tokens' frequencies alone give {unigram:.3g}, and in the run's log "
        f"{course.loss:.3g}: the shard is unlike what the run trains on, and so may its rho be; pass --sample spread"
    )
    return [Finding(code="shard-unlike", severity="warning", message=message)]


def _in_order(entries: Sequence[Logged]) -> list[Logged]:
    """The lines with a loss, or with one that is no number; a step that comes again undoes what was after it."""
    rows: list[Logged] = []
    for entry in entries:
        if entry.loss is None and not entry.non_finite:
            continue
        while rows and rows[-1].step >= entry.step:
            rows.pop()
        rows.append(entry)
    return rows


def _rates(entries: Sequence[Logged], step: int | None) -> dict[str, float | None]:
    """The newest learning rate over the highest, and the highest up to a step; None where the log has none."""
    rates = [(entry.step, entry.lr) for entry in entries if entry.lr is not None and entry.lr > 0]
    highest = max((lr for _, lr in rates), default=None)
    until = max((lr for at, lr in rates if step is None or at <= step), default=highest)
    return {"lr_share": rates[-1][1] / highest if highest else None, "lr_highest": until}


def _no_numbers(rows: Sequence[Logged]) -> LossCourse | None:
    """Of a log whose last losses are all no numbers."""
    end = len(rows)
    while end and rows[end - 1].non_finite:
        end -= 1
    if len(rows) - end < NO_NUMBERS:
        return None
    since = rows[end].step
    reason = f"the loss is no number since step {since:,}"
    return LossCourse(name="wrecked", step=since, reason=reason)


def _curve(points: Sequence[tuple[int, float]]) -> _Curve | None:
    if len(points) < LEAST:
        return None
    each = -(-len(points) // MOST)
    blocks = [points[start : start + each] for start in range(0, len(points), each)]
    steps = [block[-1][0] for block in blocks]
    losses = [median(loss for _, loss in block) for block in blocks]
    window = max(WINDOWS[0], min(WINDOWS[1], len(losses) // SHARE))
    medians = [median(losses[end - window : end]) for end in range(window, len(losses) + 1)]
    return _Curve(steps, losses, window, medians)


def _white(losses: Sequence[float]) -> float:
    """Standard deviation of one loss about its course: from second differences, which a slope leaves at 0, by the median."""
    bends = [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    # A second difference has 1 + 4 + 1 = 6 times the variance; 1.4826 makes a median of magnitudes a standard deviation.
    return 1.4826 * median(map(abs, bends)) / sqrt(6)


def _wander(curve: _Curve) -> float:
    """Standard deviation of medians that share no loss, as of a loss which wanders: from those that rise.

    Training falls, so that most differences are no noise. The two largest are left out: a jump lies in one of them, or two.
    """
    # Counted backward, so that the newest window is included.
    apart = curve.medians[:: -curve.window][::-1]
    rises = sorted(b - a for a, b in pairwise(apart) if b > a)[:-2]
    return 1.4826 * median(rises) / sqrt(2) if len(rises) > 2 else 0.0  # of a difference of two


def _over_best(curve: _Curve, entries: Sequence[Logged]) -> LossCourse:
    """The newest loss against the run's own best."""
    place = curve.best
    best, now = curve.medians[place], curve.medians[-1]
    raised = _raised(entries, curve.step_of(place))
    share = RESTART_RISE if raised else RISE
    margin = max(share * abs(best), NATS, SIGMAS * curve.noise)
    limit = best + margin
    # A median crosses the limit once half of its window has, so half a window of medians means a jump a full window long.
    lasting = curve.medians[-(curve.window // 2 + 1) :]
    wrecked = place < len(curve.medians) - len(lasting) and all(value > limit for value in lasting)
    # One loss is noisier than the medians that the limit is for.
    since = _since(curve, max(limit, best + 2 * _white(curve.losses))) if wrecked else None
    rise = 100 * (now - best) / best if best > 0 else None
    over = f"{rise:.0f} % over" if rise is not None else f"{now - best:.3g} over"
    at = curve.step_of(place)
    reason = f"the loss is {now:.3g}, {over} the run's own best ({best:.3g} at step {at:,})"
    reason = f"{reason}, since step {since:,}" if since is not None else ""
    return LossCourse(
        name="wrecked" if wrecked else "healthy",
        step=since,
        loss=now,
        best=best,
        best_step=at,
        rise=rise,
        margin=margin,
        window=curve.window,
        spikes=_spikes(curve, since),
        reason=reason,
    )


def _since(curve: _Curve, limit: float) -> int:
    """Step of the first loss of the stretch, up to the newest, in which losses lie over the limit."""
    place = len(curve.losses)
    # A median of five: one lucky loss does not end the stretch.
    while place and median(curve.losses[max(0, place - 3) : place + 2]) > limit:
        place -= 1
    return curve.steps[min(place, len(curve.steps) - 1)]


def _raised(entries: Sequence[Logged], best_step: int) -> bool:
    """Whether the learning rate had fallen by the best loss, and was raised again since, as in a warm restart."""
    rates = [(entry.step, entry.lr) for entry in entries if entry.lr is not None]
    before = [lr for step, lr in rates if step <= best_step]
    after = [lr for step, lr in rates if step > best_step]
    return bool(before and after) and before[-1] <= DECAYED * max(before) and max(after) >= 2 * before[-1]


def _spikes(curve: _Curve, since: int | None) -> list[int]:
    """Where a loss stood far over the median of the window before it, and did not stay."""
    found: list[int] = []
    last = -curve.window
    white = _white(curve.losses)
    for end in range(curve.window, len(curve.losses)):
        before = curve.medians[end - curve.window]
        limit = before + max(_SPIKE * abs(before), NATS, _SPIKE_SIGMAS * white)
        if curve.losses[end] <= limit or (since is not None and curve.steps[end] >= since):
            continue
        # A spike of several losses counts once; a rise that no later loss came back from is not a spike.
        if end - last > curve.window and min(curve.losses[end:]) <= limit:
            found.append(curve.steps[end])
        last = end
    return found


def _blown_up(found: LossCourse, curve: _Curve, shard_loss: float, unigram: float) -> LossCourse | None:
    """The same, wrecked, where the loss rose far over where it began; of a shard's loss that is no better than frequencies.

    Such a loss falls for long afterwards, and stands at the run's own best: against that nothing shows.
    """
    first, top = curve.losses[0], max(curve.medians)
    # Of a first loss of 0 or less no multiple means anything.
    if first <= 0 or top <= BLOWN * first or curve.medians[-1] < LOGGED_CONTEXT * unigram:
        return None
    since = next(step for step, loss in zip(curve.steps, curve.losses, strict=True) if loss > BLOWN * first)
    reason = (
        f"the loss rose from {first:.3g} to {top:.3g}, over {first * BLOWN:.3g} at step {since:,}, and still is "
        f"{shard_loss:.3g} on the shard, where the tokens' frequencies alone give {unigram:.3g}"
    )
    return found.model_copy(update={"name": "wrecked", "step": since, "reason": reason, "spikes": []})


def _never_back(found: LossCourse, curve: _Curve) -> LossCourse:
    """The same, wrecked, where the loss rose far over where it began, and stands there now.

    What has to do where no entropy is known, as of a classifier. Such a run has often learned for too short a time for its
    smoothed loss to show it.
    """
    first, now, short = max(curve.losses[:3]), curve.medians[-1], WINDOWS[0]  # one of the three may be low by luck
    if min(curve.losses) <= 0 or not NO_BETTER * first <= now <= first / NO_BETTER:
        return found
    # By logarithms, in which the noise of small and of large losses compares.
    noise = 1.25 * _white([log(loss) for loss in curve.losses]) / sqrt(short)
    limit = first * max(BLOWN, exp(min(SIGMAS * noise, 700.0)))
    tops = [(median(curve.losses[end - short : end]), end) for end in range(short, len(curve.losses) + 1)]
    if max(tops)[0] <= limit:
        return found
    place = next(end for top, end in tops if top > limit) - short
    since = next(curve.steps[i] for i in range(place, len(curve.losses)) if curve.losses[i] > limit)
    reason = (
        f"the loss rose from {first:.3g} to {max(curve.losses):.3g} from step {since:,} on, and is {curve.medians[-1]:.3g} "
        "now: where it began"
    )
    return found.model_copy(update={"name": "wrecked", "step": since, "reason": reason, "spikes": []})


def _no_context(
    found: LossCourse, curve: _Curve | None, shard_loss: float, unigram: float, step: int | None, *, decayed: bool
) -> LossCourse:
    """The same, where the shard's loss is that of token frequencies: collapsed once that has lasted.

    Not where the run's own log is below them: a shard of the first tokens can be another kind of text than the rest.
    """
    now = step if step is not None else curve.steps[-1] if curve else 0
    if curve is not None and curve.medians[-1] < LOGGED_CONTEXT * unigram:
        return found
    if curve is None:
        lasted, since = now >= UNLOGGED, None
    else:
        # Not since when it fell to it, but since when it has not got better: frequencies are learned first.
        level = curve.medians[-1] + max(0.02 * abs(curve.medians[-1]), 2 * curve.noise)
        since = next(curve.step_of(i) for i, value in enumerate(curve.medians) if value <= level)
        lasted = now - since >= now / 2 if decayed else now >= SETTLED and now - since >= 0.75 * now
    if not lasted:
        return found
    told = "" if since is None else f", and has not got better since step {since:,}"
    reason = (
        f"its loss on the shard is {shard_loss:.3g}, where the tokens' frequencies alone give {unigram:.3g}{told}: "
        "the network uses no context"
    )
    return found.model_copy(update={"name": "collapsed", "step": since, "reason": reason})
