"""The terminal view of a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.documents import Estimate, Finding, Report
from curvcli.documents.columns import PARTS, Column, Part, parts, shown
from curvcli.errors import counted, plain
from curvcli.judge.limits import certified, classify
from curvcli.judge.steepest import alone
from curvcli.render import headline
from curvcli.render.cells import present, written
from curvcli.render.style import COLOURS

FIRST = 5  # findings that a terminal gets unasked
LONGEST = 24  # cells of a name that the bar leaves room for; longer ones are folded


def show(report: Report, console: Console, *, begun: Text | None = None, verbose: bool = True) -> None:
    """Print verdict, layers, depths, findings and cost; readable at 60 columns.

    Args:
        begun: the head that was printed before the rest was known. Printed again only where it is another now.
        verbose: print all findings, and not only the first five.
    """
    findings = finding_lines(report.findings, verbose)
    head = headline.head(report)
    if begun is None:
        console.print(head)
    elif head != begun:
        console.print(Text("layers and depths changed what stands above, which is now:\n", style="bold"), head, sep="\n")
    console.print(_layers(report, console), *_depths(report), Text(""), *findings, _foot(report), sep="\n")


def _layers(report: Report, console: Console) -> Table:
    found = [part for part in parts(report) if part.kind in ("ends", "layer")]
    found += [part for part in parts(report) if part.kind in ("body", "full")]
    columns = _shown(report, found)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for column in columns:
        if column.key == "name":
            table.add_column("layer", overflow="fold")
        else:
            table.add_column(column.label, justify="left" if column.kind == "word" else "right", no_wrap=True)
    table.add_column("", no_wrap=True)
    use_rho = report.judged.rho is not None or alone(report)
    values = [_size(part.estimate, use_rho) if not alone(report) else _z(part.estimate) for part in found]
    # The bar's end is the threshold unless something is past it: then the tick at 1 shows how far.
    limit = max([*(v for v in values if v is not None), 1.0 if use_rho else 0.0]) or 1.0
    # Names, parameters, lambda and rho take about 52 columns; what else there is takes its own.
    further = sum(2 + max(len(c.label), *(len(written(c, part)) for part in found)) for c in columns if c.leaves is not None)
    # Where a status stands in place of rho they take more, and the bar gives way before a name is folded.
    taken = sum(2 + max(len(c.label), *(len(_cell(c, part)) for part in found)) for c in columns if c.key != "name")
    names = min(LONGEST, max(len(_cell(c, part)) for c in columns if c.key == "name" for part in found))
    width = max(8, min(40, console.width - 52 - further, console.width - names - taken - 3))  # two cells apart, and the tick
    for part, value in zip(found, values, strict=True):
        cells = [_cell(column, part) for column in columns]
        table.add_row(*cells, bar(value, limit, width, 1.0 if use_rho else None, console))
    return table


def _shown(report: Report, found: list[Part]) -> list[Column[Part]]:
    """The table's columns; without lambda and rho where no parameter has one, and Z is what there is."""
    return [c for c in present(shown(PARTS, "table"), found) if not alone(report) or c.key not in ("eigenvalue", "rho")]


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


def _z(estimate: Estimate) -> float | None:
    return estimate.steepest.z if estimate.steepest else None


def _size(estimate: Estimate, use_rho: bool) -> float | None:
    return estimate.rho if use_rho else estimate.eigenvalue


def _depths(report: Report) -> list[Text | Table]:
    if not report.cumulative.restricted:
        return []
    curves = {kind: [part for part in parts(report) if part.kind == kind] for kind in ("restricted", "truncated")}
    curves = {kind: curve for kind, curve in curves.items() if curve}
    # Each with the columns that it has values for: networks cut short have no Z.
    columns = {
        kind: [c for c in _shown(report, curve) if c.key not in ("name", "parameters")] for kind, curve in curves.items()
    }
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("depth", justify="right")
    for kind in curves:
        for place, column in enumerate(columns[kind]):
            table.add_column(column.label if place else f"{kind} {column.label}", justify="right", no_wrap=True)
    for pair in zip_longest(*curves.values()):
        cells = [
            _cell(column, part).plain if part else ""
            for part, of_curve in zip(pair, columns.values(), strict=True)
            for column in of_curve
        ]
        table.add_row(str(pair[0].index), *cells)
    cut = ", and cut short" if "truncated" in curves else ""
    return [Text(f"\ncumulative over depth: the intact network restricted{cut}", style="dim"), table]


def finding_lines(findings: Sequence[Finding], verbose: bool) -> list[Text]:
    """The findings as they are, or the first five and how many more there are."""
    shown = findings if verbose else findings[:FIRST]
    more = len(findings) - len(shown)
    return [*map(finding_line, shown), *([Text(f"{more} more with --verbose", style="dim")] if more else [])]


def finding_line(finding: Finding) -> Text:
    """A finding's code in the colour of its severity, and what it says in the terminal's own."""
    return Text.assemble((f"{plain(finding.code)}: ", COLOURS[finding.severity]), plain(finding.message))


def _foot(report: Report) -> Text:
    cost = report.cost
    return Text(
        f"\n{counted(cost.hvps, 'Hessian-vector product')} ({cost.mode}), {cost.seconds:.1f} s, "
        f"{cost.peak_memory_bytes / 2**30:.1f} GiB, {cost.device}" + (f", {cost.ranks} ranks" if cost.ranks > 1 else ""),
        style="dim",
    )
