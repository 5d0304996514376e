"""Weights read straight into slices: no process that shares a model with others reads, or holds, all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.curvature.content import content
from curvcli.curvature.gathering import Weights
from curvcli.curvature.ranks import Ranks, alike
from curvcli.curvature.shards import Shards
from curvcli.errors import CurvError, InputError, exhausted
from curvcli.files.safe import first_line
from curvcli.files.tensors import Parts, TensorInfo
from curvcli.models.architecture import match

_patching = threading.Lock()  # the method is one for all threads


class WholeOnlyError(Exception):
    """Why weights cannot be read in parts; as a whole they may."""


@dataclass(frozen=True)
class Divisible:
    """Weights of which parts can be read, and the network that they are of.

    Args:
        build: a float32 model in evaluation mode, whose weights are still to be loaded.
        stored: the weights.
        tensors: them, by their headers.
        path: for messages.
    """

    build: Callable[[], nn.Module]
    stored: Parts
    tensors: tuple[TensorInfo, ...]
    path: object

    def divided(self, ranks: Ranks, device: torch.device) -> tuple[nn.Module, Weights]:
        """The model, whose parameters have no numbers, and what is held of them here. All processes call it alike.

        What a slice is compared with is read beside it: that of the next process, so that files that differ are seen.

        Raises:
            WholeOnlyError: the network cannot be built without its weights, or stored names and tensors are not the model's.
            InputError: a weight is NaN or infinite, or cannot be read.
            UsageError: processes read different files.
        """
        why, found = None, None
        try:
            found = self._matched()
        except WholeOnlyError as error:
            why = error
        if any(ranks.each(float(found is None))) or found is None:
            raise why or WholeOnlyError("another rank's weights do not fit the network")
        model, names = found
        own = model.state_dict(keep_vars=True)
        first = {id(p): n for n, p in model.named_parameters()}  # tied ones once
        shards = Shards(ranks, {n: p.shape for n, p in model.named_parameters() if p.is_meta})
        reading = _Reading(self.stored, shards, device)
        with torch.no_grad():
            for name, key in names.items():
                held = first.get(id(own[name]))
                if held in reading.parts:
                    continue
                if own[name].is_meta and held is not None:
                    reading.take(held, key, own[name].dtype)
                else:
                    own[name].copy_(self._whole(key))
        alike(ranks, "weights", reading.mine, reading.others)
        _placed(model, device)
        return model, Weights(model, ranks, reading.parts)

    def _matched(self) -> tuple[nn.Module, dict[str, str]]:
        """The model without its weights, and the stored name of each of its tensors."""
        try:
            with without_weights():
                model = self.build()
        except CurvError as error:
            raise WholeOnlyError(error.message) from error
        except Exception as error:  # whatever a network's own code raises where it finds no numbers
            if exhausted(error):
                raise
            raise WholeOnlyError(f"the network does not come without numbers: {first_line(error)}") from error
        try:
            names = match(model, {tensor.name: tensor for tensor in self.tensors}, self.path)
        except InputError as error:
            raise WholeOnlyError(error.message) from error
        own, members = model.state_dict(keep_vars=True), {id(t) for t in (*model.parameters(), *model.buffers())}
        for name, key in names.items():
            if id(own[name]) not in members:
                raise WholeOnlyError(f"{name} is none of the model's own tensors")
            if self.stored.shape(key) != tuple(own[name].shape):
                raise WholeOnlyError(
                    f"{key} has shape {self.stored.shape(key)}, the model's {name} {tuple(own[name].shape)}"
                )
        if any(b.is_meta for b in model.buffers()) or any(
            p.is_meta and not p.is_floating_point() for p in model.parameters()
        ):
            raise WholeOnlyError("a buffer of the network has no numbers")
        return model, names

    def _whole(self, key: str) -> Tensor:
        shape = self.stored.shape(key)
        return self.stored.entries(key, 0, prod(shape)).view(shape)


@dataclass
class _Reading:
    """Slices as they are read, and what they hold in a few words: those held here, and those that the next process holds."""

    stored: Parts
    shards: Shards
    device: torch.device
    parts: dict[str, Tensor] = field(default_factory=dict)
    mine: list[Any] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)

    def take(self, name: str, key: str, dtype: torch.dtype) -> None:
        ranks = self.shards.ranks
        found = self.stored.entries(key, *self.shards.bounds(name))
        if not bool(torch.isfinite(found).all()):
            raise InputError(
                f"weight {name} holds {int((~torch.isfinite(found)).sum())} NaN or inf in the slice of rank {ranks.rank}",
                hint="the run has already diverged or the file is damaged: use an earlier checkpoint",
            )
        self.parts[name] = found.to(self.device, dtype, copy=True)
        self.mine += content(found)
        del found
        self.others += content(self.stored.entries(key, *self.shards.bounds(name, (ranks.rank + 1) % ranks.world)))


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it a parameter that a module is given has its shape and no memory (it is on meta); buffers have theirs.

    So at most one tensor at a time is there, and filling it with random numbers costs nothing.
    """
    with _patching:
        registered: Any = nn.Module.register_parameter
        here = threading.get_ident()

        def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            registered(self, name, param)
            if param is not None and not param.is_meta and threading.get_ident() == here:
                empty = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
                vars(empty).update(vars(param))
                self._parameters[name] = empty

        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = registered  # type: ignore[method-assign]


def _placed(model: nn.Module, device: torch.device) -> None:
    """Parameters on meta become ones on the device that take the room of one number; what else there is goes there."""
    for parameter in model.parameters():
        if parameter.is_meta:
            nothing = torch.full((), float("nan"), dtype=parameter.dtype, device=device).expand(parameter.shape)
            new = nn.Parameter(nothing, requires_grad=parameter.requires_grad)
            vars(new).update(vars(parameter))
            torch.utils.swap_tensors(parameter, new)  # whoever knows it by identity still does
        else:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
