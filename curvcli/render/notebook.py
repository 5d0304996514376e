"""Documents as Python and notebooks show them: a line, the top of a page, a picture, a data frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from curvcli.documents import Comparison, Gate, Log, Record, Report, Schedule, Track, TrackComparison, write_whole
from curvcli.documents.columns import POINTS, shown
from curvcli.errors import UnsupportedError, UsageError, counted, plain
from curvcli.judge.level import alert_of
from curvcli.judge.verdict import standing, verdict_of
from curvcli.render.cells import records
from curvcli.render.compare_plot import picture as comparison_picture
from curvcli.render.compare_tracks import ranking, record
from curvcli.render.compare_tracks_plot import picture as runs_picture
from curvcli.render.frame import number
from curvcli.render.gate_plot import picture as gate_picture
from curvcli.render.headline import verdict_line
from curvcli.render.html import top
from curvcli.render.picture import FORMATS, Picture
from curvcli.render.plot import picture as report_picture
from curvcli.render.plot_log import picture as log_picture
from curvcli.render.schedule_plot import picture as schedule_picture
from curvcli.render.style import said
from curvcli.render.track_plot import steps
from curvcli.render.track_points import newest, rows, run_verdict

Seen: TypeAlias = "Report | Track | Gate | Schedule | Comparison | TrackComparison | Log"


def line(document: Seen) -> str:
    """What a document is of and what it says."""
    match document:
        case Report():
            step = f", step {document.checkpoint.step:,}" if document.checkpoint.step is not None else ""
            text = f"Report of {document.checkpoint.path}{step}: {verdict_line(document)}"
        case Track():
            run, last = run_verdict(document), newest(document)
            says = f"run {run.name}" if run else "no verdict on the run"
            now = f"; newest: {verdict_line(last.report)}" if last and last.report else "; nothing measured"
            text = f"Track of {document.run}, {counted(len(document.points), 'checkpoint')}: {says}{now}"
        case Gate():
            text = f"Gate on {document.subject.path}: {document.outcome}, {counted(len(document.outcomes), 'rule')}"
        case Schedule():
            unlocks = counted(len(document.phases) - 1, "unlock")
            text = f"Schedule: {document.mode}, {counted(document.depth, 'block')}, {unlocks}"
        case Comparison():
            both = f"{document.first.verdict} and {document.second.verdict}"
            text = f"Comparison of {document.first.path} with {document.second.path}: {both}"
        case Log():
            stands = standing(document.records) if document.records else None
            says = f"step {stands.step:,}, {_of(stands)}" if stands else "no record yet"
            text = f"Log {document.path}, {counted(len(document.records), 'record')}: {says}"
        case TrackComparison():
            text = f"TrackComparison of {document.first.path} with {document.second.path}: {ranking(document)}"
    return plain(f"<{text}>")


def _of(record: Record) -> str:
    """A record's verdict and number."""
    value = "no rho" if record.rho is None else f"rho {number(record.rho, 3)}"
    value = f"Z {number(record.z, 3)}" if record.rho is None and record.z is not None else value
    return f"{said(verdict_of(record))}, {value}"


def _values(record: Record) -> dict[str, Any]:
    """A record's fields, with the verdict and the level that follow from them."""
    own = record.model_dump(exclude={"schema_", "stable_lr"})
    stable = record.stable_lr
    rates = {f"stable_lr{end}": stable and getattr(stable, end.strip("_") or "value") for end in ("", "_low", "_high")}
    return {**own, **rates, "verdict": verdict_of(record), "level": alert_of(record).level}


def html(document: Seen) -> str:
    """The top of a document's page as a fragment of HTML: every value escaped, no script, nothing loaded."""
    return top(document)


def picture(document: Seen, path: Path | str | None = None) -> Picture:
    """The picture of a document, written to `path` where one is given. Raises UsageError and InputError."""
    match document:
        case Report():
            drawn = report_picture(document)
        case Track():
            drawn = steps(document)
        case Gate():
            drawn = gate_picture(document)
        case Schedule():
            drawn = schedule_picture(document)
        case Comparison():
            drawn = comparison_picture(document)
        case TrackComparison():
            drawn = runs_picture(document)
        case Log():
            drawn = log_picture(document)
    if path is not None:
        suffix = Path(path).suffix[1:].lower()
        if suffix not in FORMATS:
            raise UsageError(f"cannot draw to {path}", hint="end the name in .png, .svg or .pdf")
        write_whole(Path(path), drawn.save(suffix))
    return drawn


def frame(document: Seen) -> Any:
    """A pandas.DataFrame. Raises UnsupportedError where pandas is not installed."""
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise UnsupportedError(
            "a data frame needs pandas, which is not installed", hint="pip install 'curvcli[notebook]'"
        ) from error
    match document:
        case Report():
            found: list[dict[str, Any]] = list(records(document))
        case Track():
            columns = shown(POINTS, "csv")
            found = [{c.key: c.get(row.measured) for c in columns} for row in rows(document)]
        case Gate():
            found = [outcome.model_dump() for outcome in document.outcomes]
        case Schedule():
            found = [phase.model_dump() for phase in document.phases]
        case Comparison():
            found = [change.model_dump() for change in document.changes]
        case TrackComparison():
            found = [record(step) for step in document.steps]
        case Log():
            found = [_values(record) for record in document.records]
    return DataFrame(found)
