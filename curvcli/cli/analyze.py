"""`curv analyze` and `curv inspect`: one checkpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curvcli.cli.app import app, check_outputs, exit_codes
from curvcli.errors import UsageError

if TYPE_CHECKING:
    from curvcli.measurement import Progress


class Format(StrEnum):
    """What stdout gets."""

    table = "table"
    json = "json"
    csv = "csv"
    markdown = "markdown"


class HvpMode(StrEnum):
    """How Hessian-vector products are made."""

    auto = "auto"
    kept = "kept"
    fresh = "fresh"
    forward = "forward"


@app.command(
    epilog="Examples:\n\n"
    "`curv analyze sample_checkpoints/hot`\n\n"
    "`curv analyze ckpt/ --data train.bin --tokens 32768 -o report.json --plot curv.png`\n\n"
    "`curv analyze ckpt/ --format json | jq .full.rho`"
)
def analyze(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint directory, run directory (its newest checkpoint), or nanoGPT ckpt.pt.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Training data: tokens (.bin, .npy, .safetensors), text, or examples with labels (.safetensors, .jsonl). "
            "Default: from curv.toml."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Predictions to average over.  [default: 8192]")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Predictions per window.  [default: the model's context, at most 1024]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows per forward pass.  [default: by memory]")] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="Adam, AdamW, NAdam, SGD, RMSprop, Adagrad, or none for the bare Hessian."),
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Instead of the checkpoint's learning rate.")] = None,
    betas: Annotated[str | None, typer.Option(metavar="B1,B2", help="Instead of the checkpoint's.")] = None,
    eps: Annotated[float | None, typer.Option(min=0, help="Instead of the checkpoint's.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="Instead of the checkpoint's.")] = None,
    momentum: Annotated[float | None, typer.Option(min=0, help="Instead of the checkpoint's (SGD, RMSprop).")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="Network of the weights: package.module:factory of your own (it is run), or a transformers config.json "
            "or its directory. Default: the config.json beside the weights.",
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            help="auto (by the architecture), causal-lm, masked-lm, seq2seq, classification, or package.module:function "
            "of your own (it is run)."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    mode: Annotated[HvpMode, typer.Option(help="How products are made; auto times the exact ones.")] = HvpMode.auto,
    tolerance: Annotated[float, typer.Option(help="Residual over lambda at which an estimate has converged.")] = 0.01,
    max_hvps: Annotated[int, typer.Option(min=3, help="Hessian-vector products per estimate, at most.")] = 100,
    seed: Annotated[int | None, typer.Option(help="Of the eigensolver's random start.  [default: 0]")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report (JSON) here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture here (.png, .svg, .pdf).")] = None,
    format: Annotated[Format, typer.Option(help="What stdout gets.")] = Format.table,  # noqa: A002
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Measure a checkpoint's curvature: in full, per layer and over depth, against its edge of stability.

    rho is the top eigenvalue of the preconditioned Hessian over the optimizer's threshold: 1 is the edge.
    """
    with exit_codes():
        first, second = _betas(betas) if betas is not None else (None, None)
        check_outputs(output, plot)
        from curvcli.progress import reporting

        with reporting(quiet) as progress:
            progress("importing torch", 0.0)
            report = _measure(
                checkpoint,
                progress,
                data=data,
                tokens=tokens,
                sequence_length=sequence_length,
                batch_size=batch_size,
                optimizer=optimizer,
                lr=lr,
                betas=None if first is None else (first, second),
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
        Path, typer.Argument(help="Checkpoint directory, run directory (its newest checkpoint), or nanoGPT ckpt.pt.")
    ],
    data: Annotated[Path | None, typer.Option(help="Shard of training data. Default: from curv.toml.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NETWORK", help="package.module:factory, or a transformers config.json or its directory."),
    ] = None,
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


def _measure(checkpoint: Path, progress: Progress, **options: object):  # type: ignore[no-untyped-def]
    from curvcli.checkpoints import Options, analyze_checkpoint

    return analyze_checkpoint(checkpoint, Options(**options), progress)  # type: ignore[arg-type]


def _print(report, format: Format) -> None:  # type: ignore[no-untyped-def]  # noqa: A002
    if format is Format.table:
        from rich.console import Console

        from curvcli.report.table import show

        show(report, Console())
    else:
        from curvcli.report import TEXT

        typer.echo(TEXT[format.value](report), nl=False)


def _betas(text: str) -> tuple[float, float]:
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--betas {text!r} is not two numbers", hint="as in --betas 0.9,0.95") from None
    return first, second
