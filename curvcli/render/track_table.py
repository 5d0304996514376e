"""The terminal view of a track, and its CSV."""

from __future__ import annotations

import csv
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.documents import Report, Track
from curvcli.errors import plain
from curvcli.render.csv import cell
from curvcli.render.fit import fitting
from curvcli.render.frame import number
from curvcli.render.style import COLOURS
from curvcli.render.table import bar, finding_line
from curvcli.render.track_points import Row, certified, newest, part_names, rows

RATIO = "lr/critical"
# The table's columns, and the order in which a narrow terminal loses them.
TITLES = ("step", "rho", "surge", "lambda", RATIO, "lr", "loss", "verdict", "source")
LEAST_NEEDED = ("source", "lr", "lambda", RATIO)
SOURCES = {"measured": "", "cached": "dim", "failed": "red"}
# A bar as long as this says "far past the edge", and leaves the others readable.
LONGEST = 4.0


def show(track: Track, console: Console) -> None:
    """Print where the run stands, a line per checkpoint, findings and cost; readable at 60 columns."""
    found = rows(track)
    findings = [Text(""), *map(finding_line, track.findings)] if track.findings else []
    console.print(_head(track), _table(found, console), *_notes(found, track), *findings, _foot(track), sep="\n")


def to_csv(track: Track) -> str:
    """One row per checkpoint, RFC 4180, numbers at full precision; empty where there is no value.

    Columns "lambda NAME" are embedding and head's and the layers'; one that has not converged is empty.
    """
    parts = part_names(track)
    text = StringIO()
    columns = [*_record(rows(track)[0]), *(f"lambda {name}" for name in parts)]
    writer = csv.DictWriter(text, columns, lineterminator="\r\n")
    writer.writerow({column: cell(column) for column in columns})
    for row in rows(track):
        writer.writerow({key: cell(value) for key, value in {**_record(row), **_lambdas(row.report)}.items()})
    return text.getvalue()


def _record(row: Row) -> dict[str, object]:
    point, report = row.point, row.report
    return {
        "checkpoint": point.checkpoint,
        "step": point.step,
        "source": point.source,
        "verdict": report.verdict if report else None,
        "status": report.full.status if report else None,
        "rho": row.rho,
        "rho_low": row.low,
        "rho_high": row.high,
        "lambda": row.eigenvalue,
        "residual": report.full.residual if report else None,
        "threshold": row.threshold,
        "update_ratio": row.ratio,
        "critical_lr": report.update.critical_lr if report else None,
        "lr": row.lr,
        "training_loss": point.training_loss,
        "shard_loss": report.data.loss if report else None,
        "tokens": report.data.tokens if report else None,
        "surge": point.surge,
        "surged": str(point.surged).lower(),
        "message": point.message,
    }


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
    text.append(f" {report.verdict.upper()} ", style=f"bold reverse {COLOURS[report.verdict]}")
    value = f"rho {number(report.full.rho, 3)}" if report.full.rho is not None else "no rho"
    text.append(f"  {value}", style="bold")
    text.append(f"  at {plain(last.checkpoint) if last.step is None else f'step {last.step:,}'}", style="not bold")
    if report.full.status != "converged":
        text.append(f"  {report.full.status}: not to be relied on", style="not bold yellow")
    if last is not track.points[-1]:
        text.append("\n the newest checkpoint could not be measured: see below", style="not bold yellow")
    return text.append("\n")


def _table(found: list[Row], console: Console) -> Table:
    cells = [_cells(row) for row in found]
    if not any(row.point.surge is not None for row in found):
        cells = [{title: cell for title, cell in row.items() if title != "surge"} for row in cells]
    titles = fitting(cells, console.width, TITLES, LEAST_NEEDED)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1), collapse_padding=True)
    for title in titles:
        table.add_column(title, justify="left" if title in ("verdict", "source") else "right", no_wrap=True)
    used = sum(1 + max(len(title), *(len(row[title]) for row in cells)) for title in titles)
    width = min(40, console.width - used - 1)
    values = [row.rho for row in found if row.rho is not None]
    bars = width >= 8 and bool(values)
    if bars:
        table.add_column("", no_wrap=True)
    limit = max(1.0, min(LONGEST, max(values, default=1.0)))
    for row, texts in zip(found, cells, strict=True):
        line = [Text(texts[title], style=_style(title, row)) for title in titles]
        table.add_row(*line, *([_bar(row, limit, width, console)] if bars else []))
    return table


def _bar(row: Row, limit: float, width: int, console: Console) -> Text:
    if row.rho is None:
        return Text("")
    if not row.certified:
        return Text("?", style="yellow")
    drawn = bar(row.rho, limit, width, 1.0, console)
    return drawn[:-1] + Text(">", style="bold red") if row.rho > limit else drawn


def _cells(row: Row) -> dict[str, str]:
    point = row.point
    return {
        "step": "-" if point.step is None else f"{point.step:,}",
        "rho": number(row.rho, 3) + ("?" if row.rho is not None and not row.certified else ""),
        "surge": "-" if point.surge is None else f"{number(point.surge, 2)}{' !' if point.surged else ''}",
        "lambda": number(row.eigenvalue) + ("?" if row.eigenvalue is not None and not row.certified else ""),
        RATIO: number(row.ratio, 3),
        "lr": number(row.lr, 3),
        "loss": number(point.training_loss),
        "verdict": row.verdict,
        "source": point.source,
    }


def _style(title: str, row: Row) -> str:
    if title == "surge":
        return "bold red" if row.point.surged else ""
    if title == "source":
        return SOURCES[row.point.source]
    if title in ("rho", "verdict"):
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
    return Text(f"\n{track.hvps:,} Hessian-vector products, {track.seconds:.1f} s", style="dim")
