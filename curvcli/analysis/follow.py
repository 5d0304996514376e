"""A run that is still being written: its checkpoints measured as they appear, and what has changed since the last look."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from curvcli.analysis.cache import Cache, MemoryCache, NoCache, checkpoint_stamp, digests_kept
from curvcli.analysis.gate import gate, in_force
from curvcli.analysis.options import options_of
from curvcli.analysis.stages import Progress
from curvcli.analysis.track import SURGE, WINDOW, track
from curvcli.checkpoints import find_checkpoints
from curvcli.documents import Gate, Track, TrackPoint
from curvcli.errors import CurvError, UsageError

Stamps: TypeAlias = "dict[Path, list[tuple[str, int, int]]]"
INTERVAL = 30.0


@dataclass(frozen=True)
class Event:
    """Something that somebody may want to be told.

    Attributes:
        kind: "gate": the gate broke; "verdict": of the newest checkpoint, "run": of the whole run, is another than before.
        message: a line for people.
        before: the verdict or outcome at the look before; None of a gate that was not looked at before.
        now: the same at this look.
    """

    kind: Literal["gate", "verdict", "run"]
    message: str
    before: str | None
    now: str


@dataclass(frozen=True)
class Look:
    """What a look at the run found. `gate` is None where no rule is in force; `trouble` is why there is no track."""

    track: Track | None
    gate: Gate | None = None
    events: list[Event] = field(default_factory=list)
    trouble: str | None = None

    def told(self, event: Event) -> dict[str, Any]:
        """An event as programs get it, with what it is of."""
        points = [point for point in self.track.points if point.report] if self.track else []
        report = points[-1].report if points else None
        return {
            "event": event.kind,
            "message": event.message,
            "before": event.before,
            "now": event.now,
            "run": self.track.run if self.track else None,
            "checkpoint": points[-1].checkpoint if points else None,
            "step": points[-1].step if points else None,
            "rho": report.judged.rho if report else None,
            "verdict": report.verdict if report else None,
            "run_verdict": self.track.verdict.name if self.track and self.track.verdict else None,
            "gate": self.gate.outcome if self.gate else None,
        }


def follow(
    run: Path,
    *,
    interval: float = INTERVAL,
    last: int | None = None,
    surge: float = SURGE,
    window: int = WINDOW,
    cache: Cache | None = None,
    progress: Progress | None = None,
    sleep: Callable[[float], object] = time.sleep,
    **options: Any,
) -> Iterator[Look]:
    """Looks at a run that had something new to measure, without end.

    A checkpoint is measured once its files have stayed as they are from one look to the next: what a job still writes is
    left alone. One that changes later is measured again, and what was measured of one that is deleted stays in the track.
    Rules are those of [gate] that count for the run, held against the track; without any there is no gate.

    Args:
        run: a run directory or a pattern; it need not be there yet.
        interval: seconds between two looks.
        last: as of `track`, with the next two.
        cache: that outlives the process; none by default.
        sleep: waits so many seconds.
        **options: how checkpoints are measured, as of `track`.

    Raises:
        UsageError: an option is none, or a number is out of its range.
    """
    options_of(options)  # before anything is waited for
    if not 0 < interval < float("inf"):
        raise UsageError(f"--interval {interval} is no number of seconds", hint="pass a positive number")
    # pathlib has collapsed the two slashes into one.
    if "://" in str(run) or str(run).startswith(("s3:/", "gs:/", "hf:/")):
        raise UsageError(f"{run} is a URL, and nothing tells when it changes", hint="call curv track by a timer")
    store, state = MemoryCache(cache or NoCache()), _State()
    before: Stamps = {}
    measured: Stamps | None = None
    with digests_kept():
        while True:
            now = _stamps(run)
            settled = {path: stamp for path, stamp in now.items() if before.get(path) == stamp}
            # Every one has to have settled, since a track reads all that are there.
            if settled and settled == now and now != measured:
                measured = now
                yield state.look(run, last=last, surge=surge, window=window, cache=store, progress=progress, **options)
            before = now
            sleep(interval)


def _stamps(run: Path) -> Stamps:
    """Of each checkpoint that lies there now; none where there is none yet, or one goes while it is looked at."""
    try:
        return {path: checkpoint_stamp(path) for path in find_checkpoints(run)}
    except (CurvError, OSError):
        return {}


class _State:
    """What was known at the last look."""

    def __init__(self) -> None:
        self.verdict: str | None = None
        self.run: str | None = None
        self.outcome: str | None = None
        self.points: list[TrackPoint] = []

    def look(self, run: Path, **how: Any) -> Look:
        """Measure what is new. What a checkpoint or the data are at fault for is a look without a track."""
        # A job that keeps a few checkpoints deletes those before: what was measured of them stays.
        gone = [point for point in self.points if point.report and not Path(point.checkpoint).exists()]
        try:
            found = track(run, gone=gone, **how)
        except UsageError:  # which no later look mends
            raise
        except CurvError as error:
            return Look(None, trouble=str(error))
        self.points = found.points
        judged = _gate(run, found)
        events = [event for event in self._changes(found, judged) if event is not None]
        return Look(found, judged, events)

    def _changes(self, found: Track, judged: Gate | None) -> Iterator[Event | None]:
        newest = next((point for point in reversed(found.points) if point.report), None)
        verdict = newest.report.verdict if newest and newest.report else None
        where = f"step {newest.step:,}" if newest and newest.step is not None else newest.checkpoint if newest else ""
        run = found.verdict.name if found.verdict else None
        if judged is not None:
            if judged.outcome == "broken" and self.outcome != "broken":
                why = next(outcome.message for outcome in judged.outcomes if outcome.outcome == "broken")
                yield Event("gate", f"{found.run}, {where}: the gate is broken: {why}", self.outcome, "broken")
            self.outcome = judged.outcome
        if verdict is not None and self.verdict not in (None, verdict):
            yield Event("verdict", f"{found.run}, {where}: {verdict}, {self.verdict} before", self.verdict, verdict)
        if run is not None and self.run not in (None, run) and found.verdict is not None:
            message = f"{found.run}, {where}: the run is {run}, {self.run} before; {found.verdict.advice}"
            yield Event("run", message, self.run, run)
        # A look at which nothing could be measured is no change.
        self.verdict, self.run = verdict or self.verdict, run or self.run


def _gate(run: Path, found: Track) -> Gate | None:
    """The rules that count for the run, held against its track; None where none is in force."""
    try:
        in_force(run, {})
    except UsageError:
        return None
    return gate(found)
