"""Two runs on a common axis of steps: which of them is further below its edge, and since when. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

from curvcli.documents import Finding, Report, StepSide, Track, TrackComparison, TrackPoint, TrackSide, TrackStep, Versions
from curvcli.judge.clipping import lowest
from curvcli.judge.compare import shard_of, unlike
from curvcli.judge.limits import certified, on_shard
from curvcli.judge.run import judge_track

Which: TypeAlias = Literal["first", "second"] | None
Ends: TypeAlias = tuple[float | None, float | None]


def compare_tracks(first: Track, second: Track, *, names: tuple[str, str]) -> TrackComparison:
    """Both runs step by step, and the ranking by rho at the steps that they share.

    Nothing is put between two checkpoints: a step that one of them lacks ranks nothing. At a shared step the run whose
    whole bracket of rho lies below the other's is the one further below its edge. On the same tokens both values are fitted
    to the shard alike, and the brackets are those of the residuals; on others they are those of the data behind the shard.

    Args:
        names: what the user called the two.
    """
    tables = [_by_step(track) for track in (first, second)]
    steps = [_step(at, tables[0].get(at), tables[1].get(at)) for at in sorted({*tables[0], *tables[1]})]
    ranked = [step for step in steps if step.ranked]
    further = ranked[-1].further if ranked else None
    since = None
    for step in reversed(ranked):
        if step.further != further:
            break
        since = step.step
    sides = (_side(first, names[0]), _side(second, names[1]))
    return TrackComparison(
        first=sides[0],
        second=sides[1],
        steps=steps,
        ranked=len(ranked),
        further=further,
        since=since,
        findings=[*_unlike(tables), *_unranked(sides, steps, ranked), *_verdicts(sides, steps)],
        versions=Versions.installed(),
    )


def _by_step(track: Track) -> dict[int, tuple[TrackPoint, Report]]:
    """The measured points by their step; of two at one step the later."""
    return {p.step: (p, p.report) for p in track.points if p.step is not None and p.report is not None}


def _side(track: Track, name: str) -> TrackSide:
    verdict = track.verdict or judge_track(track)
    measured = [point for point in track.points if point.report is not None]
    steps = [point.step for point in measured if point.step is not None]
    return TrackSide(
        path=name,
        run=track.run,
        points=len(measured),
        failed=len(track.points) - len(measured),
        verdict=verdict.name if verdict else None,
        first_step=min(steps, default=None),
        last_step=max(steps, default=None),
    )


def _step(at: int, a: tuple[TrackPoint, Report] | None, b: tuple[TrackPoint, Report] | None) -> TrackStep:
    both = a is not None and b is not None
    same = a is not None and b is not None and shard_of(a[1]) == shard_of(b[1])
    sides = [None if found is None else _step_side(*found, on_data=both and not same) for found in (a, b)]
    one, other = sides
    ratio = None
    if one and other and one.rho is not None and other.rho is not None and one.rho > 0 and other.rho > 0:
        ratio = other.rho / one.rho
    return TrackStep(
        step=at,
        first=one,
        second=other,
        bracket=None if not both else "shard" if same else "data",
        rho_ratio=ratio,
        ranked=_ranked(one, other),
        further=_further(one, other) if _ranked(one, other) else None,
    )


def _step_side(point: TrackPoint, report: Report, *, on_data: bool) -> StepSide:
    judged, held = report.judged, report.generalisation
    sure = certified(judged)
    ends: Ends = (None, None)
    if sure and on_data:
        ends = (held.rho_low, held.rho_high) if held.held_out is not None else (None, None)
    elif sure:
        low, high = on_shard(judged.rho, judged, report.optimizer.threshold)
        ends = None if low is None else lowest(low, report.optimizer), high
    return StepSide(
        checkpoint=point.checkpoint,
        verdict=report.verdict,
        status=judged.status,
        rho=judged.rho if sure else None,
        low=ends[0],
        high=ends[1],
        eigenvalue=judged.eigenvalue if sure else None,
        threshold=report.optimizer.threshold,
        z=report.steepest.z if report.steepest else None,
        update_ratio=report.update.ratio,
        lr=report.optimizer.lr,
        training_loss=point.training_loss,
        shard_loss=report.data.loss,
    )


def _ranked(one: StepSide | None, other: StepSide | None) -> bool:
    """Whether both have a rho with a bracket, and are past their first steps."""
    sides = [side for side in (one, other) if side is not None]
    return len(sides) == 2 and all(s.low is not None and s.high is not None and s.verdict != "early" for s in sides)


def _further(one: StepSide | None, other: StepSide | None) -> Which:
    """The run whose bracket lies below the other's; None where they meet."""
    if one is None or other is None or one.low is None or one.high is None or other.low is None or other.high is None:
        return None
    return "first" if one.high < other.low else "second" if other.high < one.low else None


def _unlike(tables: list[dict[int, tuple[TrackPoint, Report]]]) -> list[Finding]:
    """What makes the two no like for like, at the newest step that they share, or else at the newest of each."""
    if not all(tables):
        return []
    shared = max(set(tables[0]) & set(tables[1]), default=None)
    reports = [table[max(table) if shared is None else shared][1] for table in tables]
    return unlike(*reports, what="runs")


def _unranked(sides: tuple[TrackSide, TrackSide], steps: list[TrackStep], ranked: list[TrackStep]) -> Iterator[Finding]:
    """Why nothing, or little, is ranked."""
    for side in sides:
        if side.points and side.last_step is None:
            message = f"no checkpoint of {side.path} has a step: it has no place on a common axis"
            yield Finding(code="no-step", severity="warning", message=message)
    shared = [step for step in steps if step.first and step.second]
    if steps and not shared:
        message = "the runs have no measured step in common: nothing is ranked, since nothing is put between two checkpoints"
        yield Finding(code="no-common-step", severity="warning", message=message)
    elif shared and not ranked:
        message = f"at none of {len(shared)} common steps both have a certified rho with a bracket, past their first steps"
        yield Finding(code="nothing-ranked", severity="warning", message=message)
    for side in sides:
        if side.failed:
            message = f"{side.failed} of {side.points + side.failed} checkpoints of {side.path} could not be measured"
            yield Finding(code="failed-points", severity="info", message=message)


def _verdicts(sides: tuple[TrackSide, TrackSide], steps: list[TrackStep]) -> Iterator[Finding]:
    """Where the two part: the verdicts on the runs, and the first step from which on those on checkpoints differ."""
    one, other = sides
    if one.verdict and other.verdict and one.verdict != other.verdict:
        message = f"run A is {one.verdict}, run B {other.verdict}"
        yield Finding(code="run-verdicts-differ", severity="info", message=message)
    since = None
    for step in reversed([step for step in steps if step.first and step.second]):
        if step.first and step.second and step.first.verdict == step.second.verdict:
            break
        since = step
    if since is not None and since.first and since.second:
        message = f"verdicts differ since step {since.step:,}, there A {since.first.verdict} and B {since.second.verdict}"
        yield Finding(code="verdicts-differ", severity="info", message=message)
