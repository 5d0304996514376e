"""The terminal view of a report."""

from __future__ import annotations

from itertools import zip_longest

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.documents import Estimate, Finding, Report
from curvcli.documents.columns import PARTS, Column, Part, parts, shown
from curvcli.errors import plain
from curvcli.judge.limits import certified, classify
from curvcli.render.cells import present, summary, written
from curvcli.render.frame import number
from curvcli.render.style import COLOURS


def show(report: Report, console: Console) -> None:
    """Print verdict, layers, depths, findings and cost; readable at 60 columns."""
    findings = map(finding_line, report.findings)
    console.print(_head(report), _layers(report, console), *_depths(report), Text(""), *findings, _foot(report), sep="\n")


def _head(report: Report) -> Text:
    checkpoint, optimizer = report.checkpoint, report.optimizer
    colour = COLOURS[report.verdict]
    text = Text()
    text.append(plain(checkpoint.path), style="bold")
    step = f"step {checkpoint.step:,}, " if checkpoint.step is not None else ""
    text.append(
        f"\n{step}{checkpoint.parameters:,} parameters, {report.data.tokens:,} tokens, loss {report.data.loss:.3f}\n"
    )
    lr = f"lr {number(optimizer.lr)}" if optimizer.lr is not None else "no lr"
    state = {"checkpoint": "", "estimated": ", preconditioner estimated", "none": ", no preconditioner"}
    text.append(f"{optimizer.name}, {lr}{state[optimizer.preconditioner]}\n\n")
    text.append(f" {report.verdict.upper()} ", style=f"bold reverse {colour}")
    if report.judged.rho is not None:
        text.append(f"  rho {number(report.judged.rho, 3)}", style="bold")
        text.append(f"  (lambda {number(report.judged.eigenvalue)}, threshold {number(optimizer.threshold)})")
    elif report.judged.eigenvalue is not None:
        text.append(f"  lambda {number(report.judged.eigenvalue)}, no threshold without a learning rate")
    else:
        text.append(f"  no estimate: {report.judged.status}")
    low, high = report.generalisation.rho_low, report.generalisation.rho_high
    if report.generalisation.held_out is not None and low is not None and high is not None:
        odds = f"{report.generalisation.confidence:.0%} " if report.generalisation.confidence else ""
        text.append(f"\n on the data behind the shard {odds}expect rho between {number(low, 3)} and {number(high, 3)}")
    if report.update.ratio is not None:
        text.append(
            f"\n next update: lr is {number(report.update.ratio, 3)} of its critical {number(report.update.critical_lr, 3)}"
        )
    for label, value in summary(report):
        text.append(f"\n {label} {plain(value)}")
    text.append("\n")
    return text


def _layers(report: Report, console: Console) -> Table:
    found = [part for part in parts(report) if part.kind in ("ends", "layer")]
    found += [part for part in parts(report) if part.kind in ("body", "full")]
    columns = present(shown(PARTS, "table"), found)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for column in columns:
        if column.key == "name":
            table.add_column("layer", overflow="fold")
        else:
            table.add_column(column.label, justify="left" if column.kind == "word" else "right", no_wrap=True)
    table.add_column("", no_wrap=True)
    use_rho = report.judged.rho is not None
    values = [_size(part.estimate, use_rho) for part in found]
    # The bar's end is the threshold unless something is past it: then the tick at 1 shows how far.
    limit = max([*(v for v in values if v is not None), 1.0 if use_rho else 0.0]) or 1.0
    # Names, parameters, lambda and rho take about 52 columns; what else there is takes its own.
    further = sum(2 + max(len(c.label), *(len(written(c, part)) for part in found)) for c in columns if c.leaves is not None)
    width = max(8, min(40, console.width - 52 - further))
    for part, value in zip(found, values, strict=True):
        cells = [_cell(column, part) for column in columns]
        table.add_row(*cells, bar(value, limit, width, 1.0 if use_rho else None, console))
    return table


def _cell(column: Column[Part], part: Part) -> Text:
    if column.key == "name":
        return Text(plain(part.name), style="bold" if part.kind == "full" else "")
    if column.key == "rho" and not certified(part.estimate):
        return Text(part.estimate.status, style="yellow")
    return Text(plain(written(column, part)))


def bar(value: float | None, limit: float, width: int, edge: float | None, console: Console) -> Text:
    """A bar of `width` cells that is full at `limit`, with a tick at the edge; ASCII where the terminal knows no more."""
    solid, tick = ("█", "│") if (console.encoding or "").lower().startswith("utf") else ("#", "|")
    cells = min(width, round(max(0.0, value or 0.0) / limit * width))
    colour = COLOURS["measured"] if edge is None or value is None else COLOURS[classify(value)]
    drawn = Text(solid * cells, style=colour) + Text(" " * (width - cells))
    if edge is not None and edge <= limit:
        at = min(width, round(edge / limit * width))
        drawn = drawn[:at] + Text(tick, style="dim") + drawn[at:]
    return drawn


def _size(estimate: Estimate, use_rho: bool) -> float | None:
    return estimate.rho if use_rho else estimate.eigenvalue


def _depths(report: Report) -> list[Text | Table]:
    if not report.cumulative.restricted:
        return []
    curves = [[part for part in parts(report) if part.kind == kind] for kind in ("restricted", "truncated")]
    columns = [c for c in present(shown(PARTS, "table"), [*curves[0], *curves[1]]) if c.key not in ("name", "parameters")]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("depth", justify="right")
    for kind in ("restricted", "truncated"):
        for place, column in enumerate(columns):
            table.add_column(column.label if place else f"{kind} {column.label}", justify="right", no_wrap=True)
    for pair in zip_longest(*curves):
        cells = [_cell(column, part).plain if part else "" for part in pair for column in columns]
        table.add_row(str(pair[0].index), *cells)
    return [Text("\ncumulative over depth: the intact network restricted, and cut short", style="dim"), table]


def finding_line(finding: Finding) -> Text:
    """A finding's code in the colour of its severity, and what it says in the terminal's own."""
    return Text.assemble((f"{plain(finding.code)}: ", COLOURS[finding.severity]), plain(finding.message))


def _foot(report: Report) -> Text:
    cost = report.cost
    return Text(
        f"\n{cost.hvps} Hessian-vector products ({cost.mode}), {cost.seconds:.1f} s, "
        f"{cost.peak_memory_bytes / 2**30:.1f} GiB, {cost.device}",
        style="dim",
    )
