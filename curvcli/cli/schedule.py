"""`curv schedule`: when which blocks train. Exit codes: 0 done, 2 could not run; `verify` has 1 for does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvcli.cli.app import BoundedGroup, BoundedTyper, app, check_outputs, exit_codes, readers_may_leave
from curvcli.cli.formats import ScheduleFormat
from curvcli.errors import UsageError, plain

if TYPE_CHECKING:
    from curvcli.documents import LrSchedule, Report, Schedule


class Order(StrEnum):
    """Which blocks are locked at the start."""

    last = "last"
    first = "first"
    interleaved = "interleaved"


verbs = BoundedTyper(cls=BoundedGroup)
app.add_typer(verbs, name="schedule")

EXAMPLES = (
    "Examples:\n\n"
    "`curv schedule --depth 48 -o schedule.json`\n\n"
    "`curv schedule --from report.json --lr 0.003 --lr-schedule cosine --warmup-steps 100 --total-steps 600`\n\n"
    "`curv schedule --resume sample_checkpoints/hot/checkpoint-60 --lr-schedule cosine --warmup-steps 100 "
    "--total-steps 600`\n\n"
    "`curv schedule verify schedule.json sample_checkpoints/hot`"
)


@verbs.callback(invoke_without_command=True, epilog=EXAMPLES)
def schedule(
    context: typer.Context,
    depth: Annotated[int | None, typer.Option(min=1, max=10_000, help="Blocks of the model; plans from depth.")] = None,
    report: Annotated[
        Path | None, typer.Option("--from", help="Plan a fresh run from this report's truncated curve.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Plan which blocks a run freezes as it resumes: a checkpoint, or its report (.json).")
    ] = None,
    margin: Annotated[float | None, typer.Option(help="Largest predicted rho to allow.  [default: 0.8]")] = None,
    order: Annotated[Order | None, typer.Option(help="Which blocks are locked at the start.  [default: last]")] = None,
    start: Annotated[int | None, typer.Option(min=0, help="Blocks that train from step 0.  [default: half]")] = None,
    groups: Annotated[int | None, typer.Option(min=1, help="Groups that the others join in.  [default: 4]")] = None,
    interval: Annotated[int, typer.Option(min=1, help="Steps between two groups, where the clock decides.")] = 500,
    hold: Annotated[
        int | None,
        typer.Option(min=1, help="With --resume at constant lr: steps to the first group.  [default: interval]"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.  [default: the report's]")] = None,
    lr_schedule: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE.csv", help="constant, linear, cosine, wsd, inverse-sqrt, or a file with step,lr."),
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(min=0, help="Of the learning rate.  [default: 2000; with --resume 0]")
    ] = None,
    total_steps: Annotated[int | None, typer.Option(min=1, help="Of the run.")] = None,
    min_lr_ratio: Annotated[float | None, typer.Option(help="Least learning rate over peak (linear, cosine, wsd).")] = None,
    decay_steps: Annotated[int | None, typer.Option(min=0, help="Length of the decay at the end (wsd).")] = None,
    data: Annotated[Path | None, typer.Option(help="With --resume CHECKPOINT: as for curv analyze.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="With --resume CHECKPOINT: as for curv analyze.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the schedule (JSON) here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture here (.png, .svg, .pdf).")] = None,
    format: Annotated[ScheduleFormat, typer.Option(help="What stdout gets.")] = ScheduleFormat.table,  # noqa: A002
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Plan when which blocks train: from depth alone, from a report, or for a run that resumes."""
    if context.invoked_subcommand is not None:
        with exit_codes():
            given = [
                name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
            ]
            _refuse(f"curv schedule {context.invoked_subcommand}", {f"--{name.replace('_', '-')}": True for name in given})
        return
    with exit_codes():
        check_outputs(output, plot)
        if margin is not None and not 0 < margin < inf:
            raise UsageError(f"--margin {margin} is no limit for rho", hint="pass a positive number; 1 is the edge")
        rates = _Rates(lr, lr_schedule, warmup_steps, total_steps, min_lr_ratio, decay_steps)
        limit = {} if margin is None else {"margin": margin}
        pace = {"groups": groups, "interval": interval}
        if resume is not None:
            from_file = resume.suffix == ".json"
            _refuse("a plan for --resume", {"--from": report, "--start": start})
            _refuse(f"the report {resume}", {"--data": data, "--tokens": tokens} if from_file else {})
            _only_last(order, "the restricted curve that --resume measures")
            plan = _freeze(resume, from_file, rates, data, tokens, quiet, **limit, hold=hold, **pace)
        elif report is not None:
            _refuse("a plan with --from", {"--start": start, "--hold": hold, "--data": data, "--tokens": tokens})
            _only_last(order, "the truncated curve that --from reads")
            plan = _grow_from(report, rates, **limit, **pace)
        elif depth is not None:
            _refuse("a plan from --depth alone", {"--margin": margin, "--hold": hold, "--data": data, "--tokens": tokens})
            plan = _grow(depth, rates, start=start, order=(order or Order.last).value, **pace)
        else:
            raise UsageError(
                "nothing to plan from",
                hint="pass --depth N, --from report.json or --resume CHECKPOINT; see curv schedule --help",
            )
        if depth is not None and depth != plan.depth:
            raise UsageError(f"--depth {depth}, but the model measured has {plan.depth} blocks", hint="drop --depth")
        _write(plan, output, plot, format)


@verbs.command(epilog="Example:\n\n`curv schedule verify schedule.json sample_checkpoints/hot`")
def verify(
    schedule: Annotated[Path, typer.Argument(help="A schedule that curv schedule wrote.")],
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the model that is to be trained with it.")],
) -> None:
    """Check that a schedule fits a checkpoint's model: 0 it fits, 1 it does not, each reason one line, 2 could not run."""
    with exit_codes():
        from curvcli.documents import load_schedule

        plan = load_schedule(schedule)
        from curvcli.training.verify import problems

        found = problems(plan, checkpoint)
        with readers_may_leave():
            for problem in found:
                typer.echo(plain(f"{problem.code}: {problem.message}"))
            if not found:
                typer.echo(plain(f"{schedule} fits {checkpoint}: {plan.depth} blocks, {len(plan.phases)} phases"))
    if found:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Rates:
    """The options of the learning rate."""

    peak: float | None
    kind: str | None
    warmup_steps: int | None
    total_steps: int | None
    min_ratio: float | None
    decay_steps: int | None

    @property
    def from_file(self) -> bool:
        return self.kind is not None and self.kind.lower().endswith(".csv")

    def schedule(self, *, peak: float | None, warmup_steps: int) -> LrSchedule:
        """The schedule with this peak (None with a file); `warmup_steps` is the default of a formula's."""
        from curvcli.schedules import lr_schedule

        default = None if self.from_file else warmup_steps
        return lr_schedule(
            self.kind or "constant",
            peak=peak,
            warmup_steps=default if self.warmup_steps is None else self.warmup_steps,
            total_steps=self.total_steps,
            min_ratio=self.min_ratio,
            decay_steps=self.decay_steps,
        )


def _grow(depth: int, rates: _Rates, **options: Any) -> Schedule:
    from curvcli.schedules import WARMUP, grow

    if rates.peak is None and rates.kind is None:
        _refuse("a plan without a learning rate", {"--min-lr-ratio": rates.min_ratio, "--decay-steps": rates.decay_steps})
        warmup = WARMUP if rates.warmup_steps is None else rates.warmup_steps
        return grow(depth, warmup_steps=warmup, total_steps=rates.total_steps, **options)
    lr = rates.schedule(peak=rates.peak, warmup_steps=WARMUP)
    return grow(depth, warmup_steps=lr.warmup_steps, total_steps=lr.total_steps, lr=lr, **options)


def _grow_from(report: Path, rates: _Rates, **options: Any) -> Schedule:
    from curvcli.schedules import WARMUP, Measured, grow_from

    measured = Measured.read(report)
    own = rates.peak is None and not rates.from_file
    lr = rates.schedule(peak=measured.lr if own else rates.peak, warmup_steps=WARMUP)
    return _noted(grow_from(measured, lr=lr, **options), own, _peak_of(measured.report.checkpoint.step))


def _freeze(
    path: Path, from_file: bool, rates: _Rates, data: Path | None, tokens: int | None, quiet: bool, **options: Any
) -> Schedule:
    from curvcli.schedules import Measured, freeze, lr_at

    own = rates.peak is None and not rates.from_file
    # Before a minute of measuring, not after it: what is wrong with the schedule is known from its options.
    lr = rates.schedule(peak=1.0 if own else rates.peak, warmup_steps=0)
    measured = Measured.read(path) if from_file else Measured(_analyze(path, data, tokens, quiet))
    step = measured.report.checkpoint.step
    if own and step is not None:
        share = lr_at(lr, step)
        if not share > 0:
            raise UsageError(
                f"the schedule's learning rate is 0 at the checkpoint's step {step}", hint="pass its peak with --lr"
            )
        lr = lr.model_copy(update={"peak": measured.lr / share})
    return _noted(freeze(measured, lr=lr, **options), own, "is what gives the report's learning rate")


def _analyze(checkpoint: Path, data: Path | None, tokens: int | None, quiet: bool) -> Report:
    from curvcli.cli.progress import reporting

    with reporting(quiet) as progress:
        progress("importing torch", 0.0)
        from curvcli.analysis.checkpoint import Options, analyze_checkpoint

        return analyze_checkpoint(checkpoint, Options(data=data, tokens=tokens), progress)


def _peak_of(step: int | None) -> str:
    if not step:
        return "is the report's learning rate"
    return f"is the report's learning rate at step {step:,}, and a run's own peak may be higher: pass --lr"


def _noted(plan: Schedule, own: bool, what: str) -> Schedule:
    """The schedule, with a finding where its peak learning rate was taken from the report."""
    if not own or plan.lr_schedule is None:
        return plan
    from curvcli.documents import Finding

    message = f"no --lr was given: the peak, {plan.lr_schedule.peak:.4g}, {what}"
    return plan.model_copy(
        update={"findings": [*plan.findings, Finding(code="lr-from-report", severity="info", message=message)]}
    )


def _refuse(where: str, options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(
            f"{where} takes no {', '.join(given)}", hint=f"drop {' and '.join(given)}; see curv schedule --help"
        )


def _only_last(order: Order | None, what: str) -> None:
    if order not in (None, Order.last):
        raise UsageError(
            f"--order {order.value} cannot be predicted: {what} is of the first blocks, the last ones locked",
            hint="drop --order, or plan from --depth alone",
        )


def _write(plan: Schedule, output: Path | None, plot: Path | None, format: ScheduleFormat) -> None:  # noqa: A002
    from curvcli.documents import write_whole

    if output:
        write_whole(output, plan.to_json().encode())
    if plot:
        from curvcli.render.schedule_plot import plot as draw

        write_whole(plot, draw(plan, plot.suffix[1:].lower()))
    if format is ScheduleFormat.json:
        typer.echo(plan.to_json(), nl=False)
    else:
        from rich.console import Console

        from curvcli.render.schedule_table import show

        show(plan, Console())
