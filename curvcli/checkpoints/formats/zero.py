"""DeepSpeed's ZeRO files put together parameter by parameter: partitions of all ranks, or a universal checkpoint.

Of files that are large against the memory that is free, only what is asked for is in memory: they are mapped
(`files.safe.load_pickle`), and parameters are put together one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from curvcli.errors import InputError, UnsupportedError
from curvcli.files.foreign import Foreign
from curvcli.files.limits import inside
from curvcli.files.safe import load_pickle

# Flat groups of parameters as the model's file lists them: shape by name, in the order in which they are laid out.
Shapes = Sequence[Mapping[str, tuple[int, ...]]]
Piece = tuple[int, int, int]  # rank, start and length in its cut

WEIGHTS = "fp32"
_KINDS = {"optim": "optimizer", "model": "model"}
_AGAIN = "the save did not finish, or files of another save lie beside it: copy all ranks' files of one save"


class Source(Protocol):
    """Where the float32 weights and the optimizer's state are. `head` is what is not a parameter's."""

    head: dict[str, Any]

    @property
    def options(self) -> list[dict[str, Any]]:
        """The optimizer's groups; "params" holds the numbers of their flat groups."""
        ...

    def kinds(self, group: int) -> list[str]:
        """State tensors of a flat group's parameters."""
        ...

    def step(self, group: int) -> Any:
        """Steps that the optimizer counted, or None."""
        ...

    def gather(self, group: int, name: str, kind: str) -> Tensor:
        """A state tensor of a parameter, or its weights (kind "fp32"), whole and in its shape. Raises InputError."""
        ...


class Lazy(Mapping[str, Any]):
    """Values by name, made anew at every look-up."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Any]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def rank_files(tag: Path, kind: Literal["optim", "model"] = "optim") -> list[Path]:
    """The ranks' files of optimizer or model in the order of their numbers. Raises InputError where one is missing."""
    found: dict[int, Path] = {}
    for file in sorted(tag.glob(f"*zero_pp_rank_*_{kind}_states.pt")):
        match = re.fullmatch(rf"(?:bf16_)?zero_pp_rank_(\d{{1,9}})_mp_rank_\d+_{kind}_states\.pt", file.name)
        if match is None or int(match[1]) in found:
            raise InputError(f"{file} is a second file of its rank, or of none", hint=_AGAIN)
        found[int(match[1])] = file
    missing = next((rank for rank in range(len(found)) if rank not in found), None)
    if missing is not None:
        raise InputError(f"{tag} has no {_KINDS[kind]} file of rank {missing}, and one of rank {max(found)}", hint=_AGAIN)
    return [found[rank] for rank in range(len(found))]


class Partitions:
    """ZeRO 1, 2 and 3: every flat group is cut between the ranks.

    Stages 1 and 2 cut the group as a whole, and each rank's file says which parameters its cut holds (older versions do
    not, and the order in the model's file says it). Stage 3 cuts every parameter by itself, padded to equal parts.
    """

    def __init__(self, tag: Path, shapes: Shapes) -> None:
        self.path, self.shapes, self.files = tag, shapes, rank_files(tag)
        self.head = _state(load_pickle(self.files[0], meta=True), self.files[0])
        self.whole = "fp32_flat_groups" in self.head  # each parameter cut by itself: stage 3
        counts = self.head.get("partition_count")
        counts = counts if isinstance(counts, list) else [counts]
        if len(set(map(repr, counts))) > 1 or self.head.get("ds_zero_partition_groups"):
            raise UnsupportedError(
                f"{tag} cuts its parameter groups between different numbers of ranks, as experts are",
                hint="convert it with python -m deepspeed.checkpoint.ds_to_universal, or to transformers' format",
            )
        if counts[0] != len(self.files):
            raise InputError(f"{tag} was saved by {counts[0]} ranks and has files of {len(self.files)}", hint=_AGAIN)
        inner = self.head.get("optimizer_state_dict" if self.whole else "base_optimizer_state")
        if isinstance(inner, list):
            raise UnsupportedError(
                f"{tag} is an elastic checkpoint, which does not hold the optimizer's settings",
                hint="convert it with python -m deepspeed.checkpoint.ds_to_universal",
            )
        self._check_groups()

    @property
    def options(self) -> list[dict[str, Any]]:
        """Hyperparameters of each group."""
        return _options(self._inner(0), self.files[0])

    def kinds(self, group: int) -> list[str]:
        """Names of the state tensors that the group's parameters have."""
        inner = self.head.get("optimizer_state_dict" if self.whole else "base_optimizer_state")
        return [k for k, v in _entry(inner, group).items() if isinstance(v, Tensor) and v.dim()]

    def step(self, group: int) -> Any:
        """Steps that the group has taken, the same on all ranks. Raises InputError."""
        return _step(self._inner(0), group, self.options, self._ranks[0])

    def gather(self, group: int, name: str, kind: str) -> Tensor:
        """A parameter's tensor in its own shape, from all ranks' pieces. Raises InputError."""
        shape = self.shapes[group][name]
        pieces = self._pieces[group, name]
        parts = [self._flat(rank, group, kind)[start : start + numel] for rank, start, numel in pieces]
        # A parameter that goes over the end of a rank's cut goes on where the next begins: nothing else is of one save.
        for (rank, start, length), (_, following, _) in pairwise([] if self.whole else pieces):
            if following or start + length < self._flat(rank, group, kind).numel():
                raise self._wrong(f"the pieces of {name} on its ranks do not meet")
        held, numel = sum(p.numel() for p in parts), prod(shape)
        # Stage 3 pads to equal parts, by less than a value a rank.
        if not numel <= held < numel + (len(self.files) if self.whole else 1):
            raise self._wrong(f"its files hold {held:,} values of {name}, which has {numel:,}")
        return torch.cat(parts)[:numel].view(shape) if parts else torch.empty(shape)

    @cached_property
    def _ranks(self) -> list[dict[str, Any]]:
        found = [_state(load_pickle(file), file) for file in self.files]
        for group in range(len(self.shapes)):
            counts = [self._count(document, file, group) for document, file in zip(found, self.files, strict=True)]
            if len(set(counts)) > 1:  # nothing else tells one rank's file of another save
                raise self._wrong(f"its ranks counted {', '.join(counts)[:100]} steps")
        return found

    def _count(self, document: dict[str, Any], file: Path, group: int) -> str:
        """Steps of a flat group as one rank counted them, comparable."""
        inner = self._inner_of(document, file)
        return _comparable(_step(inner, group, _options(inner, file), document))

    def _inner(self, rank: int) -> dict[str, Any]:
        return self._inner_of(self._ranks[rank], self.files[rank])

    def _inner_of(self, document: dict[str, Any], file: Path) -> dict[str, Any]:
        inner = document.get("optimizer_state_dict" if self.whole else "base_optimizer_state")
        if not isinstance(inner, dict) or not isinstance(inner.get("state"), dict):
            raise InputError(f"{file} holds no optimizer state", hint=_AGAIN)
        return inner

    def _flat(self, rank: int, group: int, kind: str) -> Tensor:
        """A rank's cut of a flat group."""
        key = "fp32_flat_groups" if self.whole else "single_partition_of_fp32_groups"
        try:
            found = self._ranks[rank][key][group] if kind == WEIGHTS else self._inner(rank)["state"][group][kind]
        except (KeyError, IndexError, TypeError):
            found = None
        if not isinstance(found, Tensor) or found.dim() != 1:
            raise InputError(f"{self.files[rank]} has no {kind} of group {group}", hint=_AGAIN)
        if found.dtype != torch.float32:
            raise UnsupportedError(
                f"{self.files[rank]} keeps {kind} in {str(found.dtype).removeprefix('torch.')}, without float32 masters",
                hint="train with float32 master weights and moments (DeepSpeed's default)",
            )
        return found

    @cached_property
    def _pieces(self) -> dict[tuple[int, str], list[Piece]]:
        """By group and parameter: rank, start and length of its pieces in the ranks' cuts."""
        cut = self._each_cut if self.whole else self._group_cut
        said = {} if self.whole else self._said
        return {
            (group, name): pieces
            for group in range(len(self.shapes))
            for name, pieces in (said.get(group) or cut(group)).items()
        }

    @property
    def _said(self) -> dict[int, dict[str, list[Piece]]]:
        """What the ranks' files themselves say of their cuts (`param_slice_mappings`)."""
        found: dict[int, dict[str, list[Piece]]] = {}
        for rank, document in enumerate(self._ranks):
            mappings = document.get("param_slice_mappings")
            for group, mapping in enumerate(mappings if isinstance(mappings, list) else []):
                if not isinstance(mapping, dict) or group >= len(self.shapes):
                    raise self._wrong(f"{self.files[rank]} places parameters in a group {group}")
                places = found.setdefault(group, {name: [] for name in self.shapes[group]})
                for name, address in mapping.items():
                    said = address.attributes if isinstance(address, Foreign) else {}
                    start, numel = said.get("start"), said.get("numel")
                    if name not in places or not all(isinstance(n, int) and n >= 0 for n in (start, numel)):
                        raise self._wrong(f"{self.files[rank]} places {str(name)[:200]} at {said}")
                    places[name].append((rank, start, numel))  # type: ignore[arg-type]
        return found

    def _group_cut(self, group: int) -> dict[str, list[Piece]]:
        # All cuts are of one size; the last may lack its padding.
        size = max(self._flat(rank, group, WEIGHTS).numel() for rank in range(len(self.files)))
        try:
            paddings = [int(n) for n in self._ranks[0]["param_alignment_paddings"][group]]
        except (KeyError, IndexError, TypeError, ValueError):  # versions that align the group as a whole
            paddings = []
        found: dict[str, list[Piece]] = {}
        start = 0
        for index, (name, shape) in enumerate(self.shapes[group].items()):
            end = start + prod(shape)
            cuts = [(rank, max(start, rank * size), min(end, (rank + 1) * size)) for rank in range(len(self.files))]
            found[name] = [(rank, low - rank * size, high - low) for rank, low, high in cuts if low < high]
            start = end + (paddings[index] if index < len(paddings) else 0)
        return found

    def _each_cut(self, group: int) -> dict[str, list[Piece]]:
        world, start = len(self.files), 0
        found: dict[str, list[Piece]] = {}
        for name, shape in self.shapes[group].items():
            part = -(-prod(shape) // world)
            found[name] = [(rank, start, part) for rank in range(world)]
            start += part
        held = {self._flat(rank, group, WEIGHTS).numel() for rank in range(world)}
        if held != {start}:
            raise self._wrong(f"its ranks hold {sorted(held)} values of group {group}, whose parameters have {start:,} each")
        return found

    def _check_groups(self) -> None:
        flat = self.head.get("fp32_flat_groups" if self.whole else "single_partition_of_fp32_groups")
        if not isinstance(flat, list) or len(flat) != len(self.shapes):
            held = len(flat) if isinstance(flat, list) else "no"
            raise self._wrong(f"its optimizer has {held} groups of weights, its model {len(self.shapes)}")

    def _wrong(self, what: str) -> InputError:
        return InputError(f"{self.path} does not fit together: {what}", hint=_AGAIN)


class Universal:
    """What `ds_to_universal` writes: a directory for every parameter."""

    def __init__(self, tag: Path, shapes: Shapes) -> None:
        self.path, self.shapes = tag, shapes
        self._steps: dict[int, Any] = {}
        self._kinds: dict[int, list[str]] = {}
        file = tag / "zero" / "optimizer_state.pt"
        found = load_pickle(file)
        self.head: dict[str, Any] = found if isinstance(found, dict) else {}
        for group in shapes:
            for name in group:
                if not (self._directory(name) / f"{WEIGHTS}.pt").is_file():
                    raise InputError(f"{tag} has no weights of {name}", hint="the conversion did not finish: run it again")

    @property
    def options(self) -> list[dict[str, Any]]:
        """Hyperparameters of each group."""
        return _options(self.head, self.path / "zero" / "optimizer_state.pt")

    def kinds(self, group: int) -> list[str]:
        """Names of the state tensors that the group's parameters have."""
        if group not in self._kinds:
            # Of all parameters: one that lacks a file which others have is to be told of, not left out.
            found = {file.stem for name in self.shapes[group] for file in self._directory(name).glob("*.pt")}
            self._kinds[group] = sorted(found - {WEIGHTS, "step"})
        return self._kinds[group]

    def step(self, group: int) -> Any:
        """Steps that the group has taken, the same for all of its parameters. Raises InputError."""
        if group not in self._steps:
            self._steps[group] = self._step(group)
        return self._steps[group]

    def _step(self, group: int) -> Any:
        files = [self._directory(name) / "step.pt" for name in self.shapes[group]]
        counted = {file: load_pickle(file) for file in files if file.is_file()}
        if len({_comparable(count) for count in counted.values()}) > 1:
            raise InputError(
                f"{self.path} counts different steps for the parameters of one group: "
                f"{', '.join(sorted({_comparable(count) for count in counted.values()}))[:100]}",
                hint="files of two saves were mixed, or one is damaged: convert the checkpoint again",
            )
        if counted:
            return next(iter(counted.values()))
        # Of stage 3 the counts are with what was left of the optimizer; of fused optimizers, with the group.
        return _step(self.head.get("optimizer_state_dict"), group, self.options, self.head)

    def gather(self, group: int, name: str, kind: str) -> Tensor:
        """A parameter's tensor in its own shape, from its own file. Raises InputError."""
        file = self._directory(name) / f"{kind}.pt"
        found = load_pickle(file)
        found = found.get("param") if isinstance(found, dict) else found
        shape = tuple(self.shapes[group][name])
        # Converted from stage 3, parameters are stored flat.
        if not isinstance(found, Tensor) or tuple(found.shape) not in (shape, (prod(shape),)):
            held = tuple(found.shape) if isinstance(found, Tensor) else "no tensor"
            raise InputError(f"{file} holds {held}, the parameter has {shape}", hint="convert the checkpoint again")
        return found.detach().view(shape).float()

    def _directory(self, name: str) -> Path:
        return inside(self.path / "zero", name)


def _options(optimizer: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    found = optimizer.get("param_groups")
    if not isinstance(found, list) or not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in found):
        raise InputError(f"{file} does not hold the optimizer's settings (param_groups)", hint=_AGAIN)
    return found


def _entry(optimizer: Any, group: int) -> dict[str, Any]:
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    entry = state.get(group) if isinstance(state, dict) else None
    return entry if isinstance(entry, dict) else {}


def _step(optimizer: Any, group: int, options: list[dict[str, Any]], document: dict[str, Any]) -> Any:
    """Steps: with the state, or of fused optimizers with the group."""
    settings: dict[str, Any] = next((g for g in options if group in g["params"]), {})
    return _entry(optimizer, group).get("step", settings.get("step", document.get("base_optimizer_state_step")))


def _comparable(step: Any) -> str:
    return str(step.item() if isinstance(step, Tensor) and step.numel() == 1 else step)[:40]


def _state(document: Any, file: Path) -> dict[str, Any]:
    found = document.get("optimizer_state_dict") if isinstance(document, dict) else None
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no optimizer_state_dict", hint=_AGAIN)
    return found
