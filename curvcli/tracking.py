"""A run over its checkpoints: each measured from the eigenvector of the one before, or taken from the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Literal

from curvcli import __version__
from curvcli.cache import Cache, Entry, cache_key, checkpoint_digest
from curvcli.checkpoints import Opened, Options, open_for_analysis
from curvcli.errors import CurvError, InputError
from curvcli.inputs import find_checkpoints, step_of
from curvcli.measurement import Directions, Progress
from curvcli.readings import certified, surge_of
from curvcli.results import Finding, Report, Track, TrackPoint, TrainingStep, Versions, WarmStart

WINDOW, SURGE = 5, 2.0


def track_run(
    path: Path,
    options: Options,
    cache: Cache,
    *,
    last: int | None = None,
    window: int = WINDOW,
    surge_limit: float = SURGE,
    progress: Progress | None = None,
) -> Track:
    """`curv track`: every checkpoint of a run in step order.

    A checkpoint that cannot be measured is a point that says why, and the run goes on. Each report is in the cache
    as soon as it is made: an interrupted call goes on where it stopped.

    Args:
        path: a run directory, or a pattern.
        last: only so many of the newest checkpoints.
        window: certified points that a surge's median is over.
        surge_limit: rho over that median above which a point counts as surged.

    Raises:
        InputError: there is no checkpoint, or none of them could be measured.
    """
    started = time.monotonic()
    say = progress or (lambda stage, done: None)
    found = find_checkpoints(path)[-last if last else 0 :]
    points: list[TrackPoint] = []
    log: list[TrainingStep] = []
    before: Directions | None = None
    shard: str | None = None
    for i, checkpoint in enumerate(found):

        def within(stage: str, done: float, place: int = i) -> None:
            say(f"checkpoint {place + 1} of {len(found)}: {stage}", (place + done) / len(found))

        try:
            within("reading", 0.0)
            opened = open_for_analysis(checkpoint, options)
            log = [TrainingStep(step=e.step, loss=e.loss, lr=e.lr) for e in opened.checkpoint.log] or log
            if shard not in (None, opened.shard.sha256):
                raise InputError(
                    "its tokens are not those of the checkpoints before", hint="give one --data for the whole run"
                )
            entry, source, warm = _measured(opened, cache, before, within)
            shard, before = opened.shard.sha256, entry.directions
            points.append(_point(opened, entry.report, source, warm, points, window, surge_limit))
        except CurvError as error:
            points.append(_failed(checkpoint, error))
            before = None
    if all(point.report is None for point in points):
        first = points[0]
        raise InputError(
            f"none of {len(points)} checkpoints of {path} could be measured; {first.checkpoint}: {first.message}",
            hint="try one alone with curv analyze",
        )
    hvps = sum(p.report.cost.hvps for p in points if p.report and p.source == "measured")
    return Track(
        run=str(path),
        points=points,
        log=log,
        window=window,
        surge_limit=surge_limit,
        findings=_findings(points, surge_limit),
        hvps=hvps,
        seconds=time.monotonic() - started,
        versions=Versions.installed(),
    )


def key_of(opened: Opened) -> str:
    """The cache's name for a measurement: what it is of and how it is made, not where it lies. Raises InputError."""
    checkpoint, shard = opened.checkpoint, opened.shard
    try:
        content = checkpoint_digest(checkpoint.path)
    except OSError as error:
        raise InputError(f"cannot read {checkpoint.path}: {error.strerror}", hint="check its permissions") from error
    how = {k: v for k, v in asdict(opened.options).items() if k not in ("data", "deadline")}
    versions = Versions.installed()
    return cache_key(
        checkpoint=content,
        tokens=[shard.sha256, shard.sequence_length],
        how=how,
        versions=[__version__, versions.torch, versions.transformers],
    )


def _measured(
    opened: Opened, cache: Cache, before: Directions | None, progress: Progress
) -> tuple[Entry, Literal["measured", "cached"], WarmStart | None]:
    key = key_of(opened)
    if (entry := cache.get(key)) is not None:
        # The same content may have been measured elsewhere.
        place = {"path": str(opened.checkpoint.path)}
        data = {"path": str(opened.shard.path)}
        moved = {
            "checkpoint": entry.report.checkpoint.model_copy(update=place),
            "data": entry.report.data.model_copy(update=data),
        }
        return Entry(entry.report.model_copy(update=moved), entry.directions), "cached", None
    analysis = opened.measure(progress, before)
    entry = Entry(analysis.report, analysis.directions)
    cache.put(key, entry)
    return entry, "measured", analysis.warm_start


def _point(
    opened: Opened,
    report: Report,
    source: Literal["measured", "cached"],
    warm: WarmStart | None,
    points: Sequence[TrackPoint],
    window: int,
    limit: float,
) -> TrackPoint:
    rho = report.full.rho if report.full.status == "converged" else None
    before = [r.full.rho for r in certified(points, window) if r.full.rho is not None]
    surge = surge_of(rho, before) if rho is not None else None
    return TrackPoint(
        checkpoint=str(opened.checkpoint.path),
        step=opened.checkpoint.step,
        source=source,
        report=report,
        training_loss=opened.checkpoint.training_loss,
        surge=surge,
        surged=surge is not None and surge > limit,
        warm_start=warm,
    )


def _failed(path: Path, error: CurvError) -> TrackPoint:
    return TrackPoint(
        checkpoint=str(path),
        step=step_of(path),
        source="failed",
        report=None,
        message=str(error),
        training_loss=None,
        surge=None,
        surged=False,
        warm_start=None,
    )


def _findings(points: Sequence[TrackPoint], limit: float) -> list[Finding]:
    found = []
    for point in points:
        where = f"step {point.step:,}" if point.step is not None else point.checkpoint
        if point.surged and point.surge is not None:
            message = f"{where}: rho is {point.surge:.2g} times the median of the points before, above {limit:g}"
            found.append(Finding(code="surge", severity="warning", message=message))
        if point.source == "failed":
            found.append(Finding(code="not-measured", severity="warning", message=f"{where}: {point.message}"))
    for earlier, later in pairwise(points):
        if earlier.report and later.report and earlier.report.verdict != later.report.verdict:
            message = f"{earlier.report.verdict} at step {earlier.step}, {later.report.verdict} at step {later.step}"
            severity: Literal["error", "info"] = "error" if later.report.verdict == "unstable" else "info"
            found.append(Finding(code="verdict-changed", severity=severity, message=message))
    return [*found, *_saved(points)]


def _saved(points: Sequence[TrackPoint]) -> list[Finding]:
    """What starting from the checkpoint before saved, as it was measured in this call."""
    known = [p.warm_start for p in points if p.warm_start and p.warm_start.converged]
    cold, warm = sum(w.cold_hvps for w in known), sum(w.hvps for w in known)
    if not cold:
        return []
    change = f"saved {cold - warm} of {cold}" if warm <= cold else f"cost {warm - cold} more than the {cold}"
    message = (
        f"warm starts {change} products in the {len(known)} solves that were made both ways (full model, a quarter of the "
        "shard)"
    )
    return [Finding(code="warm-start", severity="info", message=message)]
