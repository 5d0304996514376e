"""One file of torch.save that holds a model: nanoGPT's, Lightning's, or a training script's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from curvcli.errors import InputError, UnsupportedError
from curvcli.inputs.base import Architecture, Checkpoint, TensorInfo
from curvcli.inputs.formats.dcp import NamedOptimizer, assemble
from curvcli.inputs.formats.nanogpt import NanoGPTReader
from curvcli.inputs.runs import step_of
from curvcli.inputs.safe import load_pickle
from curvcli.inputs.state.mapping import (
    check_document,
    map_named,
    map_state,
    matrix_order,
    single_order,
    summary,
    trainer_order,
)
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.refused import refuse

_WEIGHTS = ("model", "state_dict", "model_state_dict")
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optimizers")
# What scripts call the number of optimizer steps; an epoch is no step.
_STEPS = ("global_step", "step", "iter_num", "iteration")
_LIGHTNING = "pytorch-lightning_version"


class TorchFileReader:
    """A .pt, .pth, .ckpt or .bin file; what it is, its content says."""

    def accepts(self, path: Path) -> bool:
        return path.is_file() and path.suffix in (".pt", ".pth", ".ckpt", ".bin")

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        head = load_pickle(path, meta=True)
        if architecture is None and isinstance(head, dict) and "model_args" in head:
            return NanoGPTReader().read(path, None)
        weights = _weights(head, path)
        return assemble(
            path,
            architecture,
            format="lightning" if _LIGHTNING in head else "torch",
            tensors=[TensorInfo(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in weights.items()],
            weights=lambda: _weights(load_pickle(path), path),
            optimizer=_optimizer(head, list(weights), path),
            step=_step(head, path),
        )


def _weights(document: Any, path: Path) -> dict[str, Tensor]:
    """The model's tensors by name: of the one part that has them, or the document itself."""
    whole = document if isinstance(document, dict) else {}
    parts = {key: whole[key] for key in _WEIGHTS if key in whole}
    if len(parts) > 1:
        raise InputError(f"{path} has weights under {' and '.join(parts)}", hint="save one model in a file")
    key, found = next(iter(parts.items()), (None, whole))
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
    return tensors


def _optimizer(head: dict[str, Any], stored: list[str], path: Path) -> NamedOptimizer | None:
    key = next((key for key in _OPTIMIZERS if isinstance(head.get(key), (dict, list, tuple)) and head[key]), None)
    if key is None or any(not isinstance(t, dict) for t in _several(head[key])):
        return None

    def view(model: nn.Module, names: Mapping[str, str]) -> OptimizerView:
        documents = _several(load_pickle(path)[key])
        if len(documents) > 1:
            for document in documents:
                groups, state = check_document(document, path)
                refuse(OptimizerView(tuple(Group((), g) for g in groups), {str(k): v for k, v in state.items()}))
            raise UnsupportedError(
                f"{path} has {len(documents)} optimizers under {key!r}", hint="pass --optimizer none, or save one optimizer"
            )
        return named(documents[0], stored, model, names, path)

    documents = _several(head[key])
    return NamedOptimizer(
        path, view, lambda: summary(documents[0], path) if len(documents) == 1 else {"optimizers": len(documents)}
    )


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def named(document: Any, stored: Collection[str], model: nn.Module, names: Mapping[str, str], path: Path) -> OptimizerView:
    """An optimizer's state by the model's names: the file's own where it has them, else by position, in the model's order.

    Args:
        stored: the weights' names in the order in which they are stored, which is that of the trained module.
        names: stored name by name of the model.

    Raises:
        InputError: the order cannot be proved, or names or shapes do not fit.
    """
    groups, state = check_document(document, path)
    if any(isinstance(p, str) for group in groups for p in group["params"]):
        return map_named(document, model, names, path=path)
    if all(_has_names(group) for group in groups):
        owner = {i: n for group in groups for i, n in zip(group["params"], group["param_names"], strict=True)}
        return map_named(
            {
                "state": {owner.get(index, str(index)): entry for index, entry in state.items()},
                "param_groups": [{**group, "params": group["param_names"]} for group in groups],
            },
            model,
            names,
            path=path,
        )
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
    return map_state(document, model, (trainer_order, matrix_order, single_order), path=path)


def _has_names(group: Mapping[str, Any]) -> bool:
    names = group.get("param_names")
    return isinstance(names, list) and len(names) == len(group["params"]) and all(isinstance(n, str) for n in names)


def _step(head: dict[str, Any], path: Path) -> int | None:
    """Optimizer steps, as the script counted them or as the file is named."""
    value = next((head[key] for key in _STEPS if key in head), None)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = next(load_pickle(path)[key] for key in _STEPS if key in head).item()
    counted = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**53 and value == int(value)
    return int(value) if counted else step_of(path)  # type: ignore[arg-type]
