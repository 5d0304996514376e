"""What makes a block an identity: the parameters that rest at a value until the block joins.

A block's contribution to the residual stream ends in output projections (attention out, MLP down).
With these zero the block is the identity, its Jacobian is I, and the gradient reaches them, so the
block comes alive by itself once it may move. With every matrix zero it would be a saddle for ever.
Where a norm stands behind the projection (OLMo2, Gemma2), a zero projection would feed it 0, where
RMSNorm's derivative is weight / sqrt(eps): there the norm's gain rests instead.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvcli.curvature.problem import Blocks
from curvcli.documents.resting import OUTPUT_PATTERN, POST_NORMS
from curvcli.errors import UnsupportedError

_OUTPUT = re.compile(OUTPUT_PATTERN)


@dataclass(frozen=True)
class Lock:
    """One block, its parameters, and those that rest, as (name within it, parameter, value at rest)."""

    index: int
    block: nn.Module
    parameters: dict[str, nn.Parameter]
    resting: tuple[tuple[str, nn.Parameter, float], ...] = ()

    def close(self) -> None:
        """Make the block an identity."""
        with torch.no_grad():
            for _, parameter, value in self.resting:
                parameter.fill_(value)

    def moved(self) -> list[str]:
        """Resting parameters that are not at rest; empty while the block is an identity."""
        return [name for name, parameter, value in self.resting if bool((local(parameter) != value).any())]


def find_locks(blocks: Blocks, outputs: Sequence[str] | None = None, *, resting: bool = True) -> list[Lock]:
    """The lock of every block; without `resting` one that holds weights as they are (freeze).

    Args:
        blocks: the model's stack of layers.
        outputs: modules or parameters that write to the residual stream, by their path within a
            block, where the architecture is not known (e.g. ["attn.proj", "mlp.fc2"]).

    Raises:
        UnsupportedError: a block in which no output projection is known, or a named one is missing.
    """
    found = []
    for i, block in enumerate(blocks.modules):
        at_rest = [] if not resting else _named(block, outputs, i) if outputs else _known(block, i)
        found.append(Lock(i, block, dict(block.named_parameters()), tuple(at_rest)))
    return found


def check_shared(locks: Sequence[Lock], model: nn.Module, phases: Iterable[frozenset[int]]) -> None:
    """Raises UnsupportedError where a block would be locked while something that shares its weights trains.

    Args:
        phases: indices of the locked blocks of each phase.
    """
    owners: dict[int, set[int | None]] = {}
    blocks = {id(lock.block): lock.index for lock in locks}

    def walk(module: nn.Module, owner: int | None) -> None:
        owner = blocks.get(id(module), owner)
        # Not named_parameters, which lists a tied weight once: here every owner counts.
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_place(parameter), set()).add(owner)
        for child in module._modules.values():
            if child is not None:
                walk(child, owner)

    walk(model, None)
    named = {_place(p): (lock.index, n) for lock in locks for n, p in lock.parameters.items()}
    for locked in phases:
        for place, sharing in owners.items():
            inside, outside = sharing & locked, sharing - locked
            if inside and outside:
                others = [f"block {i}" for i in sorted(i for i in outside if i is not None)] or ["what is in no block"]
                raise UnsupportedError(
                    f"block {min(i for i in inside if i is not None)} would be locked while it shares "
                    f"{named[place][1]} with {others[0]}, which trains",
                    hint="let blocks that share weights join in one phase, or train without a schedule",
                )


def _place(parameter: Tensor) -> int:
    """Where a parameter's values are in memory: tied ones share it, whether or not they are one object."""
    values = local(parameter)
    # Tensors without values here (an empty shard, meta) all have the same address.
    return values.data_ptr() if values.numel() and not values.is_meta else id(parameter)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself."""
    value = tensor.detach()
    return value.to_local() if hasattr(value, "to_local") else value


def _named(block: nn.Module, outputs: Sequence[str], index: int) -> list[tuple[str, nn.Parameter, float]]:
    found = []
    for path in outputs:
        inside = [(n, p, 0.0) for n, p in block.named_parameters() if n == path or n.startswith(f"{path}.")]
        if not inside:
            raise UnsupportedError(
                f"block {index} has no parameter under {path!r}",
                hint=f"its parameters are: {', '.join(n for n, _ in block.named_parameters())}"[:300],
            )
        found += inside
    return found


def _known(block: nn.Module, index: int) -> list[tuple[str, nn.Parameter, float]]:
    children = dict(block.named_children())
    for pair in POST_NORMS:
        if all(name in children for name in pair):
            return [(f"{name}.{n}", p, rest) for name in pair for n, p, rest in _gain(children[name])]
    found = [(n, p, 0.0) for n, p in block.named_parameters() if _OUTPUT.search(n)]
    # A bias alone makes no identity.
    if not any(p.dim() >= 2 for _, p, _ in found):
        raise UnsupportedError(
            f"no output projection is known in block {index}, a {type(block).__name__}",
            hint="name the modules that write to its residual stream: outputs=['attn.proj', 'mlp.fc2']",
        )
    return found


def _gain(norm: nn.Module) -> list[tuple[str, nn.Parameter, float]]:
    """A norm's parameters with the value at which its output is 0: 0, or -1 where the gain is 1 + weight."""
    names = [n for n, _ in norm.named_parameters(recurse=False)]
    shape = next(iter(norm.parameters())).shape
    for value in (0.0, -1.0):
        twin = copy.copy(norm)
        # Plain tensors in place of the parameters, which may be sharded: the module's own arithmetic decides.
        twin._parameters = dict.fromkeys(names)
        for n in names:
            object.__setattr__(twin, n, torch.full(shape, 0.0 if n == "bias" else value))
        # Not a constant input, for which a LayerNorm gives 0 whatever its gain is.
        if not bool(twin.forward(torch.linspace(-1, 1, shape[-1])[None]).any()):
            return [(n, p, 0.0 if n == "bias" else value) for n, p in norm.named_parameters(recurse=False)]
    raise UnsupportedError(
        f"no weight of {type(norm).__name__} makes its output 0", hint="name what to zero instead: outputs=[...]"
    )
