"""One file of torch.save that holds a model: nanoGPT's, Lightning's, or a training script's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from curvcli.checkpoints.base import Checkpoint
from curvcli.checkpoints.formats.beside import merged, optimizers_in
from curvcli.checkpoints.formats.dcp import NamedOptimizer, assemble
from curvcli.checkpoints.formats.nanogpt import NanoGPTReader
from curvcli.checkpoints.state.mapping import (
    by_name,
    check_document,
    map_named,
    map_state,
    matrix_order,
    single_order,
    summary,
    trainer_order,
)
from curvcli.errors import InputError
from curvcli.files.names import averaged
from curvcli.files.runs import step_of
from curvcli.files.safe import load_pickle
from curvcli.files.tensors import TensorInfo
from curvcli.models.base import Architecture
from curvcli.optimizers.base import OptimizerView

_WEIGHTS = ("model", "state_dict", "model_state_dict")
# Lightning's WeightAveraging and EMAWeightAveraging put the average in the place of state_dict.
_TRAINED = "current_model_state"
# What scripts call the number of optimizer steps; an epoch is no step.
_STEPS = ("global_step", "step", "iter_num", "iteration")
_LIGHTNING = "pytorch-lightning_version"


class TorchFileReader:
    """A .pt, .pth, .ckpt or .bin file; what it is, its content says."""

    def accepts(self, path: Path) -> bool:
        """Whether it is a file that torch.save may have written."""
        return path.is_file() and path.suffix in (".pt", ".pth", ".ckpt", ".bin")

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """Weights, optimizer and step of one file, under the usual names. Raises InputError."""
        head = load_pickle(path, meta=True)
        # With --model it is a file like any other: the user knows a network of these names.
        if architecture is None and isinstance(head, dict) and "model_args" in head:
            return NanoGPTReader().read(path, None)
        part, weights = _weights(head, path)
        whole = _whole(head)
        return assemble(
            path,
            architecture,
            format="composer" if whole is not head else "lightning" if _LIGHTNING in head else "torch",
            tensors=[TensorInfo(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in weights.items()],
            weights=lambda: _weights(load_pickle(path), path)[1],
            optimizer=_optimizer(whole, list(weights), path),
            step=_step(head, path),
            part=part,
            aside=[key for key in _averages(whole, part) if part],
        )


def _whole(document: Any) -> Any:
    """The document, or the part of Composer's that holds what others have at the top."""
    state = document.get("state") if isinstance(document, dict) else None
    return state if isinstance(state, dict) and isinstance(state.get("model"), dict) else document


def _averages(whole: Any, part: str) -> list[str]:
    """Keys of averages of the weights. Lightning keeps one as state_dict where it has current_model_state."""
    found = [str(k) for k, v in whole.items() if isinstance(v, (dict, list)) and v and k != part and averaged(str(k))]
    return [*found, *(["state_dict"] if part == _TRAINED else [])]


def _weights(document: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """The model's tensors by name, and the key of the part that has them; "" for the document itself."""
    whole = _whole(document) if isinstance(document, dict) else {}
    keys = [_TRAINED] if _TRAINED in whole else [key for key in _WEIGHTS if whole.get(key) is not None]
    # Last of all the average, where it is all that there is.
    keys = keys or [key for key in _WEIGHTS if key in whole and not _averages(whole, "")] or _averages(whole, "")
    if len(keys) > 1:
        raise InputError(f"{path} has weights under {' and '.join(keys)}", hint="save one model in a file")
    key = keys[0] if keys else ""
    found = whole[key] if keys else whole
    if not isinstance(found, dict):
        raise InputError(
            f"{path} holds {found!r:.200} under {key!r}, no weights by name", hint="save model.state_dict(), not the model"
        )
    # What modules save besides tensors (set_extra_state) is theirs alone.
    tensors = {name: t for name, t in found.items() if not str(name).endswith("_extra_state")}
    if not tensors or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items()):
        raise InputError(
            f"{path} holds no weights by name, neither under {', '.join(_WEIGHTS)} nor as a whole",
            hint='save {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, or point at the '
            "directory that the file belongs to",
        )
    return key, tensors


def _optimizer(whole: dict[str, Any], stored: list[str], path: Path) -> NamedOptimizer | None:
    found = optimizers_in(whole)
    if not found:
        return None

    def view(model: nn.Module, names: Mapping[str, str]) -> OptimizerView:
        documents = optimizers_in(_whole(load_pickle(path)))
        # Composer keeps optimizers under the names of their classes.
        where, view = next(iter(documents)), named(merged(documents, path), stored, model, names, path)
        return coupled(view) if where.endswith(".DecoupledAdamW") else view

    only = next(iter(found.values())) if len(found) == 1 else None
    return NamedOptimizer(path, view, lambda: summary(only, path) if only is not None else {"optimizers": len(found)})


def coupled(view: OptimizerView) -> OptimizerView:
    """Composer's DecoupledAdamW as AdamW: it decays by lr / initial_lr of the weight decay, AdamW by lr of it."""
    groups = []
    for group in view.groups:
        decay, first = group.number("weight_decay", 0.0), group.number("initial_lr", group.options.get("lr"))
        groups.append(replace(group, options={**group.options, "weight_decay": decay / first if first else decay}))
    return replace(view, groups=tuple(groups), name="AdamW")


def named(document: Any, stored: Collection[str], model: nn.Module, names: Mapping[str, str], path: Path) -> OptimizerView:
    """An optimizer's state by the model's names: the file's own where it has them, else by position, in the model's order.

    Args:
        stored: the weights' names in the order in which they are stored, which is that of the trained module.
        names: stored name by name of the model.

    Raises:
        InputError: the order cannot be proved, or names or shapes do not fit.
    """
    groups, state = check_document(document, path)
    if (keyed := by_name(groups, state)) is not None:
        return map_named(keyed, model, names, path=path)
    # Positions count the trained module's parameters, in whose order its weights are stored.
    expected = [names[name] for name, _ in model.named_parameters() if name in names]
    own = set(expected)
    found = [name for name in stored if name in own]
    if found != expected:
        first = next(pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1])
        raise InputError(
            f"{path} counts optimizer state in the order of its own parameters, {first[0]} where the model has {first[1]}",
            hint="name the network that was trained with --model, or save an optimizer of model.named_parameters()",
        )
    return map_state(document, model, (trainer_order, matrix_order, single_order), path=path, partial=True)


def _step(document: dict[str, Any], path: Path) -> int | None:
    """Optimizer steps, as the script counted them or as the file is named."""
    value = _counted(document)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = _counted(load_pickle(path)).item()
    counted = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**53 and value == int(value)
    return int(value) if counted else step_of(path)


def _counted(document: dict[str, Any]) -> Any:
    head = _whole(document)
    clock = head.get("timestamp") if head is not document else None
    if isinstance(clock, dict):  # Composer's, by itself or under its class's name
        return next((c["batch"] for c in (clock, *clock.values()) if isinstance(c, dict) and "batch" in c), None)
    return next((head[key] for key in _STEPS if key in head), None)
