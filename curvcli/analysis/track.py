"""A run over its checkpoints: each measured, or taken from the cache."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, replace
from functools import partial
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, Literal

from curvcli.analysis.budget import Budget
from curvcli.analysis.cache import (
    Cache,
    FileCache,
    NoCache,
    RankedCache,
    cache_key,
    checkpoint_digest,
    checkpoint_stamp,
)
from curvcli.analysis.checkpoint import Opened, architecture_of, open_for_analysis
from curvcli.analysis.options import Options, options_of
from curvcli.analysis.stages import Progress
from curvcli.checkpoints import fetched, find_checkpoints, newest_complete, open_checkpoint, passed_over, step_of
from curvcli.checkpoints.arguments import SMOOTHED
from curvcli.curvature.ranks import current
from curvcli.documents import Finding, Report, Track, TrackPoint, TrainingStep, Versions
from curvcli.errors import CurvError, InputError, OutOfTime, RankError, UsageError, counted
from curvcli.judge.limits import changed
from curvcli.judge.readings import ReportReadings, incomparable, past
from curvcli.judge.run import judge_points, run_findings
from curvcli.models.architecture import config_beside
from curvcli.models.user_digest import code_digest

WINDOW, SURGE = 5, 2.0
# A point that was not reached is a failed point, recognised by this message.
_LATE = CurvError("the time budget ran out before it", hint="call again to go on, or raise --budget")


def track(
    run: Path | str,
    *,
    last: int | None = None,
    surge: float = SURGE,
    window: int = WINDOW,
    cache: bool | Cache = True,
    progress: Progress | None = None,
    on_point: Callable[[TrackPoint], None] | None = None,
    budget: float | None = None,
    started: float | None = None,
    gone: Sequence[TrackPoint] = (),
    **options: Any,
) -> Track:
    """The course of a run over its checkpoints: `curv track` from Python.

    Checkpoints are measured in step order, without the curves over depth. One that cannot be measured is a point that says
    why, and the run goes on.

    Args:
        run: a run directory, a pattern, or a URL.
        last: only so many of the newest checkpoints.
        surge: rho over the median of the points before above which a point counts as surged, above 1.
        window: certified points that this median is over, at least 2.
        cache: whether reports are taken from the user's cache directory and kept there, or a cache of one's own. One that
            cannot be written is a RuntimeWarning.
        progress: called with what is being done and the fraction done.
        on_point: called with each point as soon as it is finished.
        budget: seconds for all of it. Checkpoints that are not reached are failed points; what was measured in full is in
            the cache, so that a second call goes on.
        started: instant of `time.monotonic()` at which the budget began, if not now.
        gone: points of an earlier track whose checkpoints were deleted since, as a job does that keeps a few: they stay.
        **options: how checkpoints are measured, by the names of `curvcli.analysis.options.Options` (data, tokens,
            sequence_length, lr, ...).

    Returns:
        The track, whose points hold whole reports; the document is `track.to_json()`.

    Raises:
        UsageError: an option is none, or a number is out of its range.
        InputError: there is no checkpoint, or none of them could be measured.
        OutOfTime: the budget ran out before anything was measured.
    """
    if not 1 < surge < inf or window < 2 or (last is not None and last < 1):  # nor is nan
        raise UsageError(
            f"surge {surge}, window {window}, last {last}", hint="surge must be above 1, window at least 2, last at least 1"
        )
    limit = Budget(inf if budget is None else budget, *([] if started is None else [started]))
    how = replace(options_of(options, fixed=("depths", "deadline", "truncated")), depths=False, deadline=limit.deadline)
    store: Cache = FileCache() if cache is True else NoCache() if cache is False else cache
    found = track_run(
        Path(run), how, store, last=last, window=window, surge_limit=surge, progress=progress, on_point=on_point,
        budget=limit, gone=gone,
    )  # fmt: skip
    # Callers who pass their own cache can ask it for its complaint.
    if cache is True and isinstance(store, FileCache) and store.complaint:
        warnings.warn(store.complaint, RuntimeWarning, stacklevel=2)
    return found


def track_run(
    path: Path,
    options: Options,
    cache: Cache,
    *,
    last: int | None = None,
    window: int = WINDOW,
    surge_limit: float = SURGE,
    progress: Progress | None = None,
    on_point: Callable[[TrackPoint], None] | None = None,
    budget: Budget | None = None,
    gone: Sequence[TrackPoint] = (),
) -> Track:
    """Every checkpoint of a run in step order.

    A checkpoint that cannot be measured is a point that says why, and the run goes on. Each report is in the cache
    as soon as it is made: an interrupted call goes on where it stopped.

    Args:
        path: a run directory, or a pattern.
        last: only so many of the newest checkpoints.
        window: certified points that a surge's median is over.
        surge_limit: rho over that median above which a point counts as surged.
        on_point: called with each point as soon as it is finished.
        budget: whose deadline is that of the options.
        gone: as of `track`.

    Raises:
        InputError: there is no checkpoint, or none of them could be measured.
        OutOfTime: the budget ran out before anything was measured.
    """
    started = time.monotonic()
    cache = _kept(cache, options)
    say = progress or (lambda stage, done: None)
    found = _found(path)
    over = passed_over(path, found)
    every, found = found, the_last(found, last, options)
    points: list[TrackPoint] = []
    log: list[TrainingStep] = []
    shard: tuple[str, int | None] | None = None
    kept = sorted(gone, key=lambda point: -1 if point.step is None else point.step)
    cached = 0
    for i, checkpoint in enumerate(found):
        points += _until(kept, checkpoint)

        # Those from the cache take no time, and say nothing of what is left. The fraction never falls.
        left = len(found) - cached

        def within(
            stage: str, done: float, i: int = i, left: int = left, call_off: Callable[[], None] = lambda: None
        ) -> None:
            if stage == "report":  # measured: what is left is short, and must not be lost
                call_off()
            say(f"checkpoint {i + 1} of {len(found)}: {stage}", 1 - (len(found) - i - done) / left)

        try:
            with current().together(), (budget or Budget()).alarm() as disarm:
                within("reading", 0.0)
                checkpoint = fetched(checkpoint)  # of a run behind a URL, one at a time
                unchanged = partial(_is_still, checkpoint, _stamp(checkpoint))
                opened = _complete(checkpoint, options)
                # The newest log has those before in it.
                log = [TrainingStep(**asdict(entry)) for entry in opened.checkpoint.log] or log
                tokens = _same(opened, shard)
                report, source = _measured(opened, cache, unchanged, partial(within, call_off=disarm))
            shard = tokens  # only what was measured says which tokens the run's are
            points.append(_point(opened, report, source, points, window, surge_limit))
            cached += source == "cached"
        except CurvError as error:
            points.append(_failed(checkpoint, error))
        except OutOfTime:
            if all(point.report is None for point in points):
                raise
            points += [_failed(late, _LATE) for late in found[i:]]
            break
        if on_point:
            on_point(points[-1])
    points += kept
    if all(point.report is None for point in points):
        first = points[0]
        raise InputError(
            f"none of {counted(len(points), 'checkpoint')} of {path} could be measured; {first.checkpoint}: {first.message}",
            hint="try one alone with curv analyze",
        )
    others = [(str(place), step_of(place)) for place in every[: len(every) - len(found)]]
    verdict = judge_points(points, log, others)
    hvps = sum(p.report.cost.hvps for p in points if p.report and p.source == "measured")
    return Track(
        run=str(path),
        points=points,
        log=log,
        window=window,
        surge_limit=surge_limit,
        findings=[*(run_findings(verdict) if verdict else []), *over, *_findings(points, surge_limit)],
        verdict=verdict,
        hvps=hvps,
        seconds=time.monotonic() - started,
        versions=Versions.installed(),
    )


def _kept(cache: Cache, options: Options) -> Cache:
    """The cache, rank 0's for all ranks."""
    return cache if current().world == 1 else RankedCache(cache, current())


def _found(path: Path) -> list[Path]:
    """The run's checkpoints in order: those that rank 0 sees, where there are several. Raises InputError."""
    ranks = current()
    with ranks.together():
        names = [str(place) for place in _in_order(find_checkpoints(path))] if ranks.rank == 0 else []
    return [Path(name) for name in json.loads(ranks.first_text(json.dumps(names)))]


def _until(kept: list[TrackPoint], checkpoint: Path) -> list[TrackPoint]:
    """Takes those of the points, in step order, that come before a checkpoint by its number."""
    step = step_of(checkpoint)
    count = 0 if step is None else sum((point.step or 0) < step for point in kept)
    taken, kept[:] = kept[:count], kept[count:]
    return taken


def the_last(found: list[Path], last: int | None, options: Options) -> list[Path]:
    """So many complete ones of a run's checkpoints, and what comes after them; all without a number."""
    if not last:
        return found
    return found[max(0, newest_complete(found, architecture_of(options.model)) - last + 1) :]


def _same(opened: Opened, shard: tuple[str, int | None] | None) -> tuple[str, int | None]:
    """The shard's digest and sequence length. Raises InputError where those before were others."""
    tokens = opened.read.sha256, opened.read.sequence_length
    if shard not in (None, tokens):
        raise InputError("its tokens are not those of the checkpoints before", hint="give one --data for the whole run")
    return tokens


def _complete(checkpoint: Path, options: Options) -> Opened:
    """Raises InputError where others of the run have optimizer state, and this one has not."""
    opened = open_for_analysis(checkpoint, options)
    for finding in opened.checkpoint.findings:
        if finding.code == "incomplete-checkpoint":
            raise InputError(finding.message, hint="curv analyze measures it as it is, with an estimated second moment")
    return opened


def _in_order(found: list[Path]) -> list[Path]:
    """By the step in the names where all have one, else by the step that the checkpoints themselves have."""
    if all(step_of(path) is not None for path in found):
        return found

    def step(path: Path) -> int:
        with suppress(CurvError):
            return open_checkpoint(path).step or 0
        return -1

    return sorted(found, key=step)


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    try:
        return checkpoint_stamp(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error


def _is_still(path: Path, stamp: list[tuple[str, int, int]]) -> bool:
    """Whether a checkpoint is as it was, by the path it was found under: what is opened may lie inside of that."""
    return _stamp(path) == stamp


def key_of(opened: Opened) -> str:
    """The cache's name for a measurement: what it is of and how it is made, not where it lies. Raises InputError."""
    checkpoint, shard = opened.checkpoint, opened.read
    # It is read with the checkpoint but may lie above it, outside of the checkpoint's own digest.
    config = config_beside(checkpoint.path)
    try:
        content = [checkpoint_digest(p) for p in (checkpoint.path, config, *checkpoint.sources) if p]
    except OSError as error:
        raise InputError(f"cannot read {checkpoint.path}: {error.strerror}", hint="check its permissions") from error
    how = {k: v for k, v in asdict(opened.options).items() if k not in ("data", "deadline", "shard")}
    versions = Versions.installed()
    return cache_key(
        checkpoint=[*content, checkpoint.step],  # the step may be from the directory's name
        log=[astuple(entry) for entry in checkpoint.log],  # which may lie beside the checkpoint
        tokens=[shard.sha256, shard.sequence_length],
        how=how,
        ended=[checkpoint.ended_lr, [f.message for f in checkpoint.findings if f.code == SMOOTHED]],  # may lie above, too
        code=_code(opened),
        versions=[versions.torch, versions.transformers],
    )


def _code(opened: Opened) -> list[str]:
    return [code_digest(spec) for spec in (opened.options.model, opened.options.loss) if spec and ":" in spec]


def _measured(
    opened: Opened, cache: Cache, unchanged: Callable[[], bool], progress: Progress
) -> tuple[Report, Literal["measured", "cached"]]:
    key, code = key_of(opened), _code(opened)
    if (report := cache.get(key)) is not None:
        # The same content may have been measured elsewhere.
        place = {"path": str(opened.checkpoint.path)}
        data = opened.data(report.data.loss, report.data.tokens, report.data.unigram_loss)
        moved = {"checkpoint": report.checkpoint.model_copy(update=place), "data": data}
        return report.model_copy(update=moved), "cached"
    report = opened.measure(progress)
    # The job may have rewritten it meanwhile, and the report be of half of each.
    if not unchanged():
        raise InputError("it changed while it was measured", hint="call again once it is written")
    full_disk = any(finding.code == "disk-full" for finding in report.findings)
    if time.monotonic() < opened.options.deadline and not full_disk:  # else parts of it may be missing
        # The user's code may have loaded more of itself meanwhile, or have changed.
        cache.put(key if _code(opened) == code else key_of(opened), report)
    return report, "measured"


def _point(
    opened: Opened,
    report: Report,
    source: Literal["measured", "cached"],
    points: Sequence[TrackPoint],
    window: int,
    limit: float,
) -> TrackPoint:
    reading = ReportReadings(report, history=past(points, window)).surge()
    surge = None if reading.reason else reading.value
    return TrackPoint(
        checkpoint=str(opened.checkpoint.path),
        step=opened.checkpoint.step,
        source=source,
        report=report,
        training_loss=opened.checkpoint.training_loss,
        surge=surge,
        surged=surge is not None and surge > limit,
    )


def _failed(path: Path, error: CurvError) -> TrackPoint:
    # A bug in one rank is not the checkpoint's fault, and would fail every point after it.
    if isinstance(error, RankError):
        raise error
    return TrackPoint(
        checkpoint=str(path),
        step=step_of(path),
        source="failed",
        report=None,
        message=str(error),
        training_loss=None,
        surge=None,
        surged=False,
    )


def _findings(points: Sequence[TrackPoint], limit: float) -> list[Finding]:
    found = []
    for point in points:
        where = f"step {point.step:,}" if point.step is not None else point.checkpoint
        if point.surged and point.surge is not None:
            message = f"{where}: rho is {point.surge:.2g} times the median of the points before, above {limit:g}"
            found.append(Finding(code="surge", severity="warning", message=message))
        if point.source == "failed" and point.message != str(_LATE):
            found.append(Finding(code="not-measured", severity="warning", message=f"{where}: {point.message}"))
    if late := sum(point.message == str(_LATE) for point in points):
        of = counted(len(points), "checkpoint")
        message = f"the time budget ran out before {late} of {of}: call again to go on, or raise --budget"
        found.append(Finding(code="out-of-time", severity="warning", message=message))
    measured = [point.report for point in points if point.report]
    for earlier, later in pairwise(measured):
        steps = f"step {earlier.checkpoint.step} to {later.checkpoint.step}"
        if earlier.verdict != later.verdict:
            message = f"{steps}: {earlier.verdict} before, {later.verdict} then"
            found.append(Finding(code="verdict-changed", severity=changed(later.verdict), message=message))
        if reason := incomparable(later, earlier):
            message = f"{steps}: the two do not compare ({reason}), and no surge is over both"
            found.append(Finding(code="not-comparable", severity="warning", message=message))
    return found
