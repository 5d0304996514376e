"""What a user may set about a measurement of a checkpoint. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from curvcli.errors import UsageError

if TYPE_CHECKING:
    from curvcli.curvature.hvp import Mode
    from curvcli.data.shards import Sample


@dataclass(frozen=True)
class Options:
    """How a checkpoint is measured; None means the configuration's value, the checkpoint's, or the default.

    Attributes:
        data: files or patterns of training data; of curv.toml by default.
        sample: which windows of the data: "first" (default), "spread" or "random".
        tokens: predictions to average over, 8,192 by default.
        sequence_length: predictions in a window; the model's context by default, at most 1,024.
        batch_size: windows in a forward pass; by memory by default.
        seed: of the eigensolver's random start and of a random sample, 0 by default.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        model: network of the weights: "package.module:factory", which is run, or the path of a transformers config.json.
        loss: "auto" (by the architecture), "causal-lm", "masked-lm", "seq2seq", "classification", or
            "package.module:function", which is run.
        optimizer: one of `curvcli.optimizers.optimizer_names()`, or "none" for the Hessian itself.
        lr: learning rate of the largest parameter group that moves; the others keep their ratio to it.
        betas: instead of the checkpoint's, as the next three.
        eps: as betas.
        weight_decay: as betas.
        momentum: as betas (SGD, RMSprop).
        clip: share of its norm that clipping leaves of a gradient, above 0, 1 where nothing is clipped; by default what the
            run's own record says.
        mode: how Hessian-vector products are made: "auto", "kept", "fresh", "forward", "differences".
        tolerance: residual over the eigenvalue at which an estimate counts as converged.
        max_hvps: Hessian-vector products that one estimate may take, at least 3.
        deadline: instant of `time.monotonic()` from which nothing more is started.
        memory: most that the process may take at its peak, in bytes or as "8GiB"; by what is free by default.
        shard: where several processes measure together, divide weights, moments and vectors over them.
        parts: measure embedding with head, and each layer, alone too; without them no depths are either.
        depths: measure the curves over depth too, up to half of the work.
        truncated: measure the networks cut short too, one of these curves; None where their loss says that they are near
            initialisation, where alone they mean something.
    """

    data: Path | Sequence[Path] | None = None
    sample: Sample | None = None
    tokens: int | None = None
    sequence_length: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    device: str = "auto"
    model: str | None = None
    loss: str = "auto"
    optimizer: str | None = None
    lr: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    momentum: float | None = None
    clip: float | None = None
    mode: Mode | Literal["auto"] = "auto"
    tolerance: float = 1e-2
    max_hvps: int = 100
    memory: int | str | None = None
    deadline: float = float("inf")
    shard: bool = False
    parts: bool = True
    depths: bool = True
    truncated: bool | None = None


def options_of(given: Mapping[str, Any], *, fixed: Collection[str] = ()) -> Options:
    """Options by name, as the public functions take them; paths may be text.

    Args:
        fixed: names that the caller decides on itself.

    Raises:
        UsageError: a name is none of an option.
    """
    known = [field.name for field in fields(Options) if field.name not in fixed]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"{name!r} is no option of a measurement here", hint=f"{guess}options: {', '.join(known)}")
    data = given.get("data")
    if isinstance(data, str):
        data = Path(data)
    elif isinstance(data, Sequence):
        data = [Path(path) for path in data]
    return Options(**{**given, "data": data})


def changed(options: Options) -> list[str]:
    """Names of the options that are not as they are by default."""
    default = Options()
    return [field.name for field in fields(Options) if getattr(options, field.name) != getattr(default, field.name)]
