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
from markupsafe import Markup

from curvcli.documents import Document, Gate, Report, Schedule, Track, load_report, load_schedule, load_track, schema_of
from curvcli.documents.columns import PARTS, POINTS, Column, Part, parts, shown
from curvcli.errors import InputError, plain
from curvcli.render.advice import advice, track_advice
from curvcli.render.cells import Cell, part_cells, point_cells, present, summary
from curvcli.render.frame import number
from curvcli.render.largest_lr import told
from curvcli.render.plot import picture
from curvcli.render.series import heat, report_series
from curvcli.render.style import GATE_LIKE, RUN_LIKE, said, variables
from curvcli.render.track_plot import heat_map, steps
from curvcli.render.track_points import axis, newest, rows, run_verdict


def page(path: Path) -> str:
    """The page of a document. Raises InputError where the file is none that has a page."""
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


def top(document: Report | Track | Gate | Schedule) -> str:
    """The top of a document's page, verdict and findings, as a fragment of HTML with its own style and no script."""
    match document:
        case Report():
            text = report_page(document, layout="fragment.html")
        case Track():
            text = track_page(document, layout="fragment.html")
        case Schedule():
            text = schedule_page(document, layout="fragment.html")
        case Gate():
            text = _render("gate_top.html", document=document, layout="fragment.html", gate=document, gate_like=GATE_LIKE)
    return text


def report_page(report: Report, layout: str = "base.html") -> str:
    """Verdict, findings, next steps, curves over depth, where the sharpest direction lives, numbers, provenance."""
    chart = None
    if any(ys for _, ys in report_series(report).values()):
        says = "lambda over depth on a logarithmic axis; the same numbers are in the table below"
        chart = picture(report).embed("depths", says)
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


def schedule_page(schedule: Schedule, layout: str = "base.html") -> str:
    """When which block joins, findings, provenance."""
    return _render("schedule.html", document=schedule, layout=layout, schedule=schedule)


def track_page(track: Track, layout: str = "base.html") -> str:
    """Verdict of the newest checkpoint, findings, next steps, curves over steps, rho by layer, numbers, provenance."""
    last, found, cells = newest(track), rows(track), heat(track)
    columns = present(shown(POINTS, "page"), [row.measured for row in found])
    says = f"rho, lambda, learning rate and loss over {axis(track)}s; the numbers are in the table of checkpoints"
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
        curves=steps(track).embed("steps", says) if last else None,
        heat=heat_map(cells).embed("heat", rho_says) if cells else None,
        rows=found,
        point_columns=columns,
        cells=[point_cells(row, columns) for row in found],
        estimates=estimates(last.report, curves=False) if last and last.report else None,
    )


# A document's page: how it is read, how it is drawn. A further document is a further line.
PAGES: dict[str, tuple[Callable[[Path], Any], Callable[[Any], str]]] = {
    "curv.report/1": (load_report, report_page),
    "curv.schedule/1": (load_schedule, schedule_page),
    "curv.track/1": (load_track, track_page),
}


def _render(template: str, *, document: Document, **values: object) -> str:
    environment = Environment(
        loader=PackageLoader("curvcli.render"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, said=said, told=told)
    environment.filters["bytes"] = lambda count: f"{count / 2**30:.1f} GiB"
    style, script = variables() + _asset("style.css"), _asset("sort.js")
    # Not 'unsafe-inline': the browser runs and applies these two texts and no other, whatever got into the page.
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template).render(
        policy=policy,
        style=Markup(style),  # noqa: S704  (a file of this package)
        script=Markup(script),  # noqa: S704  (a file of this package)
        fragment_style=Markup(_fragment_style()),  # noqa: S704  (the same)
        schema=document.model_dump(by_alias=True)["schema"],
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
