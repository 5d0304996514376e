"""Measuring leaves no trace in a model: what a forward pass writes into modules is put back, and hooks are still."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL = tuple(f"_global{name}" for name in _HOOKS)
_SHARDING = "torch.distributed."  # whose hooks gather and free shards: of the copies that are measured there are none
# Their hooks are part of the function: weight norm, pruning, router logits that are collected on the way.
_LIBRARIES = ("torch.nn.utils.", "transformers.", "peft.", "accelerate.")


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers and attributes of every module are as they were: running statistics, counters, modes, caches.

    Of an attribute that is a list, dict, set or deque the members are put back, and not what is within them.
    """
    saved = [_Saved(module) for module in model.modules()]
    try:
        yield
    finally:
        for module in saved:
            module.restore()


@contextmanager
def undrawn(devices: Iterable[torch.device]) -> Iterator[None]:
    """Afterwards torch's random numbers, of the CPU and of these devices, go on as if none had been drawn."""
    used = set(devices)
    # fork_rng keeps the state of the CPU and of CUDA, not of MPS.
    metal = torch.mps.get_rng_state() if any(device.type == "mps" for device in used) else None
    with torch.random.fork_rng(devices=sorted({device.index or 0 for device in used if device.type == "cuda"})):
        try:
            yield
        finally:
            if metal is not None:
                torch.mps.set_rng_state(metal)


@contextmanager
def hushed(model: nn.Module) -> Iterator[list[str]]:
    """Within it no hook of a user fires: on modules, on all modules, or on the parameters' gradients.

    Hooks that a module registered on itself, those of the libraries that build on them, and those of an object that says so
    (`part_of_model`) are part of the model. Those that shard it (fully_shard) are still, too.

    Yields:
        Names of modules with a forward hook of a user that is still: one that changes what its module gives is not measured.
    """
    saved: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    names: list[str] = []

    def hush(hooks: dict[Any, Any] | None, own: Callable[[Any], bool] = lambda hook: False) -> bool:
        foreign = [key for key, hook in (hooks or {}).items() if not own(hook)]
        if hooks is None or not foreign:
            return False
        hooks_before = dict(hooks)
        saved.append((hooks, hooks_before))
        # In place, since modules and compiled code hold on to this dictionary.
        for key in foreign:
            del hooks[key]
        return any(not _home(hooks_before[key]).startswith(_SHARDING) for key in foreign)

    try:
        for attribute in _GLOBAL:
            if hush(getattr(everywhere, attribute)) and "forward" in attribute and not names:
                names.append("all modules")
        for name, module in model.named_modules():
            found = [hush(getattr(module, attribute), _belongs_to(module)) for attribute in _HOOKS]
            # The first two of _HOOKS are the forward kinds, which alone change what a module returns.
            if any(found[:2]):
                names.append(name or type(module).__name__)
        for parameter in model.parameters():
            hush(parameter._backward_hooks)
        yield names
    finally:
        for hooks, before in saved:
            # Refilled as a whole: hooks fire in the order of the dictionary.
            hooks.clear()
            hooks.update(before)


def _belongs_to(module: nn.Module) -> Callable[[Any], bool]:
    def own(hook: Any) -> bool:
        function = getattr(hook, "func", hook)  # of a partial
        owner = getattr(function, "__self__", None)
        return owner is module or getattr(owner, "part_of_model", False) is True or _home(hook).startswith(_LIBRARIES)

    return own


def _home(hook: Any) -> str:
    """The module that a hook is from, with a dot behind it."""
    return f"{getattr(getattr(hook, 'func', hook), '__module__', '')}."


class _Saved:
    """One module's attributes, the members of its containers (buffers among them), and the tensors' values."""

    def __init__(self, module: nn.Module) -> None:
        self.attributes, self.before = vars(module), dict(vars(module))
        containers = [v for v in self.before.values() if isinstance(v, (dict, list, set, deque))]
        self.containers = [(v, dict(v) if isinstance(v, dict) else list(v)) for v in containers]
        # Values too, since running statistics are written in place; not of parameters, which no forward pass writes.
        tensors = [*module._buffers.values(), *self.before.values()]
        self.tensors = [(t.detach(), t.detach().clone()) for t in tensors if isinstance(t, Tensor)]

    def restore(self) -> None:
        # Only what has changed is written: compiled code watches these dictionaries.
        for name in [n for n in self.attributes if n not in self.before]:
            del self.attributes[name]
        for name, value in self.before.items():
            if name not in self.attributes or self.attributes[name] is not value:
                self.attributes[name] = value
        for container, members in self.containers:
            now, before = _objects(container), _objects(members)
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(members)
        with torch.no_grad():
            for tensor, value in self.tensors:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _objects(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)
