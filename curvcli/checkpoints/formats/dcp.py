"""Checkpoints of torch.distributed.checkpoint: nested, flattened, torchtitan's step-N."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.checkpoints.base import UNNAMED, Checkpoint, Logged, OptimizerFile
from curvcli.checkpoints.clipping import Clipping
from curvcli.checkpoints.formats.beside import averaged_weights, averages_of, merged, of_another, unread
from curvcli.checkpoints.formats.dcp_files import METADATA, Entry, Lazy, read_metadata
from curvcli.checkpoints.state.mapping import map_named, map_state, matrix_order, single_order, summary, trainer_order
from curvcli.errors import InputError
from curvcli.files.names import averaged
from curvcli.files.runs import step_order
from curvcli.files.tensors import Parts, TensorInfo
from curvcli.models.architecture import beside, fill, match, needed
from curvcli.models.base import Architecture
from curvcli.models.slices import Divisible
from curvcli.optimizers.base import OptimizerView

# What people call the part of a saved state that holds the weights; torchtitan and others save them at the top.
_MODELS = ("model", "state_dict", "module")
_STEPS = ("step", "global_step")
_OPTIMIZER = ("state", "param_groups")

Prefix = tuple[str, ...]
Entries = Mapping[str, Entry]


class DCPReader:
    """A directory with `.metadata` and `.distcp` files, saved by one rank or many, read in one process."""

    def accepts(self, path: Path) -> bool:
        """Whether it is a directory with `.metadata`."""
        return (path / METADATA).is_file()

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """The checkpoint that `.metadata` describes. Raises InputError, UnsupportedError."""
        saved = Saved.of(path)
        return assemble(
            path,
            architecture,
            format="dcp",
            tensors=saved.weight_infos,
            weights=lambda: Lazy(saved.weights),
            optimizer=saved.optimizer,
            step=saved.step,
            part=".".join(saved.place),
            aside=saved.aside,
            parts=lambda: Lazy(saved.weights),
        )


@dataclass(frozen=True)
class NamedOptimizer:
    """Optimizer state whose names go with those of the weights: `view` takes the model and `match`'s names."""

    path: Path
    view: Callable[[nn.Module, Mapping[str, str]], OptimizerView]
    summary: Callable[[], dict[str, object]]


def assemble(
    path: Path,
    architecture: Architecture | None,
    *,
    format: str,  # noqa: A002 - as Checkpoint calls it
    tensors: list[TensorInfo],
    weights: Callable[[], Mapping[str, Tensor]],
    optimizer: NamedOptimizer | None,
    step: int | None,
    log: tuple[Logged, ...] = (),
    notes: Mapping[str, str] | None = None,
    clipping: Clipping | None = None,
    part: str = "",
    aside: Sequence[str] = (),
    parts: Callable[[], Parts] | None = None,
) -> Checkpoint:
    """A checkpoint of weights by name. What is stored can be listed without a network; a model needs one.

    Args:
        part: under which the weights lie in the checkpoint.
        aside: further parts, which hold averages of them.
        clipping: as the checkpoint has it.
        parts: the same weights, where a part of one can be read without the rest.
    """
    found = architecture or beside(path)
    said, findings = dict(notes or {}), []
    # Where averages lie aside, a directory called after them is named for those and not for the weights.
    average, among = averages_of((tensor.name for tensor in tensors), part, *([] if aside else [path.stem]))
    aside = [*aside, *([among] if among else [])]
    if aside and not average:
        said["averaged-weights"] = (
            f"the checkpoint also has an average of the weights ({', '.join(aside)[:200]}); measured are those that the "
            f"optimizer moved{f', {part}' if part else ''}"
        )
    if average:
        findings.append(averaged_weights(part or path.name))
    if optimizer is None:
        findings += unread(path)

    def model() -> nn.Module:
        built = needed(found, path).build()
        fill(built, weights(), path)
        return built

    names = {tensor.name: tensor for tensor in tensors}
    state = (
        OptimizerFile(optimizer.path, lambda model: optimizer.view(model, match(model, names, path)), optimizer.summary)
        if optimizer
        else None
    )
    if state and average:
        state = of_another(state.path, part or path.name)
    return Checkpoint(
        path=path,
        format=format,
        architecture=found.name if found else UNNAMED,
        tensors=tuple(tensors),
        model=model,
        optimizer=state,
        step=step,
        vocabulary=found.vocabulary if found else None,
        context=found.context if found else None,
        task=found.task if found else "causal-lm",
        log=log,
        tokenizer=found.tokenizer if found else None,
        notes=said,
        clipping=clipping or Clipping(),
        findings=tuple(findings),
        divisible=None if parts is None else lambda: Divisible(needed(found, path).build, parts(), tuple(tensors), path),
    )


@dataclass(frozen=True)
class Saved:
    """The entries of a checkpoint by what they are.

    Attributes:
        tensors: outside any optimizer, by where they were and by name.
        optimizers: by where they were.
    """

    path: Path
    tensors: Mapping[Prefix, Entries]
    optimizers: Mapping[str, Stored]

    @classmethod
    def of(cls, path: Path) -> Saved:
        """Raises InputError."""
        tensors: dict[Prefix, dict[str, Entry]] = {}
        optimizers: dict[Prefix, dict[str, dict[str, dict[str, Entry]]]] = {}
        for entry in read_metadata(path):
            place = _place(entry.path)
            if place is not None:
                prefix, kind, owner, key = place
                optimizers.setdefault(prefix, {k: {} for k in _OPTIMIZER})[kind].setdefault(owner, {})[key] = entry
            elif entry.shape is not None or entry.path[-1] in _STEPS:
                tensors.setdefault(entry.path[:-1], {})[entry.path[-1]] = entry
        # Other saved parts have a "state" too (schedulers, data loaders); an optimizer's has groups beside it.
        found = {
            ".".join(prefix) or "top level": Stored(path, *(parts[kind] for kind in _OPTIMIZER))
            for prefix, parts in optimizers.items()
            if parts["param_groups"]
        }
        return cls(path, tensors, found)

    @property
    def weights(self) -> Entries:
        """The model's tensors by name. Raises InputError where it is not clear which they are."""
        return self._places[self.place]

    @property
    def aside(self) -> list[str]:
        """Where averages of the weights are."""
        return [".".join(p) for p in self._places if p != self.place and any(averaged(part) for part in p)]

    @property
    def place(self) -> Prefix:
        """Where the model's tensors are. Raises InputError."""
        found = self._places
        apart = [p for p in found if not any(averaged(part) for part in p)] or list(found)
        # Under a name that says so; else at the top, as torchtitan has it; else wherever there is but one.
        named = [p for p in apart if p and p[-1] in _MODELS] or [p for p in apart if not p] or apart
        if len(named) != 1:
            places = ", ".join(".".join(prefix) for prefix in named)
            raise InputError(
                f"{self.path} has {f'weights in several places ({places})' if named else 'no weights'}",
                hint='save {"model": ..., "optimizer": ...} with torch.distributed.checkpoint',
            )
        return named[0]

    @property
    def _places(self) -> dict[Prefix, Entries]:
        """Tensors by where they are; counts of steps are none."""
        found = {
            prefix: {name: e for name, e in entries.items() if e.shape is not None and not (name in _STEPS and not e.shape)}
            for prefix, entries in self.tensors.items()
        }
        return {prefix: entries for prefix, entries in found.items() if entries}

    @property
    def weight_infos(self) -> list[TensorInfo]:
        """Name, shape and type of each weight, from `.metadata` alone."""
        return [TensorInfo(name, e.shape or (), str(e.dtype).removeprefix("torch.")) for name, e in self.weights.items()]

    @property
    def optimizer(self) -> NamedOptimizer | None:
        """The optimizer's state by name, not yet read; None where none was saved."""
        return NamedOptimizer(self.path, self.view, self.summary) if self.optimizers else None

    @property
    def step(self) -> int | None:
        """Steps taken: as the optimizer counted, as the trainer did, or as the directory's name says."""
        # Of one parameter: each is a read of its own, and uneven counts are a matter of the mapped state.
        states = [entries for part in self.optimizers.values() for entries in part.state.values()]
        counted = [entries["step"] for entries in states if "step" in entries][:1]
        counted += [e for entries in self.tensors.values() for name, e in entries.items() if name in _STEPS]
        for entry in counted:
            value = _plain(entry.read())
            if isinstance(value, (int, float)) and value == value // 1 >= 0:  # false for NaN, infinity and fractions
                return int(value)
        named = step_order(self.path)[0]
        return named if named >= 0 else None

    def view(self, model: nn.Module, names: Mapping[str, str]) -> OptimizerView:
        """The state by the model's names, of Muon and Adam beside each other as one. Raises InputError, UnsupportedError."""
        document = merged({where: part.document() for where, part in self.optimizers.items()}, self.path)
        if all(isinstance(p, int) for group in document["param_groups"] for p in group["params"]):
            orders = (trainer_order, matrix_order, single_order)
            return map_state(document, model, orders, path=self.path, partial=True)
        state = {owner: entries for part in self.optimizers.values() for owner, entries in part.state.items()}
        return map_named(document, model, names, path=self.path, read=lambda owner: Lazy(state[owner]))

    def summary(self) -> dict[str, object]:
        """For people, as `mapping.summary`; of several optimizers how many they are."""
        parts = list(self.optimizers.values())
        return parts[0].summary() if len(parts) == 1 else {"optimizers": len(parts)}


@dataclass(frozen=True)
class Stored:
    """An optimizer's entries.

    Attributes:
        state: by parameter.
        groups: hyperparameters by group, or by parameter where it was saved flattened.
    """

    path: Path
    state: Mapping[str, Entries]
    groups: Mapping[str, Entries]

    @property
    def flattened(self) -> bool:
        """Whether hyperparameters are stored by parameter (StateDictOptions.flatten_optimizer_state_dict)."""
        return not any("params" in options for options in self.groups.values())

    def document(self) -> dict[str, Any]:
        """A torch optimizer's state_dict, with shapes for tensors where it is keyed by name. Raises InputError."""
        groups = self._groups()
        if all(isinstance(p, int) for group in groups for p in group["params"]):
            # torch's own state_dict, saved as it is: keyed by position, which was turned into a string.
            state: dict[Any, Any] = {int(o) if o.isdigit() else o: dict(Lazy(e)) for o, e in self.state.items()}
        else:
            state = {owner: _shapes(entries) for owner, entries in self.state.items()}
        return {"param_groups": groups, "state": state}

    def summary(self) -> dict[str, object]:
        """For people, as `mapping.summary`; of a flattened optimizer one parameter's hyperparameters are read, not all."""
        some = dict([*self.groups.items()][:1]) if self.flattened else self.groups
        document = {
            "state": {owner: _shapes(entries) for owner, entries in self.state.items()},
            "param_groups": [{"params": [], **_read(options)} for options in some.values()],
        }
        found = summary(document, self.path)
        return {key: value for key, value in found.items() if not (self.flattened and key == "groups")}

    def _groups(self) -> list[dict[str, Any]]:
        if not self.flattened:
            order = sorted(self.groups, key=lambda index: (len(index), index))  # numbers as text: 10 after 9
            groups = [_read(self.groups[index]) for index in order]
        else:
            # Flattened, options stand by each parameter and nothing says which group it was in: equal options are one.
            merged: dict[str, dict[str, Any]] = {}
            for owner, entries in self.groups.items():
                options = _read(entries)
                merged.setdefault(repr(sorted(options.items())), {**options, "params": []})["params"].append(owner)
            groups = list(merged.values())
        if not all(isinstance(group.get("params"), list) for group in groups):
            raise InputError(f"{self.path}: an optimizer group has no list of parameters", hint="save the checkpoint again")
        return groups


def _place(path: tuple[str, ...]) -> tuple[Prefix, str, str, str] | None:
    """Where the optimizer lies that an entry belongs to, "state" or "param_groups", parameter or group, and key."""
    # Nested: "optimizer", "state", the parameter, the key are parts of a path.
    for i, part in enumerate(path[:-2]):
        if part in _OPTIMIZER:
            return path[:i], part, path[i + 1], ".".join(path[i + 2 :])
    for kind in _OPTIMIZER:  # flattened: "state.<parameter>.<key>" is one name, and a parameter's has dots of its own
        if path[-1].startswith(f"{kind}."):
            owner, _, key = path[-1].removeprefix(f"{kind}.").rpartition(".")
            return (path[:-1], kind, owner, key) if owner else None
    return None


def _shapes(entries: Entries) -> dict[str, Tensor | None]:
    """Tensors without data in the place of those stored."""
    return {
        key: None if e.shape is None else torch.empty(e.shape, dtype=e.dtype, device="meta") for key, e in entries.items()
    }


def _read(entries: Entries) -> dict[str, Any]:
    return {key: _plain(entry.read()) for key, entry in entries.items()}


def _plain(value: object) -> object:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
