"""Options that measuring verbs share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from curvcli.errors import UsageError


class HvpMode(StrEnum):
    """How Hessian-vector products are made."""

    auto = "auto"
    kept = "kept"
    fresh = "fresh"
    forward = "forward"


class Sample(StrEnum):
    """Which windows of the data."""

    first = "first"
    spread = "spread"
    random = "random"


Data = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Training data, a file or a pattern; repeatable.  [default: from curv.toml]"),
]
SampleOption = Annotated[
    Sample | None, typer.Option(metavar="HOW", help="Which windows of the data: first, spread or random.  [default: first]")
]
Tokens = Annotated[int | None, typer.Option(metavar="N", min=1, help="Predictions to average over.  [default: 8192]")]
SequenceLength = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Predictions per window.  [default: the model's context, at most 1024]"),
]
BatchSize = Annotated[int | None, typer.Option(metavar="N", min=1, help="Windows per forward pass.  [default: by memory]")]
OptimizerName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Adam, AdamW, NAdam, SGD, RMSprop, Adagrad, or none for the bare Hessian.")
]
Lr = Annotated[float | None, typer.Option(metavar="X", min=0, help="Instead of the checkpoint's learning rate.")]
Network = Annotated[
    str | None,
    typer.Option(
        metavar="NETWORK",
        help="Network of the weights: package.module:factory of your own (it is run), or a transformers config.json or "
        "its directory.  [default: the config.json beside the weights]",
    ),
]
LossOption = Annotated[
    str,
    typer.Option(
        metavar="LOSS",
        help="auto (by the architecture), causal-lm, masked-lm, seq2seq, classification, or package.module:function of "
        "your own (it is run).",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")]
ModeOption = Annotated[
    HvpMode,
    typer.Option(metavar="MODE", help="How products are made: auto, kept, fresh, forward."),
]
Tolerance = Annotated[float, typer.Option(metavar="X", help="Residual over lambda at which an estimate has converged.")]
MaxHvps = Annotated[int, typer.Option(metavar="N", min=3, help="Hessian-vector products per estimate, at most.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Of the eigensolver's random start.  [default: 0]")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the document (JSON) here.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture here (.png, .svg, .pdf).")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Each step with its time on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def parse_betas(text: str | None) -> tuple[float, float] | None:
    """Two numbers with a comma between them. Raises UsageError."""
    if text is None:
        return None
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--betas {text!r} is not two numbers", hint="as in --betas 0.9,0.95") from None
    return first, second
