"""`curv gate`: rules held against a checkpoint or a report."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvcli.analysis.launch import agreed_code, joined, leads
from curvcli.cli import options
from curvcli.cli.app import app, check_outputs, exit_codes, readers_may_leave
from curvcli.cli.formats import GateFormat
from curvcli.cli.progress import reporting, told_early
from curvcli.cli.rules import rule_options
from curvcli.errors import UsageError

if TYPE_CHECKING:
    from curvcli.documents import Gate

RULES, MEASURING, OUTPUT = "Rules", "Measuring, where a checkpoint is given", "Output"


class Taken(StrEnum):
    """What an unresolved outcome is taken for."""

    pass_ = "pass"  # noqa: S105
    fail = "fail"


@app.command(
    epilog="Exit codes: 0 passed, 1 a rule is broken, 2 bad usage or input, 3 unresolved.\n\n"
    "Examples:\n\n"
    "`curv gate ckpt/ --max-rho 1.0`\n\n"
    "`curv gate report.json --max-layer-rho 0.8 --max-surge 2 --baseline last-good.json --format github`\n\n"
    "`curv gate ckpt/ --budget 120s -o gate.json -o gate.xml`"
)
@options.measuring(MEASURING)
@rule_options(RULES)
def gate(
    *,
    subject: Annotated[
        Path | None,
        typer.Argument(
            metavar="SUBJECT", help="Checkpoint, run (its newest checkpoint), report, or track (its newest point)."
        ),
    ] = None,
    rules: dict[str, Any],
    regression_tolerance: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Percent added to --max-regression.  [default: 1]", rich_help_panel=RULES),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Report or track to compare with.", rich_help_panel=RULES)
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--any", help="Break where any point of a run breaks a rule.", rich_help_panel=RULES),
    ] = False,
    last: Annotated[
        int | None,
        typer.Option("--last", metavar="N", min=1, help="The same of the newest N points.", rich_help_panel=RULES),
    ] = None,
    unresolved: Annotated[
        Taken | None,
        typer.Option(help="What an unresolved outcome is taken for, instead of exit code 3.", rich_help_panel=RULES),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the rules in force and where each is from.", rich_help_panel=RULES)
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help=options.BUDGET,
            rich_help_panel=MEASURING,
        ),
    ] = None,
    given: dict[str, Any],
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the report of what was measured here, for a later --baseline.",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the outcome here, as .json, .xml (JUnit), .md or .txt; may be repeated.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    format: Annotated[GateFormat, typer.Option(help="What stdout gets.", rich_help_panel=OUTPUT)] = GateFormat.text,  # noqa: A002
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=OUTPUT)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help=options.VERBOSE, rich_help_panel=OUTPUT)] = False,
) -> None:
    """Hold a checkpoint, a report or a track against rules, for CI: passed, broken or unresolved.

    Rules are flags, or keys of `[gate]` in curv.toml (`[tool.curv.gate]` in pyproject.toml); flags win.
    A number that is not certified is unresolved, never passed.
    """
    started = time.monotonic()
    code = 0
    with exit_codes(), joined():
        from curvcli.analysis.gate import gate as judged
        from curvcli.analysis.gate import in_force, is_document

        settings = {
            **rules,
            "baseline": baseline,
            "regression_tolerance": regression_tolerance,
            "unresolved": None if unresolved is None else unresolved.value,
            "any": every or None,  # a switch that is off is not given: [gate] may say it
            "last": last,
        }
        # Before minutes of work: what is wrong with rules is known from the rules.
        found = in_force(subject, settings)
        if explain:
            from curvcli.cli.screen import terminal
            from curvcli.render.gate_text import show_rules

            if leads():
                show_rules(found.rules, found.others, terminal())
            return
        if subject is None:
            raise UsageError("nothing to judge was given", hint="pass a checkpoint, a run directory or a report")
        outputs = output or []
        for path in [*outputs, *([report] if report else [])] if leads() else []:
            check_outputs(path, None)
        _check_suffixes(outputs)
        seconds = options.seconds(budget)
        measuring = options.settings(given)
        # Only options that were typed: for a document any option of measuring is an error.
        changed = {name: measuring[name] for name in (flag[2:].replace("-", "_") for flag in options.changed(given))}
        with nullcontext() if is_document(subject) else reporting(quiet, verbose) as progress:
            document = judged(
                subject, **settings, budget=seconds, report=report, progress=progress, started=started,
                on_verdict=None if progress is None else told_early(progress), **changed,
            )  # fmt: skip
        if leads():
            _write(document, outputs)
            _print(document, format, verbose)
        code = agreed_code(document.exit_code)  # or a launcher would see ranks end differently
    raise typer.Exit(code)


def _check_suffixes(outputs: list[Path]) -> None:
    from curvcli.render.gate import BY_SUFFIX

    for path in outputs:
        if path.suffix.lower() not in BY_SUFFIX:
            raise UsageError(f"no format goes with the name {path}", hint=f"end it in one of: {', '.join(BY_SUFFIX)}")


def _write(document: Gate, outputs: list[Path]) -> None:
    from curvcli.documents import write_whole
    from curvcli.render.gate import BY_SUFFIX

    for path in outputs:
        write_whole(path, BY_SUFFIX[path.suffix.lower()](document).encode())


def _print(document: Gate, format: GateFormat, verbose: bool) -> None:  # noqa: A002
    from curvcli.render.gate import GATE

    with readers_may_leave():  # who must not turn a broken rule into exit code 0, nor a passed one into 1
        if format is GateFormat.text:
            from curvcli.cli.screen import terminal
            from curvcli.render.gate_text import show

            show(document, terminal(), verbose=verbose)
        else:
            typer.echo(GATE[format.value].render(document), nl=False)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if format is GateFormat.github and summary:
        try:
            with Path(summary).open("a", encoding="utf-8") as stream:
                stream.write(GATE["markdown"].render(document) + "\n")
        except OSError as error:  # the outcome stands without it
            typer.echo(f"curv: the job summary could not be written: {error.strerror}", err=True)
