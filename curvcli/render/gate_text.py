"""The terminal view of a gate, and of the rules in force."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.documents import Gate, Outcome, Rule
from curvcli.documents.columns import ruled
from curvcli.errors import counted, plain
from curvcli.render.frame import number
from curvcli.render.style import COLOURS, said
from curvcli.render.table import finding_lines


def show(gate: Gate, console: Console, *, verbose: bool = True) -> None:
    """Print subject, outcome, a line a rule and why; readable at 60 columns.

    Args:
        verbose: print all of the report's warnings, and not only the first five.
    """
    subject = gate.subject
    head = Text(plain(subject.path), style="bold")
    if subject.checkpoint not in (None, subject.path):
        head.append(f"\nof {plain(subject.checkpoint or '')}", style="")
    facts = [f"step {subject.step:,}"] if subject.step is not None else []
    facts += [counted(subject.tokens, "token")] if subject.tokens is not None else []
    facts += [f"verdict {said(subject.verdict)}"]
    facts += [f"largest stable lr {subject.stable_lr:.2g}"] if subject.stable_lr is not None else []
    facts += [f"run {subject.run.name}"] if subject.run is not None else []
    facts += [f"the newest of {subject.points} points"] if subject.points > 1 else []
    head.append(f"\n{', '.join(facts)}\n", style="")
    if gate.baseline is not None:
        head.append(f"baseline {plain(gate.baseline)}\n", style="")
    colour = COLOURS[gate.outcome]
    head.append("\n")
    head.append(f" {gate.outcome.upper()} ", style=f"bold reverse {colour}")
    count = sum(outcome.outcome == gate.outcome for outcome in gate.outcomes)
    taken = "" if gate.outcome != "unresolved" or gate.unresolved == "report" else f", taken as {gate.unresolved}"
    head.append(f"  {count} of {counted(len(gate.outcomes), 'rule')}{taken}, exit code {gate.exit_code}\n", style="")
    console.print(head, _table(gate.outcomes), Text(""), sep="\n")
    for outcome in gate.outcomes:
        console.print(Text.assemble((f"{outcome.rule}: ", COLOURS[outcome.outcome]), plain(outcome.message)))
    for line in finding_lines(gate.findings, verbose):
        console.print(line)


def text(gate: Gate) -> str:
    """The same as plain text, 80 columns wide."""
    stream = StringIO()
    show(gate, Console(file=stream, width=80, color_system=None))
    return stream.getvalue()


def show_rules(rules: Sequence[Rule], settings: Sequence[tuple[str, str, str]], console: Console) -> None:
    """Print the rules in force and the settings beside them (name, value, source)."""
    table = _columns("rule", "limit", "from")
    for rule in rules:
        table.add_row(rule.name, "yes" if rule.limit is None else f"{rule.limit:g}", Text(plain(rule.source)))
    for name, value, source in settings:
        table.add_row(Text(name, style="dim"), Text(plain(value)), Text(plain(source)))
    console.print(table)


def _columns(first: str, second: str, last: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    table.add_column(second, justify="right", overflow="fold")
    table.add_column(last, overflow="fold")
    return table


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("rule", no_wrap=True)
    for title in ("limit", "value", "bracket"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    known = ruled()
    for outcome in outcomes:
        low, high = outcome.low, outcome.high
        bracket = "-" if low is None or high is None else "" if low == high else f"{number(low, 3)} to {number(high, 3)}"
        table.add_row(
            outcome.rule,
            number(outcome.limit),
            number(outcome.value, 4 if known[outcome.rule].kind == "count" else 3),
            bracket,
            Text(outcome.outcome, style=COLOURS[outcome.outcome]),
        )
    return table
