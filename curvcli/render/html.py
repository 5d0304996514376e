"""One self-contained HTML page a document: nothing is loaded, every value is escaped, no script but our own runs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from curvcli.documents import (
    Comparison,
    Document,
    Explanation,
    Gate,
    Log,
    Record,
    Report,
    Schedule,
    Track,
    TrackComparison,
    find_log,
    load_comparison,
    load_explanation,
    load_gate,
    load_records,
    load_report,
    load_schedule,
    load_track,
    load_track_comparison,
    schema_of,
)
from curvcli.documents.columns import PARTS, POINTS, Column, Part, parts, shown
from curvcli.errors import InputError, counted, plain
from curvcli.judge.level import alert_of
from curvcli.judge.verdict import standing, verdict_of
from curvcli.render.advice import advice, track_advice
from curvcli.render.beside import companions_line, cost_line, idle_line, level_line
from curvcli.render.cells import Cell, part_cells, point_cells, present, record_cells, record_columns, summary
from curvcli.render.compare_plot import growth
from curvcli.render.compare_plot import picture as comparison_picture
from curvcli.render.compare_tracks import FURTHER, LETTERS, facts, ranking, shown_pairs
from curvcli.render.compare_tracks_plot import picture as runs_picture
from curvcli.render.explain import LEAST, WHAT, sections, visible
from curvcli.render.frame import number
from curvcli.render.gate_plot import picture as gate_picture
from curvcli.render.gate_plot import ratios
from curvcli.render.largest_lr import record_lines, told
from curvcli.render.picture import NARROW, WIDE, Picture
from curvcli.render.plot import picture
from curvcli.render.plot_log import picture as log_picture
from curvcli.render.schedule_plot import picture as schedule_picture
from curvcli.render.schedule_table import ORDERS, ranges
from curvcli.render.series import heat, report_series
from curvcli.render.style import GATE_LIKE, RUN_LIKE, said, variables
from curvcli.render.table_csv import of_table
from curvcli.render.track_plot import heat_map, steps
from curvcli.render.track_points import axis, newest, rows, run_verdict

# Layouts: a page, and the top of one in somebody else's page, which shows no chart.
WHOLE, TOP = "base.html", "fragment.html"
MOST_RECORDS, MOST_RAISED = 500, 10  # of a log: in its table, and of those at WARN or ERROR in its list


def page(path: Path) -> str:
    """The page of a document or of a job's log. Raises InputError where the file is none that has a page."""
    if (path.is_dir() or path.suffix == ".jsonl") and (log := find_log(path)) is not None:
        found = load_records(log)
        if not found.records:
            raise InputError(f"{log} has no record yet", hint="a page is made once the tracker has written one")
        return log_page(found)
    if path.is_dir():
        raise InputError(
            f"{path} is a directory, and a page is made of a document",
            hint="measure it first: curv analyze (a checkpoint) or curv track (a run) with -o report.json, then curv report "
            "report.json",
        )
    name = schema_of(path)
    if name not in PAGES:
        raise InputError(f"{path} has the schema {name!r:.80}, which has no page", hint=f"one of: {', '.join(PAGES)}")
    load, render = PAGES[name]
    return render(load(path))


def top(document: Report | Track | Gate | Schedule | Comparison | TrackComparison | Log) -> str:
    """The top of a document's page, verdict and findings, as a fragment of HTML with its own style and no script."""
    match document:
        case Report():
            text = report_page(document, layout=TOP)
        case Track():
            text = track_page(document, layout=TOP)
        case Schedule():
            text = schedule_page(document, layout=TOP)
        case Gate():
            text = gate_page(document, layout=TOP)
        case Comparison():
            text = comparison_page(document, layout=TOP)
        case TrackComparison():
            text = track_comparison_page(document, layout=TOP)
        case Log():
            text = log_page(document, layout=TOP)
    return text


def report_page(report: Report, layout: str = WHOLE) -> str:
    """Verdict, findings, next steps, curves over depth, where the sharpest direction lives, numbers, provenance."""
    chart = None
    if layout == WHOLE and any(ys for _, ys in report_series(report).values()):
        says = "lambda over depth on a logarithmic axis; the same numbers are in the table below"
        chart = _charts("depths", says, lambda width: picture(report, width=width))
    return _render(
        "report.html",
        document=report,
        layout=layout,
        report=report,
        steps=advice(report),
        chart=chart,
        estimates=estimates(report),
        facts=summary(report),
    )


@dataclass(frozen=True)
class Table:
    """A table of estimates: its columns, and a line for each part."""

    columns: Sequence[Column[Part]]
    lines: Sequence[Sequence[Cell]]


def estimates(report: Report, *, curves: bool = True) -> Table:
    """The table of estimates, with or without those over depth; without columns that no part has a value for."""
    wanted = ("full", "ends", "layer", *(("restricted", "truncated") if curves else ()))
    found = [part for part in parts(report) if part.kind in wanted]
    columns = present(shown(PARTS, "page"), found)
    return Table(columns, [part_cells(part, columns) for part in found])


def schedule_page(schedule: Schedule, layout: str = WHOLE) -> str:
    """When which block joins, findings, provenance."""
    says = "blocks that train, learning rate and predicted rho over steps; the phases are in the table above"
    chart = None
    if layout == WHOLE:
        chart = _charts("plan", says, lambda width: schedule_picture(schedule, width=width))
    return _render(
        "schedule.html", document=schedule, layout=layout, schedule=schedule, chart=chart, orders=ORDERS
    )  # fmt: skip


def gate_page(gate: Gate, layout: str = WHOLE) -> str:
    """What was decided, each rule with its number, bracket and limit, and what judged."""
    says = "each rule's number with its bracket over its limit, on a logarithmic axis; the table above has the numbers"
    chart = None
    if layout == WHOLE and any(value is not None for outcome in gate.outcomes for value in ratios(outcome)):
        chart = _charts("rules", says, lambda width: gate_picture(gate, width=width))
    return _render("gate.html", document=gate, layout=layout, gate=gate, gate_like=GATE_LIKE, chart=chart)


def comparison_page(found: Comparison, layout: str = WHOLE) -> str:
    """Both checkpoints, findings, and how many times each part's lambda and rho have grown."""
    says = "rho and lambda of the second over those of the first, a line a part; the table below has the numbers"
    chart = None
    if layout == WHOLE and any(growth(change) for change in found.changes):
        chart = _charts("changes", says, lambda width: comparison_picture(found, width=width))
    norm = any(value is not None for c in found.changes for value in (c.first_z, c.second_z))
    return _render("compare.html", document=found, layout=layout, compared=found, chart=chart, norm=norm)


def track_comparison_page(found: TrackComparison, layout: str = WHOLE) -> str:
    """Which run is further below its edge, both over steps, and their numbers side by side."""
    says = "rho, lambda, learning rate and loss of both runs over steps; the numbers are in the table of steps"
    chart = None
    if layout == WHOLE and found.steps:
        chart = _charts("runs", says, lambda width: runs_picture(found, width=width))
    return _render(
        "compare_tracks.html",
        document=found,
        layout=layout,
        compared=found,
        chart=chart,
        sides=list(zip(LETTERS, (found.first, found.second), strict=True)),
        letters=LETTERS,
        ranking=ranking(found),
        facts=facts,
        pairs=shown_pairs(found),
        further=FURTHER,
        run_like=RUN_LIKE,
    )


def track_page(track: Track, layout: str = WHOLE) -> str:
    """Verdict of the newest checkpoint, findings, next steps, curves over steps, rho by layer, numbers, provenance."""
    last, found, cells = newest(track), rows(track), heat(track)
    columns = present(shown(POINTS, "page"), [row.measured for row in found])
    over = f"rho, lambda, learning rate and loss over {axis(track)}s; the numbers are in the table of checkpoints"
    rho_says = "rho of embedding and head, and of each layer alone, a column per checkpoint"
    return _render(
        "track.html",
        document=track,
        layout=layout,
        track=track,
        newest=last,
        run=run_verdict(track),
        run_like=RUN_LIKE,
        newest_label=next((row.label for row in found if row.point is last), ""),
        steps=track_advice(track),
        axis=axis(track),
        curves=_charts("steps", over, lambda width: steps(track, width=width)) if last and layout == WHOLE else None,
        heat=_charts("heat", rho_says, lambda width: heat_map(cells, width=width)) if cells and layout == WHOLE else None,
        rows=found,
        point_columns=columns,
        cells=[point_cells(row, columns) for row in found],
        estimates=estimates(last.report, curves=False) if last and last.report else None,
    )


def explanation_page(found: Explanation, layout: str = WHOLE) -> str:
    """What is explained, findings, what is left without the heaviest data, where the direction lies, which data carry it."""
    return _render(
        "explain.html", document=found, layout=layout, found=found, what=WHAT[found.direction], sections=sections(found)
    )


def log_page(log: Log, layout: str = WHOLE) -> str:
    """Where a job stands, what its records warn of, everything in them over steps, and the newest of them."""
    last = log.records[-1] if log.records else None
    stands = standing(log.records) if log.records else None
    shown = log.records[-MOST_RECORDS:]
    columns = record_columns(shown)
    says = "rho, lambda, learning rate, loss and what else the records have over steps; the numbers are in the table below"
    chart = None
    if layout == WHOLE and last:
        chart = _charts("log", says, lambda width: log_picture(log, width=width))
    severity = {"ERROR": "error", "WARN": "warning"}
    levels = [(alert_of(record).level, record) for record in log.records]
    raised = [(severity[level], f"step {r.step:,}", level_line(r)) for level, r in levels if level in severity]
    lines = []
    if last and stands:
        beside = (idle_line(last, stands), companions_line(stands), cost_line(last))
        lines = [*record_lines(stands), *filter(None, beside)]
    return _render(
        "log.html",
        document=log,
        layout=layout,
        log=log,
        last=last,
        stands=stands,
        verdict=verdict_of(stands) if stands else "unresolved",
        lines=lines,
        raised=raised[-MOST_RAISED:],
        more=max(0, len(raised) - MOST_RAISED),
        chart=chart,
        columns=columns,
        cells=[record_cells(record, columns) for record in reversed(shown)] if layout == WHOLE else [],
        hidden=len(log.records) - len(shown),
    )


# A document's page: how it is read, how it is drawn. A further document is a further line.
PAGES: dict[str, tuple[Callable[[Path], Any], Callable[[Any], str]]] = {
    "curv.compare/1": (load_comparison, comparison_page),
    "curv.explain/1": (load_explanation, explanation_page),
    "curv.compare-tracks/1": (load_track_comparison, track_comparison_page),
    "curv.gate/1": (load_gate, gate_page),
    "curv.report/1": (load_report, report_page),
    "curv.schedule/1": (load_schedule, schedule_page),
    "curv.track/1": (load_track, track_page),
}


def _charts(name: str, says: str, draw: Callable[[float], Picture]) -> Markup:
    """A picture twice, for wide pages and for narrow ones: the style shows one of them, at a size that can be read."""
    wide, narrow = draw(WIDE).embed(name, says), draw(NARROW).embed(f"{name}-narrow", says)
    return Markup('<div class="on-wide">{}</div><div class="on-narrow">{}</div>').format(wide, narrow)


def _render(template: str, *, document: Document | Log, layout: str, **values: object) -> str:
    environment = Environment(
        loader=PackageLoader("curvcli.render"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, said=said, told=told, ranges=ranges, visible=visible, counted=counted)
    environment.globals.update(least=LEAST, whole=layout == WHOLE)
    environment.filters["as_csv"] = lambda table: escape(of_table(table))  # nothing of it is taken away: it is lines
    environment.filters["bytes"] = lambda count: f"{count / 2**30:.1f} GiB"
    style, script = variables() + _asset("style.css"), _asset("sort.js")
    # Not 'unsafe-inline': the browser runs and applies these two texts and no other, whatever got into the page.
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template).render(
        layout=layout,
        policy=policy,
        style=Markup(style),  # noqa: S704  (a file of this package)
        script=Markup(script),  # noqa: S704  (a file of this package)
        fragment_style=Markup(_fragment_style()),  # noqa: S704  (the same)
        schema=getattr(document, "schema_", Record.model_fields["schema_"].default),
        **values,
    )


def _fragment_style() -> str:
    """The style of what stands in somebody else's page: nothing outside of it is touched."""
    marks = "".join(
        f".curv .{name} {{ border-color: var(--{name}); }} .curv .{name} strong {{ color: var(--{name}); }}\n"
        for name in ("stable", "edge", "hot", "unstable", "early", "unresolved")
    )
    return variables().replace(":root", ".curv") + _asset("fragment.css") + marks


def _plain(value: object) -> object:
    """Text without what turns it around or cannot be in a page; our own markup as it is."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return files("curvcli.render").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()
