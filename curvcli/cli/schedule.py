"""`curv schedule`: when which blocks train. Exit codes: 0 done, 2 could not run; `verify` has 1 for does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curvcli.cli import options
from curvcli.cli.app import BoundedGroup, BoundedTyper, app, check_outputs, exit_codes, readers_may_leave
from curvcli.cli.formats import ShortFormat
from curvcli.errors import counted, plain

if TYPE_CHECKING:
    from curvcli.documents import Schedule


verbs = BoundedTyper(cls=BoundedGroup)
app.add_typer(verbs, name="schedule")

EXAMPLES = (
    "Examples:\n\n"
    "`curv schedule --depth 48 -o schedule.json`\n\n"
    "`curv schedule --from report.json --lr 0.003 --lr-schedule cosine --warmup-steps 100 --total-steps 600`\n\n"
    "`curv schedule --resume sample_checkpoints/hot/checkpoint-60 --lr-schedule cosine --warmup-steps 100 "
    "--total-steps 600`\n\n"
    "`curv schedule --depth 8 --for sample_checkpoints/hot -o schedule.json`\n\n"
    "`curv schedule verify schedule.json sample_checkpoints/hot`"
)


@verbs.callback(invoke_without_command=True, epilog=EXAMPLES)
def schedule(
    context: typer.Context,
    depth: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=10_000, help="Number of blocks of the model; plans from it alone.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Plan a fresh run from this report's truncated curve.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Plan which blocks a run freezes as it resumes, from a checkpoint or its report (.json)."
        ),
    ] = None,
    margin: Annotated[
        float | None, typer.Option(metavar="X", help="Largest predicted rho to allow.  [default: 0.8]")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(metavar="ORDER", help="Which blocks are locked at the start: last or interleaved.  [default: last]"),
    ] = None,
    start: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Number of blocks that train from step 0.  [default: half]")
    ] = None,
    groups: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of groups that the others join in.  [default: 4]")
    ] = None,
    interval: Annotated[
        int, typer.Option(metavar="N", min=1, help="Steps between two groups, where the clock decides.")
    ] = 500,
    hold: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Steps to the first group, with --resume at constant lr.  [default: --interval]"
        ),
    ] = None,
    lock: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How blocks are locked, with --depth: zero-output or residual-gate.  [default: zero-output]",
        ),
    ] = None,
    gate_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Step at which the last residual gate is open.  [default: 3500]"),
    ] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Peak learning rate.  [default: the report's]")] = None,
    lr_schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Course of the learning rate: constant, linear, cosine, wsd, inverse-sqrt, or a .csv file with columns "
            "step and lr.  [default: constant]",
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Steps of the learning rate's warm-up.  [default: 2000; with --resume 0]"),
    ] = None,
    total_steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Steps of the run.")] = None,
    min_lr_ratio: Annotated[
        float | None, typer.Option(metavar="X", help="Least learning rate over the peak (linear, cosine, wsd).")
    ] = None,
    decay_steps: Annotated[int | None, typer.Option(metavar="N", min=0, help="Steps of the decay at the end (wsd).")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Training data as of curv analyze, with --resume CHECKPOINT.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of predictions to average over, with --resume CHECKPOINT."),
    ] = None,
    named: Annotated[
        Path | None,
        typer.Option(
            "--for",
            metavar="PATH",
            help="Name the blocks of this checkpoint's model and the tensors that rest, for jobs without curv.",
        ),
    ] = None,
    output: options.Output = None,
    plot: options.Plot = None,
    format: options.ShortFormatOption = ShortFormat.table,  # noqa: A002
    quiet: options.Quiet = False,
) -> None:
    """Plan when which blocks train: from depth alone, from a report, or for a run that resumes."""
    with exit_codes():
        from curvcli.analysis.schedule import refuse

        if context.invoked_subcommand is not None:
            sources = {name: context.get_parameter_source(name) for name in context.params}
            # By the source's name: typer may bring a click of its own, whose classes are others.
            typed = [name for name, source in sources.items() if getattr(source, "name", "") == "COMMANDLINE"]
            refuse(f"curv schedule {context.invoked_subcommand}", {f"--{name.replace('_', '-')}": True for name in typed})
            return
        check_outputs(output, plot)
        from curvcli.analysis.schedule import schedule as planned
        from curvcli.cli.progress import reporting

        quick = resume is None or resume.suffix == ".json"  # no bar where nothing is measured
        with reporting(quiet or quick) as progress:
            plan = planned(
                depth, report=report, resume=resume, margin=margin, order=order, start=start, groups=groups,
                interval=interval, hold=hold, lock=lock, gate_steps=gate_steps, lr=lr, lr_schedule=lr_schedule,
                warmup_steps=warmup_steps, total_steps=total_steps, min_lr_ratio=min_lr_ratio, decay_steps=decay_steps,
                data=data, tokens=tokens, progress=progress,
            )  # fmt: skip
        if named is not None:
            from curvcli.training.naming import with_names_of

            plan = with_names_of(plan, named)
        _write(plan, output, plot, format)


@verbs.command(epilog="Example:\n\n`curv schedule verify schedule.json sample_checkpoints/hot`")
def verify(
    schedule: Annotated[Path, typer.Argument(metavar="SCHEDULE", help="Schedule that curv schedule wrote.")],
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of the model that is to be trained with it.")
    ],
) -> None:
    """Check that a schedule fits a checkpoint's model: 0 it fits, 1 it does not, each reason one line, 2 could not run."""
    with exit_codes():
        from curvcli.documents import load_schedule

        plan = load_schedule(schedule)
        # Imported after the schedule was read: refusing a bad one needs no torch.
        from curvcli.training.verify import problems

        found = problems(plan, checkpoint)
        with readers_may_leave():
            for problem in found:
                typer.echo(plain(f"{problem.code}: {problem.message}"))
            if not found:
                fit = f"{counted(plan.depth, 'block')}, {counted(len(plan.phases), 'phase')}"
                typer.echo(plain(f"{schedule} fits {checkpoint}: {fit}"))
    if found:
        raise typer.Exit(1)


def _write(plan: Schedule, output: Path | None, plot: Path | None, format: ShortFormat) -> None:  # noqa: A002
    from curvcli.documents import write_whole

    if output:
        write_whole(output, plan.to_json().encode())
    if plot:
        from curvcli.render.schedule_plot import plot as draw

        write_whole(plot, draw(plan, plot.suffix[1:].lower()))
    if format is ShortFormat.json:
        typer.echo(plan.to_json(), nl=False)
    else:
        from curvcli.cli.screen import terminal
        from curvcli.render.schedule_table import show

        show(plan, terminal())
