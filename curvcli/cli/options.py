"""Options that measuring verbs share."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from enum import Enum, StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from curvcli.cli.formats import Format, ShortFormat
from curvcli.errors import UsageError
from curvcli.optimizers import optimizer_names


class HvpMode(StrEnum):
    """How Hessian-vector products are made."""

    auto = "auto"
    kept = "kept"
    fresh = "fresh"
    forward = "forward"
    differences = "differences"


class Sample(StrEnum):
    """Which windows of the data."""

    first = "first"
    spread = "spread"
    random = "random"


Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint, run directory (its newest checkpoint) or URL; see docs/how-to/checkpoints.md.",
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Training data: a file or a pattern; may be repeated.  [default: from curv.toml]"),
]
SampleOption = Annotated[
    Sample | None,
    typer.Option(metavar="HOW", help="Which windows of the data are used: first, spread or random.  [default: first]"),
]
Tokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Number of predictions to average over.  [default: 8192]")
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Number of predictions in a window.  [default: the model's context, at most 1024]"
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Number of windows in a forward pass.  [default: by memory]")
]
OptimizerName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Optimizer: {', '.join(optimizer_names())}, or none for the bare Hessian.  [default: the checkpoint's]",
    ),
]
Lr = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=0,
        help="Learning rate of the largest parameter group that moves; the others keep their ratio to it.  "
        "[default: the checkpoint's]",
    ),
]
Betas = Annotated[
    str | None,
    typer.Option(metavar="B1,B2", help="Betas instead of the checkpoint's, where all parameter groups have the same."),
]
Eps = Annotated[float | None, typer.Option(metavar="X", min=0, help="Epsilon instead of the checkpoint's, as --betas.")]
WeightDecay = Annotated[
    float | None, typer.Option(metavar="X", min=0, help="Weight decay instead of the checkpoint's, as --betas.")
]
Momentum = Annotated[
    float | None, typer.Option(metavar="X", min=0, help="Momentum instead of the checkpoint's, as --betas (SGD, RMSprop).")
]
Clip = Annotated[
    float | None,
    typer.Option(
        metavar="X", min=0, max=1,
        help="What clipping leaves of a gradient: max_grad_norm over its usual norm; 1 if nothing is clipped. By default "
        "what the run's record says.",
    ),
]  # fmt: skip
Network = Annotated[
    str | None,
    typer.Option(
        metavar="NETWORK",
        help="Network of the weights: package.module:factory of yours (it is run), or a transformers config.json or "
        "its directory.  [default: the config.json beside the weights]",
    ),
]
LossOption = Annotated[
    str,
    typer.Option(
        metavar="LOSS",
        help="Loss: auto (by the architecture), causal-lm, masked-lm, seq2seq, classification, or package.module:function "
        "of yours (it is run).",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Device to measure on: auto, cpu, cuda, cuda:1, ...")]
ModeOption = Annotated[
    HvpMode,
    typer.Option(
        metavar="MODE",
        help="How Hessian-vector products are made: auto, kept, fresh, forward or differences.",
    ),
]
Tolerance = Annotated[
    float, typer.Option(metavar="X", help="Residual over the eigenvalue at which an estimate counts as converged.")
]
MaxHvps = Annotated[int, typer.Option(metavar="N", min=3, help="Most Hessian-vector products that one estimate may take.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most memory that the process may take, as 8GiB; on a GPU, its tensors there.  [default: by what is free]",
    ),
]
Shard = Annotated[
    bool,
    typer.Option("--shard", help="Under torchrun, divide weights, moments and vectors over the ranks, not the data alone."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", min=0, help="Seed of the eigensolver's random start.  [default: 0]")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the document (JSON) here.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture here (.png, .svg, .pdf).")]
FormatOption = Annotated[
    Format, typer.Option("--format", metavar="FORMAT", help="What stdout gets: table, json, csv or markdown.")
]
ShortFormatOption = Annotated[
    ShortFormat, typer.Option("--format", metavar="FORMAT", help="What stdout gets: table or json.")
]
BUDGET = "Time that measuring may take, imports counted, as 90, 120s or 2m."
Budget = Annotated[str | None, typer.Option(metavar="TIME", help=BUDGET)]
Estimate = Annotated[
    bool, typer.Option("--estimate", help="Make one product, print what the measurement will cost, and measure nothing.")
]
VERBOSE = "Print all findings, and each step with its time on stderr."
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help=VERBOSE)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress on stderr.")]


def _measuring(
    data: Data = None,
    sample: SampleOption = None,
    tokens: Tokens = None,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = None,
    optimizer: OptimizerName = None,
    lr: Lr = None,
    betas: Betas = None,
    eps: Eps = None,
    weight_decay: WeightDecay = None,
    momentum: Momentum = None,
    clip: Clip = None,
    model: Network = None,
    loss: LossOption = "auto",
    device: Device = "auto",
    mode: ModeOption = HvpMode.auto,
    tolerance: Tolerance = 0.01,
    max_hvps: MaxHvps = 100,
    memory: Memory = None,
    shard: Shard = False,
    seed: Seed = None,
) -> None:
    """The options of every verb that measures in full, in the order of its help."""


def measuring(panel: str | None = None, *, ranks: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `_measuring` where it has the parameter `given`, which takes their values as a dict.

    Args:
        panel: of the help, that they stand in.
        ranks: whether several ranks measure it together, which one option is of.
    """
    hints = get_type_hints(_measuring, include_extras=True)
    shared = [p.replace(annotation=_in(panel, hints[p.name])) for p in signature(_measuring).parameters.values()]
    shared = [p for p in shared if ranks or p.name != "shard"]

    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = get_type_hints(command, include_extras=True)
        parameters: list[Parameter] = []
        for parameter in signature(command).parameters.values():
            parameters += shared if parameter.name == "given" else [parameter.replace(annotation=own[parameter.name])]

        @wraps(command)
        def with_options(**values: Any) -> None:
            command(given={p.name: values.pop(p.name) for p in shared}, **values)

        # In Python no parameter without a default follows one with, which on a command line means nothing.
        parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters]
        with_options.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_options

    return give


def _in(panel: str | None, annotation: Any) -> Any:
    if panel is None:
        return annotation
    kind, option = get_args(annotation)
    option = copy(option)  # shared by verbs whose help has other panels
    option.rich_help_panel = panel
    return Annotated[kind, option]


def changed(given: dict[str, Any]) -> list[str]:
    """Flags of the options of `_measuring` that are not as they are by default."""
    defaults = {p.name: p.default for p in signature(_measuring).parameters.values()}
    return [f"--{name.replace('_', '-')}" for name, value in given.items() if value != defaults[name]]


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """What `curvcli.analysis.options.Options` takes, of options as they were typed. Raises UsageError."""
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    return {**plain, "betas": _betas(given["betas"])}


def seconds(budget: str | None) -> float | None:
    """Of a length of time as it was typed; None where none was. Raises UsageError."""
    if budget is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", budget.strip())
    found = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"] if match else 0.0
    if not 0 < found < 1e6:
        raise UsageError(f"--budget {budget!r} is no length of time", hint="as in 90, 120s, 2m or 1h")
    return found


def _betas(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--betas {text!r} is not two numbers", hint="as in --betas 0.9,0.95") from None
    return first, second
