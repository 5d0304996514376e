"""`curv gate`: rules held against a checkpoint or a report."""

from __future__ import annotations

import os
import re
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvcli.cli import options
from curvcli.cli.app import app, check_outputs, exit_codes, readers_may_leave
from curvcli.errors import InputError, UsageError

if TYPE_CHECKING:
    from curvcli.analysis.config import GateTable
    from curvcli.documents import Gate, Report, Rule

TRACK = "curv.track/1"
RULES, MEASURING, OUTPUT = "Rules", "Measuring, where a checkpoint is given", "Output"


class Format(StrEnum):
    """What stdout gets."""

    text = "text"
    json = "json"
    github = "github"
    junit = "junit"
    markdown = "markdown"


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
def gate(
    subject: Annotated[
        Path | None, typer.Argument(help="Checkpoint, run (its newest checkpoint), report, or track (its newest point).")
    ] = None,
    max_rho: Annotated[float | None, typer.Option(metavar="X", help="Of the full model.", rich_help_panel=RULES)] = None,
    max_layer_rho: Annotated[
        float | None, typer.Option(metavar="X", help="Of each layer alone.", rich_help_panel=RULES)
    ] = None,
    max_update_ratio: Annotated[
        float | None, typer.Option(metavar="X", help="lr over the critical lr of the next update.", rich_help_panel=RULES)
    ] = None,
    max_surge: Annotated[
        float | None,
        typer.Option(metavar="X", help="rho over the baseline's, or a track's median.", rich_help_panel=RULES),
    ] = None,
    max_regression: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="Percent of lambda over the baseline's.", rich_help_panel=RULES)
    ] = None,
    regression_tolerance: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Percent added to it.  [default: 1]", rich_help_panel=RULES),
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens that were averaged over.", rich_help_panel=RULES)
    ] = None,
    require_resolved: Annotated[
        bool | None,
        typer.Option("--require-resolved", help="The verdict is resolved.", rich_help_panel=RULES),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Report or track to compare with.", rich_help_panel=RULES)
    ] = None,
    unresolved: Annotated[
        Taken | None, typer.Option(help="Take unresolved for this instead of exit code 3.", rich_help_panel=RULES)
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the rules in force and where each is from.", rich_help_panel=RULES)
    ] = False,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="As 90, 120s or 2m; imports count.", rich_help_panel=MEASURING)
    ] = None,
    *,
    given: dict[str, Any],
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the report, a later --baseline.", rich_help_panel=MEASURING),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write .json, .xml (JUnit), .md or .txt.", rich_help_panel=OUTPUT
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="What stdout gets.", rich_help_panel=OUTPUT)] = Format.text,  # noqa: A002
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=OUTPUT)] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Each step with its time on stderr.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Hold a checkpoint, a report or a track against rules, for CI: passed, broken or unresolved.

    Rules are flags, or keys of `[gate]` in curv.toml (`[tool.curv.gate]` in pyproject.toml); flags win.
    A number that is not certified is unresolved, never passed.
    """
    started = time.monotonic()
    code = 0
    with exit_codes():
        table = _table(
            {
                "max-rho": max_rho,
                "max-layer-rho": max_layer_rho,
                "max-update-ratio": max_update_ratio,
                "max-surge": max_surge,
                "max-regression": max_regression,
                "regression-tolerance": regression_tolerance,
                "min-tokens": min_tokens,
                "require-resolved": require_resolved,
                "baseline": baseline,
                "unresolved": None if unresolved is None else unresolved.value,
            }
        )
        settings = _Settings(table, subject)
        if explain:
            from rich.console import Console

            from curvcli.render.gate_text import show_rules

            show_rules(settings.rules, settings.others(), Console())
            return
        if subject is None:
            raise UsageError("nothing to judge was given", hint="pass a checkpoint, a run directory or a report")
        outputs = output or []
        for path in [*outputs, *([report] if report else [])]:
            check_outputs(path, None)
        _check_suffixes(outputs)
        seconds = None if budget is None else _seconds(budget)
        document = _judge(subject, settings, given, report, started, seconds, quiet, verbose)
        _write(document, outputs)
        _print(document, format)
        code = document.exit_code
    raise typer.Exit(code)


class _Settings:
    """The rules in force, and what goes with them: a flag, else the configuration, else the default."""

    def __init__(self, flags: GateTable, subject: Path | None) -> None:
        from curvcli.analysis.config import find_gate

        self.flags = flags
        self.subject = subject or Path()
        self.table, self.file = find_gate(subject or Path())
        self.rules = self._rules()
        self.baseline: Path | None = self.of("baseline")[0]
        self.tolerance: float = self.of("regression-tolerance", 1.0)[0]
        self.unresolved: Any = self.of("unresolved", "report")[0]
        compared = [rule.name for rule in self.rules if rule.name in ("max-surge", "max-regression")]
        if "max-surge" in compared and subject is not None and _schema(subject) == TRACK:
            compared.remove("max-surge")  # it has its own past to be compared with
        if compared and self.baseline is None:
            raise UsageError(f"{compared[0]} compares with a baseline, and none is named", hint="pass --baseline FILE")

    def of(self, name: str, default: Any = None) -> tuple[Any, str]:
        """A setting's value and where it is from."""
        field = name.replace("-", "_")
        if (value := getattr(self.flags, field)) is not None:
            return value, f"--{name}"
        if (value := getattr(self.table, field)) is not None:
            return value, f"{self.file}"
        return default, "default"

    def others(self) -> list[tuple[str, str, str]]:
        """The settings that are no rules: name, value, source."""
        named = [("regression-tolerance", 1.0), ("unresolved", "exit code 3"), ("baseline", "none")]
        found = [(name, *self.of(name, default)) for name, default in named]
        return [(name, f"{value:g}" if isinstance(value, float) else str(value), source) for name, value, source in found]

    def _rules(self) -> list[Rule]:
        from curvcli.analysis.config import gate_not_counted
        from curvcli.documents import Rule
        from curvcli.documents.columns import ruled

        rules = []
        for name in ruled():
            value, source = self.of(name)
            if value is not None and value is not False:
                rules.append(Rule(name=name, limit=None if value is True else float(value), source=source))
        if not rules:
            foreign = gate_not_counted(self.subject)
            raise UsageError(
                f"no rule is in force: those of {foreign} do not count, as it is not in the working directory or above it"
                if foreign
                else "no rule is in force",
                hint="pass one, as --max-rho 1.0, or put it into [gate] of a curv.toml in the working directory",
            )
        return rules


def _table(flags: dict[str, Any]) -> GateTable:
    from pydantic import ValidationError

    from curvcli.analysis.config import GateTable

    try:
        return GateTable.model_validate({name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"--{first['loc'][0]}: {first['msg']}, not {first['input']}", hint="see curv gate --help"
        ) from error


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text.strip())
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"] if match else 0.0
    if not 0 < seconds < 1e6:
        raise UsageError(f"--budget {text!r} is no length of time", hint="as in 90, 120s, 2m or 1h")
    return seconds


def _check_suffixes(outputs: list[Path]) -> None:
    from curvcli.render.gate import BY_SUFFIX

    for path in outputs:
        if path.suffix.lower() not in BY_SUFFIX:
            raise UsageError(f"no format goes with the name {path}", hint=f"end it in one of: {', '.join(BY_SUFFIX)}")


def _judge(
    subject: Path,
    settings: _Settings,
    given: dict[str, Any],
    report_to: Path | None,
    started: float,
    seconds: float | None,
    quiet: bool,
    verbose: bool,
) -> Gate:
    from curvcli.documents import load_report, load_track, write_whole
    from curvcli.judge.gate import decide
    from curvcli.judge.readings import NoReadings, Readings, ReportReadings, track_readings

    baseline = _baseline(settings.baseline)  # before minutes are spent
    report: Report | None
    readings: Readings
    if schema := _schema(subject):
        flags = [*options.changed(given), *["--report"][: report_to is not None], *["--budget"][: seconds is not None]]
        if flags:
            raise UsageError(f"{flags[0]} is for checkpoints, and {subject} is a document", hint=f"drop {flags[0]}")
        if schema == TRACK:
            track = load_track(subject)
            report = track.points[-1].report
            readings = track_readings(track, _compared(baseline, report)[0])
        else:
            report = load_report(subject)
            readings = ReportReadings(report, *_compared(baseline, report))
    else:
        from curvcli.cli.budget import measure

        report, reason = measure(subject, options.settings(given), started, seconds, quiet, verbose)
        if report is not None and report_to is not None:
            write_whole(report_to, report.to_json().encode())
        readings = NoReadings(reason) if report is None else ReportReadings(report, *_compared(baseline, report))
    return decide(
        settings.rules,
        readings,
        report,
        path=_name(subject),
        kind="track" if schema == TRACK else "report" if schema else "checkpoint",
        baseline=None if settings.baseline is None else _name(settings.baseline),
        regression_tolerance=settings.tolerance,
        unresolved=settings.unresolved,
    )


def _baseline(path: Path | None) -> Report | list[Report] | None:
    """What the baseline holds: a report, or the certified points of a track."""
    from curvcli.documents import load_report, load_track
    from curvcli.judge.readings import past

    if path is None:
        return None
    if _schema(path) != TRACK:
        return load_report(path)
    track = load_track(path)
    if not (known := past(track.points, track.window)):
        raise InputError(f"{path} has no certified point to compare with", hint="give another --baseline")
    return known


def _compared(baseline: Report | list[Report] | None, report: Report | None) -> tuple[Report | None, list[Report]]:
    """What lambda is held against, and what rho is, where there is a run: never the judged checkpoint itself."""
    from curvcli.judge.readings import others

    if not isinstance(baseline, list) or report is None:
        return (None if isinstance(baseline, list) else baseline), []
    known = others(baseline, report)
    return (known[-1] if known else None), known


def _name(path: Path) -> str:
    """A path as text that JSON and a terminal can hold, whatever bytes it is made of."""
    return os.fsencode(path).decode("utf-8", "replace")


def _schema(path: Path) -> str | None:
    """The schema of a document; None for checkpoints: directories, URLs, zip archives or pickles, not JSON."""
    from curvcli.documents import schema_of

    if not path.is_file():
        if not path.exists() and not set(":*?[") & set(str(path)):  # no URL and no pattern: known without minutes of work
            raise InputError(f"{path} does not exist", hint="give a checkpoint, a run, a report or a track")
        return None
    try:
        with path.open("rb") as stream:
            is_json = stream.read(64).lstrip().startswith(b"{") or path.suffix == ".json"
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="give a checkpoint, a run or a report") from error
    return (schema_of(path) or "unknown") if is_json else None


def _write(document: Gate, outputs: list[Path]) -> None:
    from curvcli.documents import write_whole
    from curvcli.render.gate import BY_SUFFIX

    for path in outputs:
        write_whole(path, BY_SUFFIX[path.suffix.lower()](document).encode())


def _print(document: Gate, format: Format) -> None:  # noqa: A002
    from curvcli.render.gate import GATE

    with readers_may_leave():  # who must not turn a broken rule into exit code 0, nor a passed one into 1
        if format is Format.text:
            from rich.console import Console

            from curvcli.render.gate_text import show

            show(document, Console())
        else:
            typer.echo(GATE[format.value].render(document), nl=False)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if format is Format.github and summary:
        try:
            with Path(summary).open("a", encoding="utf-8") as stream:
                stream.write(GATE["markdown"].render(document) + "\n")
        except OSError as error:  # the outcome stands without it
            typer.echo(f"curv: the job summary could not be written: {error.strerror}", err=True)
