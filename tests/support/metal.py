"""A device that is the CPU and says that it is Apple's: no float64 on it, and no tensor of the CPU beside its own.

What its tensors are asked to do is done by the CPU, so that numbers can be held against the CPU's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

MPS = torch.device("mps", 0)
# These take tensors of two devices: they are what moves them.
_BETWEEN = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_IN_PLACE = {torch.ops.aten.squeeze_.dim, torch.ops.aten.unsqueeze_.default, torch.ops.aten.t_.default}


class Metal(Tensor):
    """A tensor on it."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Metal:
        if inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        found = Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=torch.device("meta")
        )
        found.held = inner.detach()
        return found

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Apple's: autograd in a build without it takes none but "meta" from a wrapper."""
        return MPS

    @property
    def data(self) -> Tensor:
        """Without a graph; can be set, which of a wrapper torch itself would do on the outside only."""
        return Metal(self.held)

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, Metal)
        self.held = value.held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Metal({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _done(func, args, kwargs or {})


def _done(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    here: dict[int, Metal] = {}
    plain: list[Tensor] = []

    def inside(value: Any) -> Any:
        if isinstance(value, Metal):
            here[id(value.held)] = value
            return value.held
        if isinstance(value, Tensor):
            plain.append(value)
        return value

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return here[id(value)] if id(value) in here else Metal(value)

    target = kwargs.get("device")
    moved = tree_map(inside, (args, {k: v for k, v in kwargs.items() if k != "device"}))
    if target is not None:
        moved[1]["device"] = torch.device("cpu")
    if here and func not in _BETWEEN and any(t.dim() for t in plain):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found mps and cpu, in {func}")
    found = func(*moved[0], **moved[1])
    if func in _IN_PLACE and here:
        with no_dispatch():  # the outside takes the new shape, too
            return func(*args, **kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    to = torch.device(target) if target is not None else MPS if here else torch.device("cpu")
    return tree_map(outside, found) if to.type in ("mps", "meta") else found


class _Factories(TorchDispatchMode):
    """Tensors that are made on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _done(func, args, kwargs or {})


@contextmanager
def metal() -> Iterator[None]:
    """Within it `device="mps"` works."""
    with _Factories():  # type: ignore[no-untyped-call]
        yield


def to_metal(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers on the device, tied ones once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                new = found.setdefault(id(parameter), nn.Parameter(Metal(parameter.detach()), parameter.requires_grad))
                module._parameters[name] = new
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = Metal(buffer)
    return model
