"""Finding a model's layers."""

from __future__ import annotations

from collections import Counter

from torch import nn

from curvcli.curvature.problem import Blocks
from curvcli.errors import UnsupportedError


def find_blocks(model: nn.Module) -> Blocks | None:
    """The model's stack of layers, or None where it has none.

    From the root down, the outermost container whose children are numbered and mostly of one
    composite class is a stack. Stacks of transformers' checkpointable layers rank first, then by size.
    """
    stacks: list[tuple[tuple[bool, int], Blocks]] = []

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            if _is_stack(child):
                layered = all(_checkpointable(c) for c in child.children())
                rank = (layered, sum(p.numel() for p in child.parameters()))
                stacks.append((rank, Blocks(module, name, tuple(child.children()), display(where))))
            else:
                walk(child, where)

    walk(model, "")
    return max(stacks, key=lambda s: s[0])[1] if stacks else None


def locate(model: nn.Module, layers: nn.ModuleList | nn.Sequential) -> Blocks:
    """The given container as Blocks. Raises UnsupportedError where the model does not hold it."""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if child is layers:
                return Blocks(module, name, tuple(child.children()), display(f"{path}.{name}" if path else name))
    raise UnsupportedError(
        "the given layers are no ModuleList or Sequential inside the model", hint="pass e.g. model.layers"
    )


def display(name: str) -> str:
    """A module or parameter name without the prefixes of torch.compile and DistributedDataParallel."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    children = dict(module.named_children())
    if not children or not all(name.isdigit() for name in children) or not any(True for _ in module.parameters()):
        return False
    if all(_checkpointable(c) for c in children.values()):
        return True
    kind, count = Counter(type(c) for c in children.values()).most_common(1)[0]
    composite = any(type(c) is kind and any(True for _ in c.children()) for c in children.values())
    return composite and count * 2 >= len(children)


def _checkpointable(module: nn.Module) -> bool:
    # By name along the class's ancestry: importing transformers here would cost every user of the API a second.
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)
