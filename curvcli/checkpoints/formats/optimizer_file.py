"""Optimizer state of our own layout: optimizer.safetensors beside the weights, everything by parameter name."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from curvcli.checkpoints.base import OptimizerFile
from curvcli.checkpoints.state.mapping import map_named, summary
from curvcli.errors import InputError, UsageError
from curvcli.files.names import unwrapped
from curvcli.files.tensors import safetensors_header, safetensors_metadata, stored
from curvcli.optimizers.base import OptimizerView
from curvcli.optimizers.preconditioner import live

OPTIMIZER_FILE = "optimizer.safetensors"
_SCHEMA = "curv.optimizer/1"


def save_optimizer(path: str | Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> Path:
    """Write an optimizer's state so that curv reads it beside a model saved with `save_pretrained`.

    Tensors are stored as `<entry>.<parameter>`, as in `exp_avg_sq.model.norm.weight`, those of a list `Q` as of `Q_0`;
    groups with their parameters' names and hyperparameters, and numbers such as the step, as JSON in the file's metadata.

    Args:
        path: directory of the checkpoint; `optimizer.safetensors` is written into it, whole or not at all.
        optimizer: of torch's form, with plain tensors on any device.
        model: whose parameters it moves; wrappers' prefixes (torch.compile's, DistributedDataParallel's) are dropped.

    Returns:
        The file.

    Raises:
        UsageError: the optimizer moves something else than the model's parameters, is sharded, or has an option that
            JSON cannot hold.
        InputError: the file cannot be written.
    """
    names = {unwrapped(name): parameter for name, parameter in model.named_parameters()}
    view = live(optimizer, names)
    if sum(len(g["params"]) for g in optimizer.param_groups) != sum(len(g.names) for g in view.groups):
        raise UsageError("the optimizer moves parameters that the model does not have", hint="pass the model it was made of")
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, entry in view.state.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.dim():
                if type(value) not in (Tensor, nn.Parameter):
                    raise UsageError(
                        f"{key} of {name} is a {type(value).__name__}, one rank's piece",
                        hint="save with torch.distributed.checkpoint instead",
                    )
                # A copy each: safetensors refuses tensors that share memory.
                tensors[f"{key}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            elif value is not None:
                numbers.setdefault(name, {})[key] = _plain(value)
    groups = [{**{k: _plain(v) for k, v in g.options.items() if k != "param_names"}, "names": g.names} for g in view.groups]
    try:
        text = json.dumps({"name": view.name, "groups": groups, "numbers": numbers}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"an option of the optimizer is not plain data: {error}", hint="save its state_dict()") from error
    file = Path(path) / OPTIMIZER_FILE
    try:
        # safetensors writes to a path, and is given one on the same file system, so that the rename is whole.
        with tempfile.TemporaryDirectory(prefix=".curv-", dir=path) as directory:
            temporary = Path(directory) / OPTIMIZER_FILE
            save_file(tensors, temporary, metadata={"schema": _SCHEMA, "optimizer": text})
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {file}: {error}", hint="give an existing, writable directory") from error
    return file


def read_optimizer(path: Path) -> OptimizerFile:
    """What `save_optimizer` wrote; reads the header. Reading it raises InputError."""
    return OptimizerFile(
        path,
        lambda model: _view(path, model),
        lambda: summary(_document(path)[0], path),
    )


def _view(path: Path, model: nn.Module) -> OptimizerView:
    document, name = _document(path)
    tensors = stored({tensor.name: path for tensor in safetensors_header(path)})
    view = map_named(document, model, {}, path=path, read=lambda owner: _Entry(tensors, owner, document["state"][owner]))
    return replace(view, name=name)


def _document(path: Path) -> tuple[dict[str, Any], str | None]:
    """A torch optimizer's state_dict keyed by names, with shapes in the place of tensors, and the optimizer's class."""
    header = safetensors_header(path)
    metadata = safetensors_metadata(path)
    try:
        if metadata.get("schema") != _SCHEMA:
            raise InputError(f"{path} was not written by curvcli.save_optimizer", hint="write it with that function")
        said = json.loads(metadata["optimizer"])
        groups = [{**{k: v for k, v in g.items() if k != "names"}, "params": list(g["names"])} for g in said["groups"]]
        state: dict[str, dict[str, Any]] = {name: dict(numbers) for name, numbers in said["numbers"].items()}
        name = None if said["name"] is None else str(said["name"])
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has damaged metadata: {str(error)[:200]}", hint="copy the file again") from error
    for tensor in header:
        key, _, owner = tensor.name.partition(".")
        state.setdefault(owner, {})[key] = torch.empty(tensor.shape, device="meta")
    return {"state": state, "param_groups": groups}, name


class _Entry(Mapping[str, Any]):
    """State of one parameter; its tensors are read when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], owner: str, shapes: Mapping[str, Any]) -> None:
        self._tensors, self._owner, self._shapes = tensors, owner, shapes

    def __getitem__(self, key: str) -> Any:
        value = self._shapes[key]
        return self._tensors[f"{key}.{self._owner}"] if isinstance(value, Tensor) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
