"""The terminal view of a track, and its CSV."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.documents import Report, Track
from curvcli.documents.columns import POINTS, Column, Measurement, shown
from curvcli.errors import counted, plain
from curvcli.judge.limits import certified
from curvcli.judge.steepest import alone
from curvcli.render.cells import present, written
from curvcli.render.csv import write
from curvcli.render.fit import fitting
from curvcli.render.frame import number
from curvcli.render.largest_lr import told
from curvcli.render.style import COLOURS, RUN_LIKE, said
from curvcli.render.table import bar, finding_lines
from curvcli.render.track_points import Row, newest, part_names, rows, run_verdict

SOURCES = {"measured": "", "cached": "dim", "failed": "red"}
# A bar as long as this says "far past the edge", and leaves the others readable.
LONGEST = 4.0


def show(track: Track, console: Console, *, verbose: bool = True) -> None:
    """Print where the run stands, a line per checkpoint, what becomes of the run, findings and cost; readable at 60 columns.

    Args:
        verbose: print all findings, and not only the first five.
    """
    found = rows(track)
    order = {"error": 0, "warning": 1, "info": 2}
    # What the run's verdict says is not said again.
    listed = sorted((f for f in track.findings if not f.code.startswith("run-")), key=lambda f: order[f.severity])
    findings = [Text(""), *finding_lines(listed, verbose)] if listed else []
    console.print(
        _head(track), _table(found, console), *_notes(found, track), *_run(track), *findings, _foot(track), sep="\n"
    )


def to_csv(track: Track) -> str:
    """One row per checkpoint, RFC 4180, numbers at full precision; empty where there is no value.

    Columns "lambda NAME" are embedding and head's and the layers'; one that has not converged is empty.
    """
    found = rows(track)
    columns = shown(POINTS, "csv")
    keys = [*(column.key for column in columns), *(f"lambda {name}" for name in part_names(track))]
    return write(keys, ({**{c.key: c.get(row.measured) for c in columns}, **_lambdas(row.report)} for row in found))


def _lambdas(report: Report | None) -> dict[str, float | None]:
    if report is None:
        return {}
    return {f"lambda {part.name}": part.eigenvalue if certified(part) else None for part in report.parts}


def _head(track: Track) -> Text:
    text = Text(plain(track.run), style="bold")
    sources = [point.source for point in track.points]
    counts = [f"{sources.count(source)} {source}" for source in SOURCES if source in sources]
    noun = "checkpoint" if len(sources) == 1 else "checkpoints"
    text.append(f"\n{len(sources)} {noun}: {', '.join(counts)}\n\n", style="not bold")
    last = newest(track)
    if last is None or last.report is None:
        return text.append(" nothing could be measured\n", style="not bold red")
    report = last.report
    text.append(f" {said(report.verdict).upper()} ", style=f"bold reverse {COLOURS[report.verdict]}")
    value = f"rho {number(report.judged.rho, 3)}" if report.judged.rho is not None else "no rho"
    if report.steepest is not None and report.steepest.z is not None:
        z = f"Z {number(report.steepest.z, 3)}"
        value = z if alone(report) else f"{value}, {z}"
    text.append(f"  {value}", style="bold")
    text.append(f"  at {plain(last.checkpoint) if last.step is None else f'step {last.step:,}'}", style="not bold")
    if not certified(report.judged) and not alone(report):
        text.append(f"  {report.judged.status}: not to be relied on", style="not bold yellow")
    if last is not track.points[-1]:
        text.append("\n the newest checkpoint could not be measured: see below", style="not bold yellow")
    for line in told(report):
        text.append(f"\n {plain(line)}", style="not bold")
    return text.append("\n")


def _run(track: Track) -> list[Text]:
    """The verdict on the run, why, and what to do."""
    run = run_verdict(track)
    if run is None:
        return []
    style = COLOURS[RUN_LIKE[run.name]]
    said = Text(plain("; ".join(run.reasons)))
    head = Text.assemble("\n", (f" RUN {run.name.upper()} ", f"bold reverse {style}"), "  ", said)
    return [head, Text.assemble(("what to do: ", "bold"), plain(run.advice))]


def _columns(found: list[Row]) -> list[Column[Measurement]]:
    """Numbers first, then words."""
    columns = present(shown(POINTS, "table"), [row.measured for row in found])
    reports = [row.report for row in found if row.report is not None]
    if reports and all(alone(report) for report in reports):
        columns = [column for column in columns if column.key not in ("rho", "lambda")]
    return sorted(columns, key=lambda column: column.kind == "word")


def _table(found: list[Row], console: Console) -> Table:
    columns = _columns(found)
    cells = [{column.label: _cell(column, row) for column in columns} for row in found]
    leaving = sorted((c for c in columns if c.leaves is not None), key=lambda c: c.leaves or 0)
    titles = fitting(cells, console.width, [c.label for c in columns], [c.label for c in leaving])
    columns = [column for column in columns if column.label in titles]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1), collapse_padding=True)
    for column in columns:
        table.add_column(column.label, justify="left" if column.kind == "word" else "right", no_wrap=True)
    used = sum(1 + max(len(title), *(len(row[title]) for row in cells)) for title in titles)
    width = min(40, console.width - used - 1)
    values = [value for row in found if (value := _size(row)) is not None]
    bars = width >= 8 and bool(values)
    if bars:
        table.add_column("", no_wrap=True)
    limit = max(1.0, min(LONGEST, max(values, default=1.0)))
    for row, texts in zip(found, cells, strict=True):
        line = [Text(texts[column.label], style=_style(column.key, row)) for column in columns]
        table.add_row(*line, *([_bar(row, limit, width, console)] if bars else []))
    return table


def _bar(row: Row, limit: float, width: int, console: Console) -> Text:
    value = _size(row)
    if value is None:
        return Text("")
    if not row.certified and row.rho is not None:
        return Text("?", style="yellow")
    drawn = bar(value, limit, width, 1.0, console)
    return drawn[:-1] + Text(">", style="bold red") if value > limit else drawn


def _size(row: Row) -> float | None:
    """rho, or Z where no parameter has a rho."""
    return row.z if row.report is not None and alone(row.report) else row.rho


def _cell(column: Column[Measurement], row: Row) -> str:
    if column.key == "verdict":
        return row.verdict
    doubt = column.solved and not row.certified and column.get(row.measured) is not None
    return plain(written(column, row.measured)) + ("?" if doubt else column.after(row.measured))


def _style(key: str, row: Row) -> str:
    if key == "surge":
        return "bold red" if row.point.surged else ""
    if key == "source":
        return SOURCES[row.point.source]
    if key in ("rho", "verdict"):
        return COLOURS[row.verdict]
    return ""


def _notes(found: list[Row], track: Track) -> list[Text]:
    notes = []
    if any(row.point.surged for row in found):
        notes.append(f"! rho is more than {track.surge_limit:g} times the median of up to {track.window} checkpoints before")
    if any(row.report is not None and row.eigenvalue is not None and not row.certified for row in found):
        notes.append("? not converged, and not to be relied on")
    lines = [Text(note, style="dim") for note in notes]
    for row in found:
        if row.point.message:
            style = "red" if row.report is None else "yellow"
            lines.append(Text.assemble((f"{plain(row.label)}: ", style), plain(row.point.message)))
    return [Text(""), *lines] if lines else []


def _foot(track: Track) -> Text:
    return Text(f"\n{counted(track.hvps, 'Hessian-vector product')}, {track.seconds:.1f} s", style="dim")
