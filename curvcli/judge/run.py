"""The verdict on a whole run: the course of its loss and all of its points, not the newest alone. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from statistics import median
from typing import Literal

from curvcli.documents import ActionName, Finding, LossCourse, Report, RunName, RunVerdict, Track, TrackPoint, TrainingStep
from curvcli.judge.calibration import calibration
from curvcli.judge.clipping import alike, too_high
from curvcli.judge.course import Logged, loss_course
from curvcli.judge.limits import STABLE_BELOW, UNSTABLE_ABOVE, certified
from curvcli.judge.steepest import alone, words

DECADES, NO_BETTER = 2.0, 0.98  # lambda falls by so many while the loss on the shard keeps over this share of what it was
USES_CONTEXT = 0.9  # of the tokens' entropy: a network below that is no collapsed one
# Points before the newest, and what its rho has to be over their median for it to rise or fall.
TREND_WINDOW, RISING, FALLING = 5, 1.25, 0.8
_PAST = ("unstable", "hot")  # verdicts past the edge
FAR = 2 * UNSTABLE_ABOVE  # rho from which on a checkpoint counts as past it, though its bracket spans the limit


@dataclass(frozen=True)
class Place:
    """A checkpoint that one can go back to; `report` where it was measured."""

    path: str
    step: int | None
    report: Report | None = None


def judge_run(
    reports: Sequence[Report], log: Sequence[Logged] = (), *, places: Sequence[tuple[str, int | None]] = ()
) -> RunVerdict:
    """The verdict on a run.

    Args:
        reports: of its checkpoints in step order, at least one; the newest is the last.
        log: the run's own, up to the newest; without one the newest report's own course counts.
        places: path and step of further checkpoints of the run, which were not measured.
    """
    newest = reports[-1]
    data = newest.data
    course = (
        loss_course(log, shard_loss=data.loss, unigram=data.unigram_loss, step=newest.checkpoint.step)
        if log
        else newest.course
    )
    known = [report for report in reports if certified(report.judged) and report.judged.rho is not None]
    name, step, reasons = _name(newest, known, course)
    every = [Place(r.checkpoint.path, r.checkpoint.step, r) for r in reports]
    every += [Place(path, at) for path, at in places if path not in {place.path for place in every}]
    good = _last_good(every, step) if name == "wrecked" else None
    worst = max(known, key=_rho, default=None)
    limit = None
    if name in _ACTS:
        # Nothing has failed yet in a hot run: only rho bounds its learning rate.
        failed = course.lr_highest if course and name != "hot" else None
        # Where the newest lies below the edge its rate has decayed: the next run's peak is bounded where it was hottest.
        hottest = max(_late(known), key=_rho, default=newest) if name == "hot" and not _past(newest) else newest
        limit = restart_lr(hottest if good is None else good.report, failed)
    action, advice = _action(name, good, limit, newest)
    if good is not None and step is not None and _below_edge(known, step, course.lr_highest if course else None):
        advice += (
            "; rho up to there says nothing against the learning rate, so look first at what came at that step: the data, a "
            "change of the job, a fault of the machine"
        )
    return RunVerdict(
        name=name,
        step=step,
        good_checkpoint=good.path if good else None,
        good_step=good.step if good else None,
        worst_rho=worst.judged.rho if worst else None,
        worst_step=worst.checkpoint.step if worst else None,
        trend=_trend(known),
        course=course,
        reasons=reasons,
        action=action,
        advice=advice,
        restart_lr=limit,
    )


def judge_track(track: Track) -> RunVerdict | None:
    """The verdict on a track by today's rules; None where nothing of it was measured."""
    # It may name a checkpoint that is none of the points: an older one, where the newest alone were measured.
    good = track.verdict.good_checkpoint if track.verdict else None
    places = [(good, track.verdict.good_step)] if track.verdict and good else []
    return judge_points(track.points, track.log, places)


def judge_points(
    points: Sequence[TrackPoint], log: Sequence[TrainingStep], places: Sequence[tuple[str, int | None]]
) -> RunVerdict | None:
    """The verdict on the points of a track and the run's log; None where none was measured.

    Args:
        places: path and step of checkpoints of the run that are none of the points. One that failed is not to go back to.
    """
    reports = [point.report for point in points if point.report]
    return judge_run(reports, log, places=places) if reports else None


def run_findings(found: RunVerdict) -> list[Finding]:
    """What a track says of its run."""
    if found.name not in ("wrecked", "collapsed"):
        return []
    message = f"{'; '.join(found.reasons)}; {found.advice}"
    return [Finding(code=f"run-{found.name}", severity="error", message=message)]


def restart_lr(at: Report | None, failed: float | None) -> float | None:
    """Highest learning rate to restart with; None where nothing says one.

    The low end of the checkpoint's largest stable one, without one that at which its rho would be 1, and no more than half
    of the rate at which the run failed, whatever rho says.

    Args:
        at: the report of the checkpoint that is gone back to.
        failed: the highest learning rate up to where it went wrong.
    """
    known = [] if failed is None else [failed / 2]
    if at is not None and at.course is not None and at.course.lost:
        at = None  # a lost network's rho vouches for no learning rate
    if at is not None and at.stable_lr is not None:
        known.append(at.stable_lr.low)
    elif at is not None and at.optimizer.lr and certified(at.judged) and at.judged.rho is not None and at.judged.rho > 0:
        known.append(at.optimizer.lr / at.judged.rho)
    return min(known, default=None)


def _name(newest: Report, known: Sequence[Report], course: LossCourse | None) -> tuple[RunName, int | None, list[str]]:
    """What the run is, where it went wrong, and why."""
    # The loss goes before curvature: a lost network is flat, and looks safe.
    if course is not None and course.lost:
        return ("wrecked" if course.name == "wrecked" else "collapsed"), course.step, [course.reason]
    if flat := _flat(newest, known):
        return "collapsed", flat[0], [flat[1]]
    step = newest.checkpoint.step
    if str(newest.verdict) == "early" or (step is not None and step < calibration().early_steps):
        when = "the first steps" if step is None else f"step {step:,}"
        return "early", None, [f"at {when} rho means little: a healthy run may start far past the edge"]
    if _past(newest):
        return "hot", step, [f"rho is {_rho(newest):.3g}, past the edge{_loss_says(course)}"]
    late = _late(known)
    past = [report for report in late if _past(report)]
    # Not one alone: many runs cross the edge in their warm-up and train on (docs/explanation/method.md).
    if len(past) >= 2 and 3 * len(past) >= len(late):
        worst = max(past, key=_rho)
        at = "" if worst.checkpoint.step is None else f" at step {worst.checkpoint.step:,}"
        reason = f"{len(past)} of {len(late)} checkpoints lay past the edge, the worst with rho {_rho(worst):.3g}{at}"
        return "hot", past[0].checkpoint.step, [f"{reason}{_loss_says(course)}"]
    if newest.verdict == "unresolved" and newest.steepest is not None and alone(newest):
        z = "no Z" if newest.steepest.z is None else f"Z is {newest.steepest.z:.3g}"
        return "unresolved", None, [f"{z}, {words(newest.steepest)}: no verdict{_loss_says(course)}"]
    if newest.verdict == "unresolved":
        times = too_high(newest.optimizer)
        why = f": clipping may make its rho up to {times:.2g} times too high" if times > 1 else ""
        return "unresolved", None, [f"the newest checkpoint's verdict is unresolved{why}{_loss_says(course)}"]
    return "healthy", None, [f"rho is {_rho(newest):.3g} at the newest checkpoint{_loss_says(course)}"]


def _below_edge(known: Sequence[Report], wrong: int, highest: float | None) -> bool:
    """Whether all that was measured before a wreck was stable, and would be at the highest learning rate up to it."""
    before = [r for r in _late(known) if r.checkpoint.step is not None and r.checkpoint.step < wrong]
    if not before or highest is None:
        return False
    # Their own rate may be that of a warm-up. lambda is held as it is.
    grown = [_rho(r) * max(highest / r.optimizer.lr, 1.0) for r in before if r.optimizer.lr]
    return len(grown) == len(before) and all(r.verdict == "stable" for r in before) and max(grown) < STABLE_BELOW


def _late(known: Sequence[Report]) -> list[Report]:
    early = calibration().early_steps
    # An unknown step (None) is not taken for early; step 0 is early.
    return [report for report in known if report.checkpoint.step is None or report.checkpoint.step >= early]


def _past(report: Report) -> bool:
    """Whether a checkpoint lies past the edge: by its verdict, or so far that few tokens would not make it look so."""
    far = certified(report.judged) and report.judged.rho is not None and report.judged.rho > FAR * too_high(report.optimizer)
    return report.verdict in _PAST or (report.verdict == "unresolved" and far)


def _loss_says(course: LossCourse | None) -> str:
    if course is None or course.loss is None or course.best is None:
        return ", and the log is too short to say anything of the loss"
    if course.rise is None or course.rise < 1:
        return f", and the loss is at the run's own best, {course.loss:.3g}"
    return f", and the loss of {course.loss:.3g} is {course.rise:.2g} % over the run's own best, within its noise"


def _flat(newest: Report, known: Sequence[Report]) -> tuple[int | None, str] | None:
    """Where the loss stood still while lambda fell by decades, as in a network that has died; None where it did not."""
    data, now = newest.data, newest.judged.eigenvalue
    if not certified(newest.judged) or now is None or now <= 0:
        return None
    if data.unigram_loss is not None and data.loss < USES_CONTEXT * data.unigram_loss:
        return None
    for before in known:
        then = before.judged.eigenvalue
        same = (before.data.sha256, before.data.sequence_length) == (data.sha256, data.sequence_length)
        # Different tokens do not compare, and a share of a loss of 0 or below means nothing.
        if not same or then is None or then <= 0 or log10(then / now) < DECADES or before.data.loss <= 0:
            continue
        if data.loss >= NO_BETTER * before.data.loss:
            step = before.checkpoint.step
            since = "" if step is None else f" since step {step:,}"
            return step, f"the loss stands still at {data.loss:.3g}{since}, while lambda fell from {then:.3g} to {now:.3g}"
    return None


def _rho(report: Report) -> float:
    return report.judged.rho if report.judged.rho is not None else float("nan")


def _trend(known: Sequence[Report]) -> Literal["rising", "falling", "flat"] | None:
    """The newest rho against the median of those before it."""
    window = known[-TREND_WINDOW - 1 :]
    times = alike(*window)
    *before, newest = [_rho(report) * times(report) for report in window] or [0.0]
    if len(before) < 2 or median(before) <= 0:
        return None
    ratio = newest / median(before)
    return "rising" if ratio > RISING else "falling" if ratio < FALLING else "flat"


def _last_good(places: Sequence[Place], wrong: int | None) -> Place | None:
    """The newest checkpoint before a step, one that is past the edge only where there is no other."""
    before = [place for place in places if place.step is not None and wrong is not None and place.step < wrong]
    kept = [place for place in before if place.report is None or not _past(place.report)]
    return max(kept or before, key=lambda place: place.step or 0, default=None)


_ACTS: tuple[RunName, ...] = ("wrecked", "collapsed", "hot")


def _action(name: RunName, good: Place | None, limit: float | None, newest: Report) -> tuple[ActionName, str]:
    lr = f" with a learning rate of at most {limit:.2g}" if limit is not None else " with a lower learning rate"
    if name == "wrecked" and good is not None:
        there = good.report.optimizer.lr if good.report else None
        was = "" if there is None else f"; it was {there:.2g} there"
        return "go back", f"stop, go back to {good.path} (step {good.step:,}) and restart{lr}{was}"
    if name in ("wrecked", "collapsed"):
        why = "no checkpoint is from before it went wrong" if name == "wrecked" else "going on does not mend it"
        return "stop", f"stop: {why}; start again{lr}, or a longer warm-up"
    if name == "hot":
        most = "" if limit is None else f" to at most {limit:.2g}"
        if _past(newest):
            return "lower the lr", f"lower the learning rate{most}, and watch the loss"
        return "lower the lr", f"it was too hot for too long: for the next run, lower the peak of the learning rate{most}"
    if name == "early":
        return "watch", f"go on, and measure again after step {calibration().early_steps}"
    if name == "unresolved" and alone(newest):
        past = newest.steepest is not None and newest.steepest.reading == "past"
        return "watch", "watch the loss" + (", and lower the learning rate if it rises" if past else "")
    if name == "unresolved":
        return "watch", "watch the loss: curvature is not resolved, and the findings say what would resolve it"
    rho = newest.judged.rho
    if newest.verdict == "edge" or (rho is not None and rho > STABLE_BELOW):
        return "watch", "go on, and watch: there is no room for a larger learning rate"
    return "go on", "go on"
