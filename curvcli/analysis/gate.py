"""`curvcli.gate`: rules held against a checkpoint, a report or a track, from Python as from the command line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from curvcli.analysis.budget import measure
from curvcli.analysis.config import GateTable, find_gate, gate_not_counted
from curvcli.analysis.launch import decides
from curvcli.analysis.stages import Progress
from curvcli.documents import Gate, Report, Rule, Track, load_report, load_track, schema_of, write_whole
from curvcli.documents.columns import rules as known_rules
from curvcli.errors import CurvError, InputError, OutOfTime, UsageError
from curvcli.judge.gate import Unresolved, decide
from curvcli.judge.readings import NoReadings, Readings, ReportReadings, compared, past, track_readings
from curvcli.judge.run import judge_run, judge_track

TRACK = "curv.track/1"
ALL = 2**53  # points: no run has as many
# Rules that look at layers, or compare with a report whose layers are counted.
OF_PARTS = {rule.name for rule in known_rules() if rule.scope in ("parts", "layers", "comparison")}


def gate(
    subject: str | Path | Report | Track,
    *,
    baseline: str | Path | Report | Track | None = None,
    regression_tolerance: float | None = None,
    unresolved: Literal["pass", "fail"] | None = None,
    budget: float | None = None,
    report: str | Path | None = None,
    progress: Callable[[str, float], None] | None = None,
    started: float | None = None,
    on_verdict: Callable[[Report], None] | None = None,
    any: bool | None = None,  # noqa: A002
    last: int | None = None,
    **given: Any,
) -> Gate:
    """Hold a checkpoint, a report or a track against rules.

    A rule that is not given here is that of [gate] in the working directory's curv.toml, if that has one. The run's own loss
    is held in without a rule: where it says that the run is wrecked or has collapsed, the gate is broken.

    Args:
        subject: path of a checkpoint, of a run (its newest checkpoint), of a report or of a track (its newest point); or the
            report or track itself.
        any: whether rules have to hold at every point of the run: one that breaks one breaks the gate. A run's checkpoints
            are then measured as `curv track` does, from its cache.
        last: the same of the newest so many points alone.
        baseline: report or track to compare with, or its path.
        regression_tolerance: percent added to max_regression.
        unresolved: what an unresolved outcome is taken for, in the exit code.
        budget: seconds for measuring a checkpoint.
        report: where a measured checkpoint's report is written, for a later baseline.
        progress: takes what is being done, and the fraction done.
        started: instant of `time.monotonic()` at which the budget began, if not now.
        on_verdict: where a checkpoint is measured, called with a report of its full model as soon as that is known.
        given: rules by their names (`max_rho=1.0`, `require_resolved=True`; docs/how-to/gate.md has all), and where a
            checkpoint is measured, options of `curv analyze` by theirs (`data`, `tokens`, `lr`).

    Raises:
        UsageError: no rule is in force, or one is no number; a rule compares and has no baseline; an option is not known, or
            is one of measuring and nothing is measured.
        InputError: the subject or the baseline cannot be read.
    """
    started = time.monotonic() if started is None else started
    subject = Path(subject) if isinstance(subject, str) else subject
    baseline = Path(baseline) if isinstance(baseline, str) else baseline
    names = {rule.field for rule in known_rules()}
    settings = in_force(
        subject,
        {
            **{name: value for name, value in given.items() if name in names},
            "baseline": baseline,
            "regression_tolerance": regression_tolerance,
            "unresolved": unresolved,
            "any": any,
            "last": last,
        },
    )
    before = _baseline(settings.baseline)  # before minutes are spent
    options = {name: value for name, value in given.items() if name not in names}
    judged: Path | Report | Track | str = _opened(subject)
    kind: Literal["report", "track", "checkpoint"] = (
        "checkpoint" if isinstance(judged, Path) else "track" if isinstance(judged, Track) else "report"
    )
    found: Report | None
    readings: Readings
    points: list[tuple[str, int | None, Readings]] = []
    if isinstance(judged, Report) and settings.points is not None:
        raise UsageError(f"--any and --last are for runs and tracks, and {_name(subject)} is a report", hint="drop them")
    if isinstance(judged, Path) and settings.points is not None:
        judged = _tracked(judged, settings.points, options, budget=budget, started=started, progress=progress)
        options, budget = {}, None  # used up: what follows is as of a track that was there
        if isinstance(judged, Track) and report is not None and decides() and (newest := judged.points[-1].report):
            write_whole(Path(report), newest.to_json().encode())
        report = None
    if isinstance(judged, str):
        found, readings = None, NoReadings(judged)
    elif isinstance(judged, Path):
        tell = progress or (lambda stage, done: None)
        # What no rule looks at is not measured, but for a report that is kept.
        curves = report is not None or options.get("truncated") is True or options.get("depths") is True
        needed = curves or not OF_PARTS.isdisjoint(rule.name for rule in settings.rules)
        options = {"parts": needed, "depths": curves, **options}
        found, reason = measure(judged, options, started=started, seconds=budget, tell=tell, on_verdict=on_verdict)
        if found is not None and report is not None and decides():
            write_whole(Path(report), found.to_json().encode())
        readings = NoReadings(reason)
        if found is not None:
            run = judge_run([found], places=_places(judged))
            readings = ReportReadings(found, *compared(before, found), run)
    # Slicing a list of one by a bool keeps the name only where the option was given.
    elif flags := [*options, *["report"][: report is not None], *["budget"][: budget is not None]]:
        flag = f"--{flags[0].replace('_', '-')}"
        raise UsageError(f"{flag} is for checkpoints, and {_name(subject)} is a document", hint=f"drop {flag}")
    elif isinstance(judged, Track):
        found = judged.points[-1].report
        readings = track_readings(judged, compared(before, found)[0])
        points = _points(judged, before, settings.points)
    else:
        found, readings = judged, ReportReadings(judged, *compared(before, judged))
    return decide(
        settings.rules,
        readings,
        found,
        path=_name(subject),
        kind=kind,
        baseline=None if settings.baseline is None else _name(settings.baseline),
        regression_tolerance=settings.tolerance,
        unresolved=settings.unresolved,
        points=points,
    )


def _tracked(
    run: Path, last: int, options: Mapping[str, Any], *, budget: float | None, started: float, progress: Progress | None
) -> Track | str:
    """The newest `last` checkpoints of a run measured, or why none was in time. Raises CurvError."""
    from curvcli.analysis.track import track

    try:
        return track(run, last=last if last < ALL else None, progress=progress, budget=budget, started=started, **options)
    except OutOfTime:
        return f"the budget of {budget:g} s ran out, and nothing was measured; raise --budget"


def _points(track: Track, before: Report | list[Report] | None, last: int | None) -> list[tuple[str, int | None, Readings]]:
    """Name, step and readings of the points that the rules have to hold for; none where it is the newest alone."""
    if last is None:
        return []
    run = judge_track(track)
    found: list[tuple[str, int | None, Readings]] = []
    for place in range(max(0, len(track.points) - last), len(track.points)):
        point = track.points[place]
        name = point.checkpoint if point.step is None else f"step {point.step:,}"
        found.append((name, point.step, track_readings(track, compared(before, point.report)[0], place, run)))
    return found


def _places(path: Path) -> list[tuple[str, int | None]]:
    """Path and step of the checkpoints of a run, or of that which a checkpoint lies in; none of a run behind a URL."""
    from curvcli.checkpoints import find_checkpoints, step_of

    found: list[Path] = []
    if path.exists():
        with suppress(CurvError, OSError):
            found = find_checkpoints(path)
            # A numbered checkpoint belongs to a run: its siblings are what one can go back to.
            if len(found) == 1 and step_of(found[0]) is not None:
                found = find_checkpoints(found[0].absolute().parent)
    return [(str(place), step_of(place)) for place in found]


@dataclass(frozen=True)
class Settings:
    """The rules in force, and what goes with them.

    Args:
        others: the settings that are no rules: name, value, source.
        points: how many of a run's newest points rules have to hold for; None is the newest alone, `ALL` all of them.
    """

    rules: list[Rule]
    baseline: Path | Report | Track | None
    tolerance: float
    unresolved: Unresolved
    others: list[tuple[str, str, str]]
    points: int | None = None


def in_force(subject: Path | Report | Track | None, given: Mapping[str, Any]) -> Settings:
    """A value that is given, else the configuration's, else the default; nothing is measured.

    Args:
        subject: None where only the rules are asked for.
        given: rules and settings by name; None is not given.

    Raises:
        UsageError: no rule is in force, a value is not allowed, or a rule compares and no baseline is named.
    """
    # The table of settings validates paths, so a document in memory is kept out of it.
    document = given.get("baseline") if isinstance(given.get("baseline"), (Report, Track)) else None
    flags = _table({name: value for name, value in given.items() if value is not None and value is not document})
    place = subject if isinstance(subject, Path) else Path()
    table, file = find_gate(place)

    def of(field: str, default: Any = None) -> tuple[Any, str]:
        """A setting's value and where it is from."""
        if (value := getattr(flags, field)) is not None:
            return value, f"--{field.replace('_', '-')}"
        if (value := getattr(table, field)) is not None:
            return value, f"{file}"
        return default, "default"

    rules = []
    for known in known_rules():
        value, source = of(known.field)
        if value is not None and value is not False:
            rules.append(Rule(name=known.name, limit=None if value is True else float(value), source=source))
    if not rules:
        raise _no_rule(place, file)
    baseline = document or of("baseline")[0]
    scopes = {known.name: known.scope for known in known_rules()}
    compares = [rule.name for rule in rules if scopes[rule.name] == "comparison"]
    points = ALL if of("any")[0] else of("last")[0]
    if "max-surge" in compares and subject is not None and (points is not None or _is_track(subject)):
        compares.remove("max-surge")  # it has its own past to be compared with
    if compares and baseline is None:
        raise UsageError(f"{compares[0]} compares with a baseline, and none is named", hint="pass --baseline FILE")
    named = {"regression_tolerance": 1.0, "unresolved": "exit code 3", "baseline": "none", "any": False, "last": "newest"}
    others = [(name.replace("_", "-"), *of(name, default)) for name, default in named.items()]
    return Settings(
        rules,
        baseline,
        tolerance=of("regression_tolerance", 1.0)[0],
        unresolved=of("unresolved", "report")[0],
        others=[(name, f"{value:g}" if isinstance(value, float) else str(value), source) for name, value, source in others],
        points=points,
    )


def _no_rule(place: Path, file: Path | None) -> UsageError:
    if foreign := gate_not_counted(place):
        why = f"those of {foreign} do not count, as it is not in the working directory or above it"
    elif file is not None:
        why = f"none was passed, and [gate] of {file} has none"
    else:
        why = f"none was passed, and no curv.toml or pyproject.toml in {Path.cwd()} or above it has a [gate]"
    return UsageError(
        f"no rule is in force: {why}",
        hint="pass one, as --max-rho 1.0 (curv gate -h has all), or put it into [gate] of a curv.toml in the working "
        "directory",
    )


def is_document(path: Path) -> bool:
    """Whether a subject is a report or a track, and nothing is to be measured. Raises InputError where nothing is there."""
    return _schema(path) is not None


def _table(given: Mapping[str, Any]) -> GateTable:
    try:
        return GateTable.model_validate({name.replace("_", "-"): value for name, value in given.items()})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"--{first['loc'][0]}: {first['msg']}, not {first['input']}", hint="see curv gate --help"
        ) from error


def _opened(subject: Path | Report | Track) -> Path | Report | Track:
    """The document that a path is of; a checkpoint's path as it is."""
    schema = _schema(subject) if isinstance(subject, Path) else None
    if not isinstance(subject, Path) or schema is None:
        return subject
    return load_track(subject) if schema == TRACK else load_report(subject)


def _baseline(found: Path | Report | Track | None) -> Report | list[Report] | None:
    """What the baseline holds: a report, or the certified points of a track."""
    named = _name(found) if found is not None else ""
    if isinstance(found, Path):
        found = load_track(found) if _schema(found) == TRACK else load_report(found)
    if not isinstance(found, Track):
        return found
    if not (known := past(found.points, found.window)):
        raise InputError(f"{named} has no certified point to compare with", hint="give another --baseline")
    return known


def _is_track(subject: Path | Report | Track) -> bool:
    return isinstance(subject, Track) or (isinstance(subject, Path) and _schema(subject) == TRACK)


def _name(subject: Path | Report | Track) -> str:
    """A path as text that JSON and a terminal can hold, whatever bytes it is made of; of a document, what it is of."""
    if isinstance(subject, Path):
        return os.fsencode(subject).decode("utf-8", "replace")
    return subject.run if isinstance(subject, Track) else subject.checkpoint.path


def _schema(path: Path) -> str | None:
    """The schema of a document; None for checkpoints: directories, URLs, zip archives or pickles, not JSON."""
    if not path.is_file():
        if not path.exists() and not set(":*?[") & set(str(path)):  # no URL and no pattern: known without minutes of work
            raise InputError(f"{path} does not exist", hint="give a checkpoint, a run, a report or a track")
        return None
    try:
        with path.open("rb") as stream:
            is_json = stream.read(64).lstrip().startswith(b"{") or path.suffix == ".json"
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="give a checkpoint, a run or a report") from error
    return (schema_of(path) or "unknown") if is_json else None
