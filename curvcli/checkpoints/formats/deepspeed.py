"""DeepSpeed's checkpoints: ZeRO 1, 2, 3 and universal, alone, inside the Trainer's and inside Lightning's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.checkpoints.base import Checkpoint
from curvcli.checkpoints.clipping import Clipping, clipping, largest_norm
from curvcli.checkpoints.formats.dcp import NamedOptimizer, assemble
from curvcli.checkpoints.formats.huggingface import integer, run_log, trainer_state
from curvcli.checkpoints.formats.torchfile import named
from curvcli.checkpoints.formats.zero import WEIGHTS, Lazy, Partitions, Shapes, Source, Universal, rank_files
from curvcli.checkpoints.state.mapping import map_named, summary
from curvcli.errors import InputError, UnsupportedError
from curvcli.files.runs import step_order
from curvcli.files.safe import load_pickle
from curvcli.files.tensors import TensorInfo
from curvcli.models.base import Architecture
from curvcli.optimizers.base import OptimizerView

_MODEL = "*_model_states.pt"
_WHOLE = "gather the model on one rank (model.state_dict() with its optimizer's), or convert it to transformers' format"


class DeepSpeedReader:
    """A directory `global_stepN` of ranks' files, or one above it with `latest`: a run, checkpoint-N, a Lightning .ckpt."""

    def accepts(self, path: Path) -> bool:
        """Whether it is a DeepSpeed directory, or one that holds the newest."""
        # optimizer.pt is the Trainer's without DeepSpeed; a global_step beside it is left over from another run.
        return path.is_dir() and not (path / "optimizer.pt").exists() and _tag(path) is not None

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """Masters and moments of all ranks, put together as they are read. Raises InputError, UnsupportedError."""
        tag = _tag(path)
        if tag is None:
            raise InputError(f"{path} has no DeepSpeed checkpoint", hint="copy the directory that its file latest names")
        _refuse_parallel(tag)
        # The Trainer's log lies beside its global_stepN, whichever of the two directories was named.
        home = next((d for d in (path, tag.parent) if (d / "trainer_state.json").is_file()), path)
        log = trainer_state(home)
        model = _Model(tag)
        source = model.source
        optimizer = _zero_optimizer(model, source) if source else _plain_optimizer(model)
        clipped = _clipped(source, home, log)
        return assemble(
            path,
            architecture,
            format="deepspeed" if source else "deepspeed-0",
            tensors=model.tensors,
            weights=lambda: model.weights(source),
            optimizer=optimizer,
            step=integer(model.head, "global_steps"),
            log=run_log(log),
            notes=clipped.notes,
            clipping=clipped,
        )


def _tag(path: Path) -> Path | None:
    """The directory with the ranks' files: itself, the one that `latest` names, or the newest global_stepN in it."""
    if any(path.glob(_MODEL)):
        return path
    candidates = sorted(path.glob("global_step*"), key=step_order)
    try:
        with (path / "latest").open("rb") as stream:
            name = stream.read(256).decode().strip()  # a tag, however long the file is
    except (OSError, ValueError):
        name = ""
    # One name and no path, which could lead anywhere.
    if name and Path(name).name == name:
        candidates.append(path / name)
    return next((tag for tag in reversed(candidates) if tag.is_dir() and any(tag.glob(_MODEL))), None)


def _refuse_parallel(tag: Path) -> None:
    names = [entry.name for entry in tag.iterdir()]
    split = next((n for n in names if (m := re.search(r"mp_rank_(\d+)", n)) and int(m[1]) > 0), None)
    layered = next((n for n in names if re.match(r"layer_|expp_rank_", n)), None)
    if split or layered:
        raise UnsupportedError(
            f"{tag} was saved under tensor, pipeline or expert parallelism ({split or layered})", hint=_WHOLE
        )
    if "offloaded_tensors" in names:
        raise UnsupportedError(
            f"{tag} has its optimizer state in NVMe swap files (ZeRO-Infinity)", hint="save it with offload_optimizer to cpu"
        )


class _Model:
    """The file that says which parameters there are, with the weights that ZeRO does not partition."""

    def __init__(self, tag: Path) -> None:
        self.tag = tag
        # Stage 3 has one of every rank; they differ in the fragments of frozen weights alone.
        files = [tag / "mp_rank_00_model_states.pt", tag / "zero_pp_rank_0_mp_rank_00_model_states.pt"]
        self.file = next((file for file in files if file.is_file()), files[0])
        self.head = load_pickle(self.file, meta=True)
        if not isinstance(self.head, dict) or not isinstance(self.head.get("module"), dict):
            raise InputError(f"{self.file} holds no model of DeepSpeed's", hint="copy the file again")
        if integer(self.head, "mp_world_size") not in (None, 1):
            raise UnsupportedError(f"{tag} was saved under model parallelism", hint=_WHOLE)
        self.shapes: Shapes = [_sizes(group, self.file) for group in _list(self.head.get("param_shapes"))]
        self.owner = {name: index for index, group in enumerate(self.shapes) for name in group}
        self.frozen = _sizes(self.head.get("frozen_param_shapes") or {}, self.file)
        if sum(len(group) for group in self.shapes) != len(self.owner) or set(self.owner) & set(self.frozen):
            raise InputError(f"{self.file} lists a parameter twice", hint="copy the file again")

    @property
    def source(self) -> Source | None:
        """None for stage 0, where every rank has everything."""
        if any(self.tag.glob("*_optim_states.pt")):
            return Partitions(self.tag, self.shapes)
        if (self.tag / "zero" / "optimizer_state.pt").is_file():
            return Universal(self.tag, self.shapes)
        if self.shapes or self.head.get("optimizer") is None:
            raise InputError(
                f"{self.tag} has a model's file and no optimizer's of any rank",
                hint="copy the *_optim_states.pt of all ranks: they hold the float32 weights",
            )
        return None

    @property
    def stored(self) -> dict[str, Tensor]:
        """What the model's file alone holds: all weights at stage 0, those that are frozen at stage 1, and buffers.

        Not the second names of tied weights, which stand here in the precision of the forward pass.
        """
        shared = self.head.get("shared_params")
        elsewhere = {*self.owner, *self.frozen, *(shared if isinstance(shared, dict) else {})}
        module = self.head["module"]
        return {n: t for n, t in module.items() if isinstance(n, str) and isinstance(t, Tensor) and n not in elsewhere}

    @property
    def tensors(self) -> list[TensorInfo]:
        listed = {name: shape for group in (*self.shapes, self.frozen) for name, shape in group.items()}
        found = [TensorInfo(name, shape, "float32") for name, shape in listed.items()]
        found += [TensorInfo(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in self.stored.items()]
        return found

    def weights(self, source: Source | None) -> Mapping[str, Tensor]:
        document = load_pickle(self.file)
        # At stage 3 every rank's file has a piece of each frozen weight: read once for all of them.
        files = (rank_files(self.tag, "model") or [self.file]) if self.frozen else []
        fragments = {file: _fragments(document if file == self.file else load_pickle(file)) for file in files}

        def read(name: str) -> Tensor:
            if source is not None and name in self.owner:
                return source.gather(self.owner[name], name, WEIGHTS)
            if name in self.frozen:
                return self._frozen(name, fragments)
            return document["module"][name]  # type: ignore[no-any-return]

        return Lazy([tensor.name for tensor in self.tensors], read)

    def _frozen(self, name: str, fragments: Mapping[Path, Mapping[str, Any]]) -> Tensor:
        """A weight that no optimizer moves: whole in one file, or at stage 3 a piece of it in every rank's."""
        shape, parts = self.frozen[name], []
        for file, held in fragments.items():
            piece = held.get(name)
            if not isinstance(piece, Tensor):
                raise InputError(f"{file} has no piece of the frozen {name}", hint="copy all ranks' files of one save")
            parts.append(piece.flatten())
        whole = torch.cat(parts)
        if not prod(shape) <= whole.numel() < prod(shape) + len(parts):
            raise InputError(
                f"{self.tag} holds {whole.numel():,} values of the frozen {name}, which has {prod(shape):,}",
                hint="copy all ranks' files of one save",
            )
        return whole[: prod(shape)].view(shape)


def _fragments(document: Any) -> dict[str, Any]:
    """What one rank's file holds of the weights that no optimizer moves."""
    found = document.get("frozen_param_fragments") if isinstance(document, dict) else None
    return found if isinstance(found, dict) else {}


def _zero_optimizer(model: _Model, source: Source) -> NamedOptimizer:
    def document() -> dict[str, Any]:
        """Names and shapes as a torch optimizer's state_dict."""
        shapes = model.shapes
        placed = [i for group in source.options for i in group["params"]]
        # As text: what a damaged file numbers its groups by may be of kinds that do not sort together.
        if sorted(map(repr, placed)) != sorted(map(repr, range(len(shapes)))):
            raise InputError(
                f"{model.tag}: the optimizer's groups hold the flat groups {placed}, the model has {len(shapes)}",
                hint="copy all files of one save",
            )
        groups = [{**g, "params": [name for i in g["params"] for name in shapes[i]]} for g in source.options]
        state = {
            name: {key: torch.empty(shape, device="meta") for key in kinds} | {"step": None}
            for index, group in enumerate(shapes)
            if (kinds := source.kinds(index))
            for name, shape in group.items()
        }
        return {"state": state, "param_groups": groups}

    def entry(name: str) -> Lazy:
        group = model.owner[name]
        step = source.step(group)
        if not isinstance(step, (int, float)) and not (isinstance(step, Tensor) and step.numel() == 1):
            raise InputError(f"{model.tag} does not say how many steps its optimizer took", hint="save it again")
        return Lazy([*source.kinds(group), "step"], lambda key: step if key == "step" else source.gather(group, name, key))

    return NamedOptimizer(
        model.tag,
        lambda network, names: map_named(document(), network, names, path=model.tag, read=entry),
        lambda: summary(document(), model.tag),
    )


def _plain_optimizer(model: _Model) -> NamedOptimizer:
    """Stage 0 in float32: torch's own state_dict, by position."""
    head = model.head["optimizer"]
    if not isinstance(head, dict) or "param_groups" not in head:
        raise UnsupportedError(
            f"{model.tag} is of DeepSpeed without ZeRO in half precision, whose float32 weights have no names",
            hint="save with zero_optimization.stage 1",
        )

    def view(network: nn.Module, names: Mapping[str, str]) -> OptimizerView:
        return named(load_pickle(model.file)["optimizer"], list(model.stored), network, names, model.file)

    return NamedOptimizer(model.file, view, lambda: summary(head, model.file))


def _clipped(source: Source | None, home: Path, log: dict[str, Any] | None) -> Clipping:
    """By DeepSpeed's own limit, which is in force, and the norms that the Trainer logged, if it did."""
    limit = source.head.get("clip_grad") if source else None
    return clipping(home, log, largest_norm(limit))


def _sizes(group: Any, file: Path) -> dict[str, tuple[int, ...]]:
    fine = isinstance(group, dict) and all(
        isinstance(name, str) and isinstance(shape, torch.Size) and all(n >= 0 for n in shape) and prod(shape) < 2**48
        for name, shape in group.items()
    )
    if not fine:
        raise InputError(f"{file} has no shapes of its parameters", hint="copy the file again")
    return {name: tuple(shape) for name, shape in group.items()}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
