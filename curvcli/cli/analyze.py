"""`curv analyze` and `curv inspect`: one checkpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curvcli.cli import options
from curvcli.cli.app import app, check_outputs, exit_codes

if TYPE_CHECKING:
    from curvcli.measurement import Progress


class Format(StrEnum):
    """What stdout gets."""

    table = "table"
    json = "json"
    csv = "csv"
    markdown = "markdown"


@app.command(
    epilog="Examples:\n\n"
    "`curv analyze sample_checkpoints/hot`\n\n"
    "`curv analyze ckpt/ --data train.bin --tokens 32768 -o report.json --plot curv.png`\n\n"
    "`curv analyze ckpt/ --format json | jq .full.rho`"
)
def analyze(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint, run directory (its newest checkpoint) or URL; see docs/checkpoints.md.")
    ],
    data: options.Data = None,
    sample: options.SampleOption = None,
    tokens: options.Tokens = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = None,
    optimizer: options.OptimizerName = None,
    lr: options.Lr = None,
    betas: Annotated[str | None, typer.Option(metavar="B1,B2", help="Instead of the checkpoint's.")] = None,
    eps: Annotated[float | None, typer.Option(metavar="X", min=0, help="Instead of the checkpoint's.")] = None,
    weight_decay: Annotated[float | None, typer.Option(metavar="X", min=0, help="Instead of the checkpoint's.")] = None,
    momentum: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Instead of the checkpoint's (SGD, RMSprop).")
    ] = None,
    model: options.Network = None,
    loss: options.LossOption = "auto",
    device: options.Device = "auto",
    mode: options.ModeOption = options.HvpMode.auto,
    tolerance: options.Tolerance = 0.01,
    max_hvps: options.MaxHvps = 100,
    seed: options.Seed = None,
    no_depths: Annotated[
        bool, typer.Option("--no-depths", help="Leave out the curves over depth, half of the work.")
    ] = False,
    output: options.Output = None,
    plot: options.Plot = None,
    format: Annotated[  # noqa: A002
        Format, typer.Option(metavar="FORMAT", help="What stdout gets: table, json, csv, markdown.")
    ] = Format.table,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a checkpoint's curvature: in full, per layer and over depth, against its edge of stability.

    rho is the top eigenvalue of the preconditioned Hessian over the optimizer's threshold: 1 is the edge.
    """
    with exit_codes():
        both = options.parse_betas(betas)
        check_outputs(output, plot)
        from curvcli.progress import reporting

        with reporting(quiet, verbose) as progress:
            progress("importing torch", 0.0)
            report = _measure(
                checkpoint,
                progress,
                data=data,
                sample=sample.value if sample else None,
                tokens=tokens,
                sequence_length=sequence_length,
                batch_size=batch_size,
                optimizer=optimizer,
                lr=lr,
                betas=both,
                eps=eps,
                weight_decay=weight_decay,
                momentum=momentum,
                model=model,
                loss=loss,
                device=device,
                mode=mode.value,
                tolerance=tolerance,
                max_hvps=max_hvps,
                seed=seed,
                depths=not no_depths,
            )
        from curvcli.results import write_whole

        if output:
            write_whole(output, report.to_json().encode())
        if plot:
            from curvcli.report.plot import plot as draw

            write_whole(plot, draw(report, plot.suffix[1:].lower()))
        _print(report, format)


@app.command(epilog="Example:\n\n`curv inspect sample_checkpoints/hot`")
def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint, run directory (its newest checkpoint) or URL; see docs/checkpoints.md.")
    ],
    data: options.Data = None,
    model: options.Network = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what `curv analyze` would read. Reads headers, computes nothing."""
    with exit_codes():
        from curvcli.checkpoints import inspect_checkpoint

        found = inspect_checkpoint(checkpoint, data, model)
        if json:
            from curvcli.results import dumps

            typer.echo(dumps(found), nl=False)
        else:
            from curvcli.report.facts import show_facts

            show_facts(found)


def _measure(checkpoint: Path, progress: Progress, **given: object):  # type: ignore[no-untyped-def]
    from curvcli.checkpoints import Options, analyze_checkpoint

    return analyze_checkpoint(checkpoint, Options(**given), progress)  # type: ignore[arg-type]


def _print(report, format: Format) -> None:  # type: ignore[no-untyped-def]  # noqa: A002
    if format is Format.table:
        from rich.console import Console

        from curvcli.report.table import show

        show(report, Console())
    else:
        from curvcli.report import TEXT

        typer.echo(TEXT[format.value](report), nl=False)
