"""Weights that are gathered where they are used: those of one block at a time, forward and backward, and never all.

A function of torch that is called with a parameter has its block gathered first, and the one before it let go. What autograd
saves of a weight is its name, and the block is gathered again when the backward pass comes to it. Gradients are summed
and cut into slices block by block, as they are complete. So a network is run as it is written, as under fully_shard; unlike
there the processes say that they are well whenever they meet (docs/adr/0009-blocks-gathered-one-at-a-time.md).

All processes have to go through the network equally often: `Problem.shares` sees to that. A network that writes to its
weights is refused: gathered again they would be what they were before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from curvcli.curvature.shards import Shards
from curvcli.errors import UnsupportedError

# Attributes of a tensor that are views of its numbers, unlike the others; and functions that do not read these.
_VIEWS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data", "real", "imag")}
_SHAPES = {
    getattr(Tensor, name)
    for name in (
        "dim", "numel", "nelement", "size", "stride", "storage_offset", "element_size", "untyped_storage",
        "is_floating_point", "is_complex", "is_contiguous", "register_hook", "requires_grad_", "get_device", "__len__",
    )
} | {torch.autograd.grad, torch.autograd.backward}  # fmt: skip


@dataclass(frozen=True)
class _Use:
    """A weight as autograd saved it: what it is, in place of its numbers."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Streamed(TorchFunctionMode):
    """Parameters that have their numbers while something is computed with them.

    Args:
        parameters: of the model, by name. Between uses they have their shapes, and NaN.
        shards: who holds what of them.
        parts: what is held here of each.
        groups: names of those that are gathered together; each parameter is in one.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        shards: Shards,
        parts: Mapping[str, Tensor],
        groups: Sequence[Sequence[str]],
    ) -> None:
        super().__init__()
        self.parameters, self.shards, self.parts = parameters, shards, parts
        self.groups = [[n for n in group if n in parameters] for group in groups]
        self._names = {id(p): n for n, p in parameters.items()}
        self._group = {n: index for index, group in enumerate(self.groups) for n in group}
        self._here: set[int] = set()  # groups that are gathered
        self._stored: dict[int, str] = {}  # what is stored where, of these
        self._moves: dict[str, tuple[Tensor, float]] = {}
        self._whole: frozenset[str] = frozenset()  # kept as they are, for a trial
        self._depth = 0
        self._busy = False  # what is done here is not looked at
        self._look_at: Callable[[Tensor], object] = lambda tensor: None  # what autograd saves besides weights

    @property
    def largest(self) -> int:
        """Bytes of the largest group, gathered."""
        return max(sum(self.parameters[n].nbytes for n in group) for group in self.groups)

    def group_of(self, name: str) -> int:
        """Which group a parameter is in, a number."""
        return self._group[name]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within it parameters have their numbers where they are used; all processes have to do alike.

        Raises UnsupportedError where the network writes to them.
        """
        if self._depth:
            with self._deeper():
                yield
            return
        # A torch.autograd.Function is called past the mode: its module's parameters are there before.
        handle = register_module_forward_pre_hook(lambda module, inputs: self._want(list(module._parameters.values())))
        with self._deeper(), self, saved_tensors_hooks(self._pack, self._unpack):
            try:
                yield
                self._check(self._here)
            finally:
                handle.remove()
                self._release(self._here)

    @contextmanager
    def moved(self, names: Sequence[str], tangents: Sequence[Tensor], length: float) -> Iterator[None]:
        """Within it weights are `length` times a direction further on, of which the slices held here are given."""
        self._release(self._here)
        self._moves = {n: (tangent, length) for n, tangent in zip(names, tangents, strict=True)}
        try:
            yield
            self._check(self._here)
        finally:
            self._release(self._here)
            self._moves = {}

    @contextmanager
    def whole(self, names: Sequence[str]) -> Iterator[None]:
        """Within it some parameters are whole, and plain tensors that may be exchanged. All processes call it alike."""
        self._release(self._here)
        with self._quiet():
            found = self.shards.gather(names, [self.parts[n] for n in names])
            self._whole = frozenset(names)
            for name, tensor in zip(names, found, strict=True):
                self.parameters[name].data = tensor
        try:
            yield
        finally:
            self._release(self._here)
            self._empty(names)
            self._whole = frozenset()

    @contextmanager
    def watched(self, look: Callable[[Tensor], object]) -> Iterator[None]:
        """Within it `look` is called with what autograd saves besides weights."""
        before, self._look_at = self._look_at, look
        try:
            with self.on():
                yield
        finally:
            self._look_at = before

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function as it is, once what it is called with is there."""
        kwargs = kwargs or {}
        if not self._busy and _reads(function):
            self._want((args, tuple(kwargs.values())))
        return function(*args, **kwargs)

    def _want(self, value: Any) -> None:
        """Gathers the groups of the parameters in it, where they are not there."""
        used: set[int] = set()
        self._look(value, used)
        if used - self._here:
            self._bring(used)

    def _look(self, value: Any, found: set[int]) -> None:
        """Adds the groups of the parameters in what a function is called with."""
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            if name is not None and name not in self._whole:
                found.add(self._group[name])
        elif isinstance(value, (tuple, list)):
            for part in value:
                self._look(part, found)

    def _bring(self, groups: set[int]) -> None:
        """Gathers groups that are used together, and lets go of all others."""
        self._check(self._here - groups)
        self._release(self._here - groups)
        for index in sorted(groups - self._here):
            kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
            for name in self.groups[index]:
                if name not in self._whole:
                    kinds.setdefault((self.parts[name].dtype, self.parts[name].device), []).append(name)
            with self._quiet():
                # What is sent at once is of one type. Blocks are of one size: that all are at the same one has to be said.
                found = [self.shards.gather(those, [self._part(n) for n in those], index) for those in kinds.values()]
                # Not before all has come: what a failure left here would not be let go.
                for name, tensor in zip(chain(*kinds.values()), chain(*found), strict=True):
                    self.parameters[name].data = tensor
                    self._stored[tensor.untyped_storage().data_ptr()] = name
            self._here.add(index)

    def _part(self, name: str) -> Tensor:
        if name not in self._moves:
            return self.parts[name]
        tangent, length = self._moves[name]
        return self.parts[name].add(tangent, alpha=length)

    def _check(self, groups: set[int]) -> None:
        """That weights are what was gathered: each process looks at what it holds of them."""
        with self._quiet():
            for name in (n for index in sorted(groups) for n in self.groups[index] if n not in self._whole):
                begin, end = self.shards.bounds(name)
                found, part = self.parameters[name].detach().reshape(-1)[begin:end], self._part(name)
                # Those of a run that has diverged are NaN, which is no change.
                if not torch.equal(found, part) and not torch.allclose(found, part, rtol=0, atol=0, equal_nan=True):
                    raise UnsupportedError(
                        f"the network writes to its weight {name} while it runs: where blocks are gathered one at a time it "
                        "would be used as it was before",
                        hint="measure it with exact products, --mode fresh, or in one process",
                    )

    def _release(self, groups: set[int]) -> None:
        for index in sorted(groups):
            self._empty([n for n in self.groups[index] if n not in self._whole])
        self._here = self._here - groups

    def _empty(self, names: Sequence[str]) -> None:
        # By name: where the network has put another tensor there, the one that was gathered is to be forgotten.
        self._stored = {at: name for at, name in self._stored.items() if name not in names}
        with self._quiet():
            for name in names:
                parameter = self.parameters[name]
                parameter.data = parameter.new_full((), float("nan")).expand(parameter.shape)

    def _pack(self, tensor: Tensor) -> Tensor | _Use:
        # A view of another type (view_as_complex), or that is conjugated where it is read, is not told by size and strides.
        plain = tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()
        name = self._stored.get(tensor.untyped_storage().data_ptr()) if plain else None
        if name is None or tensor.dtype != self.parameters[name].dtype:
            self._look_at(tensor)
            return tensor
        return _Use(name, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _Use) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if self._group[saved.name] not in self._here:
            self._bring({self._group[saved.name]})
        return self.parameters[saved.name].data.as_strided(saved.size, saved.stride, saved.offset)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1


def _reads(function: Any) -> bool:
    """Whether a function of tensors reads their numbers."""
    return function in _VIEWS or (function not in _SHAPES and getattr(function, "__name__", "") != "__get__")
