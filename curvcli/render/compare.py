"""The terminal view, the CSV and the Markdown of a comparison."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.documents import Change, Comparison, Side
from curvcli.documents.columns import PARTS, column
from curvcli.errors import plain
from curvcli.render.csv import write
from curvcli.render.fit import fitting
from curvcli.render.frame import number
from curvcli.render.markdown import escape
from curvcli.render.style import COLOURS
from curvcli.render.table import finding_line

LAMBDA, RHO = column(PARTS, "eigenvalue"), column(PARTS, "rho")
TITLES = ("layer", f"{LAMBDA.label} A", f"{LAMBDA.label} B", "B/A", f"{RHO.label} A", f"{RHO.label} B", f"B/A {RHO.label}")
LEAST_NEEDED = (TITLES[1], TITLES[4], TITLES[3], TITLES[2])
Z_TITLES = (TITLES[0], "Z A", "Z B", "B/A Z")


def show(found: Comparison, console: Console) -> None:
    """Print both sides, the change of each part, and findings; on a narrow terminal ratios stay and values go."""
    changes = [*found.changes[1:], found.changes[0]]
    rows = [_cells(change) for change in changes]
    # two blanks between columns
    titles = fitting(rows, console.width - len(TITLES), _titles(found), LEAST_NEEDED)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for title in titles:
        table.add_column(title, justify="left" if title == "layer" else "right", no_wrap=title != "layer", overflow="fold")
    for change, cells in zip(changes, rows, strict=True):
        styles = {"layer": "bold" if change.part == "full" else "", TITLES[-1]: _style(change)}
        table.add_row(*(Text(cells[title], style=styles.get(title, "")) for title in titles))
    findings = map(finding_line, found.findings)
    console.print(_side("A", found.first), _side("B", found.second), Text(), table, Text(), *findings, sep="\n")


def _cells(change: Change) -> dict[str, str]:
    values = (number(change.first, LAMBDA.digits), number(change.second, LAMBDA.digits), _times(change.ratio))
    rhos = (number(change.first_rho, RHO.digits), number(change.second_rho, RHO.digits), _times(change.rho_ratio))
    a, b = change.first_z, change.second_z
    zs = (number(a, 3), number(b, 3), _times(b / a if a and b else None))
    return dict(zip((*TITLES, *Z_TITLES[1:]), (plain(change.name), *values, *rhos, *zs), strict=True))


def _titles(found: Comparison) -> tuple[str, ...]:
    """Z's columns where a part has one, and lambda's and rho's where a part has those or none has a Z."""
    z = any(value is not None for c in found.changes for value in (c.first_z, c.second_z))
    rest = any(value is not None for c in found.changes for value in (c.first, c.second))
    return (*TITLES[: None if rest or not z else 1], *Z_TITLES[1 if z else len(Z_TITLES) :])


def to_csv(found: Comparison) -> str:
    """One row per part."""
    return write(list(Change.model_fields), (change.model_dump() for change in found.changes))


def to_markdown(found: Comparison) -> str:
    """For a merge request."""
    lines = [f"## curv: {escape(found.first.path)} against {escape(found.second.path)}", ""]
    lines += [f"- {letter}: {_facts(x)}, {x.verdict}" for letter, x in (("A", found.first), ("B", found.second))] + [""]
    titles = _titles(found)
    lines += [f"| {' | '.join(('part', *titles[1:]))} |", f"|---|{'--:|' * (len(titles) - 1)}"]
    for change in found.changes:
        cells = _cells(change)
        lines.append(f"| {' | '.join(escape(cells[title]) for title in titles)} |")
    lines += ["", *(f"- {finding.severity} {escape(finding.code)}: {escape(finding.message)}" for finding in found.findings)]
    return "\n".join(lines).rstrip() + "\n"


def _times(ratio: float | None) -> str:
    return f"x{number(ratio, 3)}" if ratio is not None else "-"


def _style(change: Change) -> str:
    """Coloured where the whole bracket says that rho rose or fell twofold."""
    if change.rho_ratio is None or change.low is None or change.high is None or not change.ratio:
        return ""
    by_lr = change.rho_ratio / change.ratio
    return "red" if change.low * by_lr > 2 else "green" if change.high * by_lr < 0.5 else ""


def _side(letter: str, side: Side) -> Text:
    text = Text(f"{letter} ", style="bold").append(plain(side.path), style="bold")
    text.append(f"\n  {_facts(side)}, ", style="not bold")
    return text.append(side.verdict, style=COLOURS[side.verdict])


def _facts(side: Side) -> str:
    step = f"step {side.step:,}, " if side.step is not None else ""
    update = f", update ratio {number(side.update_ratio, 3)}" if side.update_ratio is not None else ""
    stable = f" (largest stable {side.stable_lr:.2g})" if side.stable_lr is not None else ""
    z = f", Z {number(side.z, 3)}" if side.z is not None else ""
    return f"{step}loss {number(side.loss)}, lr {number(side.lr, 3)}{stable}{update}{z}"
