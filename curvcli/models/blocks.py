"""Finding a model's layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.curvature.problem import Blocks, Problem
from curvcli.curvature.ranks import shared
from curvcli.errors import UnsupportedError, exhausted
from curvcli.files.names import unwrapped


def find_blocks(model: nn.Module) -> Blocks | None:
    """The model's stack of layers, or None where it has none."""
    return next(iter(stacks(model)), None)


def stacks(model: nn.Module) -> list[Blocks]:
    """All stacks of layers of a model, the one whose depth is measured first.

    From the root down, the outermost container whose children are numbered and mostly of one
    composite class is a stack. Stacks of transformers' checkpointable layers rank first, then by size.
    """
    found: list[tuple[tuple[bool, int], Blocks]] = []

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            # Not walked into: experts and parts of its layers are numbered containers too.
            if _is_stack(child):
                layered = all(_checkpointable(c) for c in child.children())
                rank = (layered, sum(p.numel() for p in child.parameters()))
                found.append((rank, Blocks(module, name, tuple(child.children()), unwrapped(where))))
            else:
                walk(child, where)

    walk(model, "")
    return [blocks for _, blocks in sorted(found, key=lambda pair: pair[0], reverse=True)]


def used_together(model: nn.Module) -> list[list[str]]:
    """Names of its parameters, those together that a forward pass uses together: of a block, or a module outside of all."""
    names, found = {id(p): n for n, p in model.named_parameters()}, list[list[str]]()
    blocks = [list(block.parameters()) for stack in stacks(model) for block in stack.modules]
    for parameters in [*blocks, *(list(module.parameters(recurse=False)) for module in model.modules())]:
        # Each once: what is tied goes with where it was found first.
        own = [names.pop(id(p)) for p in parameters if id(p) in names]
        if own:
            found.append(own)
    return found


def survey(problem: Problem, blocks: Blocks) -> tuple[Blocks, dict[str, str]]:
    """How the network can be cut short, and what a reader of its layers should know; a few forward passes.

    Returns:
        The blocks with `truncation` set, and notes by code: blocks used several times, other stacks, no truncated networks.
    """
    uses = Counter[int]()
    plain: set[bool] = set()

    def seen(index: int, arguments: tuple[Any, ...], output: Any) -> None:
        uses[index] += 1
        first = arguments[0] if arguments else None
        plain.add(isinstance(first, Tensor) and isinstance(output, Tensor) and first.shape == output.shape)

    def hook(index: int) -> Any:
        return lambda module, arguments, output: seen(index, arguments, output)

    runs = Counter[str]()
    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(blocks.modules)]
    handles.append(problem.model.register_forward_hook(lambda *_: runs.update(["model"])))
    try:
        with torch.no_grad():
            problem.batch_loss(0)
    finally:
        for handle in handles:
            handle.remove()
    # A block that gives anything but hidden states cannot be told from an identity by running: its caller may index.
    ways = [replace(blocks, truncation="list"), replace(blocks, truncation="identities" if plain == {True} else None)]
    # Not without any block alone: a loop over pairs of blocks runs with none, and with one it does not.
    tried = sorted({0, 1, len(blocks.modules) // 2})
    cut = next((way.truncation for way in ways if way.truncation and runs_at(problem, way, tried)), None)
    notes: dict[str, str] = {}
    # A loss of the user's may call the model more than once.
    passes = max(runs["model"], 1)
    if repeated := {i: n // passes for i, n in uses.items() if n // passes > 1}:
        index, times = next(iter(repeated.items()))
        notes["shared-layers"] = (
            f"{blocks.prefix}.{index} is used {times} times in a forward pass: its curvature is that of all uses "
            "together, and depths count it once"
        )
    others = [f"{b.prefix} ({len(b.modules)})" for b in stacks(problem.model) if b.prefix != blocks.prefix]
    if others:
        notes["other-stacks"] = (
            f"layers and depths are those of {blocks.prefix}; {', '.join(others)} count with embedding and head, whole "
            "at every depth"
        )
    if cut is None:
        notes |= no_truncation(blocks)
    return replace(blocks, truncation=cut), notes


def no_truncation(blocks: Blocks) -> dict[str, str]:
    """The note on a network that cannot be cut short, by its code."""
    message = f"the network does not run with fewer blocks in {blocks.prefix}: no truncated networks measured"
    return {"no-truncation": message}


def runs_at(problem: Problem, blocks: Blocks, depths: Iterable[int]) -> bool:
    """Whether the network gives a loss with so many of its blocks alone, at each of these depths; a forward pass each."""
    try:
        with torch.no_grad():
            for depth in depths:
                problem.truncated(blocks, depth).batch_loss(0)
    except Exception as error:  # whatever a model's own code raises
        if exhausted(error) or shared(error):  # what another process says is nothing of the network's
            raise
        return False
    return True


def locate(model: nn.Module, layers: nn.ModuleList | nn.ModuleDict | nn.Sequential) -> Blocks:
    """The given container as Blocks. Raises UnsupportedError where the model does not hold it."""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if child is layers:
                return Blocks(module, name, tuple(child.children()), unwrapped(f"{path}.{name}" if path else name))
    raise UnsupportedError(
        "the given layers are no ModuleList, ModuleDict or Sequential inside the model", hint="pass e.g. model.layers"
    )


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return False
    children = dict(module.named_children())
    if not children or not all(name.isdigit() for name in children) or not any(True for _ in module.parameters()):
        return False
    if all(_checkpointable(c) for c in children.values()):
        return True
    # Mostly, not all: hybrids mix kinds of layers. Composite, as a Sequential of Linears is a layer's inside and no stack.
    kind, count = Counter(type(c) for c in children.values()).most_common(1)[0]
    composite = any(type(c) is kind and any(True for _ in c.children()) for c in children.values())
    return composite and count * 2 >= len(children)


def _checkpointable(module: nn.Module) -> bool:
    # By name along the class's ancestry: importing transformers here would cost every user of the API a second.
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)
