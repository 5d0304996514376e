"""The terminal view, the CSV and the Markdown of two runs side by side."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.documents import StepSide, TrackComparison, TrackSide, TrackStep
from curvcli.errors import counted, plain
from curvcli.render.csv import write
from curvcli.render.fit import fitting
from curvcli.render.frame import number
from curvcli.render.markdown import escape
from curvcli.render.style import COLOURS, RUN_LIKE
from curvcli.render.table import finding_line

LETTERS = ("A", "B")


@dataclass(frozen=True)
class Pair:
    """A number that both runs have at a step, as two columns.

    Args:
        key: field of `StepSide`.
        label: what people read, before the letter of the run.
        digits: significant ones.
        leaves: order in which a narrow terminal loses it, 0 first; None is never.
        always: shown though no step has a value.
    """

    key: str
    label: str
    digits: int
    leaves: int | None
    always: bool = False

    def of(self, side: StepSide | None) -> float | None:
        """The value; None where the run has none."""
        return None if side is None else getattr(side, self.key)


PAIRS = (
    Pair("rho", "rho", 3, None, always=True),
    Pair("z", "Z", 3, None),
    Pair("eigenvalue", "lambda", 4, 0),
    Pair("update_ratio", "lr/critical", 3, 1),
    Pair("lr", "lr", 3, 3),
    Pair("training_loss", "loss", 4, 4),
    Pair("shard_loss", "shard loss", 4, 2),
)
RATIO = "rho B/A"
FURTHER = {"first": "A", "second": "B", None: ""}


def sides_of(step: TrackStep) -> tuple[StepSide | None, StepSide | None]:
    """A and B."""
    return step.first, step.second


def shown_pairs(found: TrackComparison) -> list[Pair]:
    """Those that some step has."""
    return [p for p in PAIRS if p.always or any(p.of(side) is not None for step in found.steps for side in sides_of(step))]


def ranking(found: TrackComparison) -> str:
    """Which run is further below its edge (or less far past it), and since when, in a sentence."""
    if not found.ranked:
        return "no step ranks them"
    steps = counted(found.ranked, "common step")
    last = next(step for step in reversed(found.steps) if step.ranked)
    if found.further is None:
        return f"neither is further below its edge at the last of {steps}: their brackets of rho meet"
    lower = (last.first if found.further == "first" else last.second) or last.first
    where = "less far past its edge" if lower and lower.rho is not None and lower.rho > 1 else "further below its edge"
    wins = sum(step.further == found.further for step in found.steps)
    by = "" if last.rho_ratio is None else f"; rho of B over A is {number(last.rho_ratio, 3)} at step {last.step:,}"
    return f"{FURTHER[found.further]} is {where} since step {found.since:,}, at {wins} of {steps}{by}"


def show(found: TrackComparison, console: Console, *, verbose: bool = True) -> None:
    """Print both runs, the ranking, a line a step, and findings; a narrow terminal loses what matters least.

    Args:
        verbose: print all steps, and not only the newest thirty.
    """
    shown = found.steps if verbose else found.steps[-30:]
    cells = [_cells(found, step) for step in shown]
    leaving = sorted((p for p in shown_pairs(found) if p.leaves is not None), key=lambda p: p.leaves or 0)
    order = [f"{pair.label} {letter}" for pair in leaving for letter in LETTERS]
    all_titles = list(cells[0]) if cells else []
    # two blanks between columns
    titles = fitting(cells, console.width - len(all_titles), all_titles, [*order, RATIO])
    # One of two columns says nothing.
    titles = [
        title for title in titles if title[-2:] not in (" A", " B") or {f"{title[:-1]}{x}" for x in LETTERS} <= {*titles}
    ]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for title in titles:
        words = title.startswith("verdict") or title == "further"
        table.add_column(title, justify="left" if words else "right", no_wrap=True)
    for step, row in zip(shown, cells, strict=True):
        table.add_row(*(Text(row[title], style=_style(title, step)) for title in titles))
    more = len(found.steps) - len(shown)
    parts = [_side(letter, side) for letter, side in zip(LETTERS, (found.first, found.second), strict=True)]
    rank = Text.assemble("\n", (ranking(found), "bold"), "\n")
    note = [Text(f"{more} earlier steps with --verbose", style="dim")] if more else []
    console.print(*parts, rank, table, *note, Text(), *map(finding_line, found.findings), sep="\n")


def _cells(found: TrackComparison, step: TrackStep) -> dict[str, str]:
    cells = {"step": f"{step.step:,}"}
    for pair in shown_pairs(found):
        for letter, side in zip(LETTERS, sides_of(step), strict=True):
            cells[f"{pair.label} {letter}"] = number(pair.of(side), pair.digits)
        if pair.key == "rho":
            cells[RATIO] = "-" if step.rho_ratio is None else f"x{number(step.rho_ratio, 3)}"
    for letter, side in zip(LETTERS, sides_of(step), strict=True):
        cells[f"verdict {letter}"] = "" if side is None else side.verdict
    return {**cells, "further": FURTHER[step.further]}


def _style(title: str, step: TrackStep) -> str:
    for letter, side in zip(LETTERS, sides_of(step), strict=True):
        if side is not None and title in (f"rho {letter}", f"verdict {letter}"):
            return COLOURS[side.verdict]
    return ""


def _side(letter: str, side: TrackSide) -> Text:
    text = Text(f"{letter} ", style="bold").append(plain(side.path), style="bold")
    text.append(f"\n  {facts(side)}", style="not bold")
    if side.verdict:
        text.append(", run ", style="not bold").append(side.verdict, style=COLOURS[RUN_LIKE[side.verdict]])
    return text


def facts(side: TrackSide) -> str:
    """How many checkpoints a run has, and where they lie."""
    failed = f" and {side.failed} that could not be measured" if side.failed else ""
    steps = "" if side.first_step is None else f", steps {side.first_step:,} to {side.last_step:,}"
    return f"{counted(side.points, 'checkpoint')}{failed}{steps}"


def to_csv(found: TrackComparison) -> str:
    """One row per step, RFC 4180, numbers at full precision; empty where there is no value."""
    fields = list(StepSide.model_fields)
    keys = ["step", *(f"{field}_{letter.lower()}" for letter in LETTERS for field in fields)]
    return write([*keys, "bracket", "rho_ratio", "further"], map(record, found.steps))


def record(step: TrackStep) -> dict[str, float | str | None]:
    """A step's values by the names of the CSV's columns, at full precision."""
    row: dict[str, float | str | None] = {"step": step.step}
    for letter, side in zip(LETTERS, sides_of(step), strict=True):
        for field in StepSide.model_fields:
            row[f"{field}_{letter.lower()}"] = None if side is None else getattr(side, field)
    return {**row, "bracket": step.bracket, "rho_ratio": step.rho_ratio, "further": FURTHER[step.further]}


def to_markdown(found: TrackComparison) -> str:
    """For a merge request."""
    lines = [f"## curv: {escape(found.first.path)} against {escape(found.second.path)}", ""]
    for letter, side in zip(LETTERS, (found.first, found.second), strict=True):
        lines.append(f"- {letter}: {facts(side)}{f', run {side.verdict}' if side.verdict else ''}")
    lines += [f"- {escape(ranking(found))}"]
    lines += [f"- {finding.severity} {escape(finding.code)}: {escape(finding.message)}" for finding in found.findings]
    rows = [_cells(found, step) for step in found.steps]
    if rows:
        lines += ["", f"| {' | '.join(rows[0])} |", f"|{'--:|' * len(rows[0])}"]
        lines += [f"| {' | '.join(escape(cell) for cell in row.values())} |" for row in rows]
    return "\n".join(lines).rstrip() + "\n"
