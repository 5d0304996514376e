"""Checkpoint directories of transformers: the Trainer's, and plain save_pretrained ones."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from curvcli.checkpoints.base import Checkpoint, Logged, OptimizerFile, unusable
from curvcli.checkpoints.clipping import clipping
from curvcli.checkpoints.formats.beside import (
    averaged_weights,
    averages_of,
    merged,
    of_another,
    optimizer_files,
    optimizers_in,
    unread,
)
from curvcli.checkpoints.formats.optimizer_file import OPTIMIZER_FILE, read_optimizer
from curvcli.checkpoints.state.mapping import (
    adapted,
    lora_plus_order,
    map_state,
    matrix_order,
    single_order,
    summary,
    trainer_order,
)
from curvcli.errors import InputError
from curvcli.files.limits import inside
from curvcli.files.names import unwrapped
from curvcli.files.runs import step_of
from curvcli.files.safe import load_pickle, read_json
from curvcli.files.tensors import Stored, TensorInfo, safetensors_header, stored
from curvcli.models.architecture import fill, needed
from curvcli.models.base import Architecture
from curvcli.models.registered import build
from curvcli.models.slices import Divisible
from curvcli.optimizers.base import OptimizerView

INDEX = "model.safetensors.index.json"
BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SAVE = "write curvcli.save_optimizer(DIR, optimizer, model) beside the weights, or pass --optimizer none"
# transformers takes the first that is there; of an old pytorch_model.bin it writes none any more, and still reads it.
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_WEIGHTS = (INDEX, "model.safetensors", _BIN_INDEX, BIN)


class HuggingFaceReader:
    """model.safetensors or an old pytorch_model.bin, whole or in shards with an index, usually with a config.json.

    The Trainer saves a model that is none of transformers' without one; --model then names the network.
    """

    names = _WEIGHTS

    def accepts(self, path: Path) -> bool:
        """Whether it is a directory with config.json or weights under the format's names."""
        return path.is_dir() and any((path / name).exists() for name in ("config.json", *self.names))

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """The checkpoint of `save_pretrained` or of the Trainer. Raises InputError."""
        described = needed(architecture, path)
        state = trainer_state(path)
        files = self.files(path)
        tensors = [tensor for found in files.values() for tensor in found]
        optimizer, read = optimizer_beside(path)
        clipped = clipping(path, state)
        average, _ = averages_of((tensor.name for tensor in tensors), path.name)
        findings = unread(path, read)
        if average:
            findings.append(averaged_weights(path.name))
        counted = integer(state, "global_step")
        return Checkpoint(
            path=path,
            format="accelerate"
            if path / "optimizer.bin" in read
            else "trainer"
            if state or path / "optimizer.pt" in read
            else "pretrained",
            architecture=described.name,
            tensors=tuple(tensors),
            model=lambda: self._model(path, described),
            optimizer=of_another(optimizer.path, path.name) if optimizer and average else optimizer,
            # accelerate's own checkpoint_N counts saves; step_N is what training scripts call them by.
            step=step_of(path) if counted is None and "step" in path.name else counted,
            vocabulary=described.vocabulary,
            context=described.context,
            task=described.task,
            log=run_log(state),
            tokenizer=described.tokenizer,
            notes=clipped.notes | (_normaliser(described.name) if state is not None else {}),
            clipping=clipped,
            findings=tuple(findings),
            divisible=None if _pickled(files) else lambda: self._divisible(path, described),
        )

    def tensors(self, path: Path) -> list[TensorInfo]:
        """The weights in a directory, from headers and index alone. Raises InputError."""
        return [tensor for tensors in self.files(path).values() for tensor in tensors]

    def _model(self, path: Path, described: Architecture) -> nn.Module:
        if described.configuration is not None:
            # transformers knows which stored names became which parameters (experts, renamed layers).
            wrapped = any(unwrapped(tensor.name) != tensor.name for tensor in self.tensors(path))
            stored = self._stored(path) if wrapped else None
            return build(described.configuration, described.task, weights=path, stored=stored)
        model = described.build()
        fill(model, self._stored(path), path)
        return model

    def _stored(self, path: Path) -> Mapping[str, Tensor]:
        """The weights by name; of safetensors each is read when it is asked for."""
        files = self.files(path)
        if _pickled(files):
            return {name: tensor for file in files for name, tensor in load_pickle(file).items()}
        return self._apart(path)

    def _apart(self, path: Path) -> Stored:
        return stored({tensor.name: file for file, tensors in self.files(path).items() for tensor in tensors})

    def _divisible(self, path: Path, described: Architecture) -> Divisible:
        # Built without transformers' reading: where that renames what is stored, names do not match, and it reads the whole.
        return Divisible(described.build, self._apart(path), tuple(self.tensors(path)), path)

    def files(self, path: Path) -> dict[Path, list[TensorInfo]]:
        """The weights by file, from headers. Raises InputError."""
        found = next((path / name for name in _WEIGHTS if (path / name).exists()), None)
        if found is None:
            others = [p.name for p in sorted(path.iterdir()) if p.suffix in _SUFFIXES and p not in optimizer_files(path)]
            raise InputError(
                f"{path} has a config.json and no weights ({', '.join(sorted(_WEIGHTS))})",
                hint=f"give the file that has them by its own path ({', '.join(others)[:200]})"
                if others
                else "copy the weights beside it",
            )
        return _shards(found) if found.suffix == ".json" else {found: header(found)}


def _pickled(files: Mapping[Path, object]) -> bool:
    return all(file.suffix == ".bin" for file in files)


def optimizer_beside(path: Path) -> tuple[OptimizerFile | None, list[Path]]:
    """The optimizer's state beside the weights, and what of it is read: ours, the Trainer's, accelerate's, the only one."""
    found = optimizer_files(path)
    known = [path / name for name in (OPTIMIZER_FILE, "optimizer.pt", "optimizer.bin") if path / name in found]
    numbered = [p for p in found if p.suffix == ".bin" and re.fullmatch(r"optimizer(?:_\d+)?\.bin", p.name)]
    # Ours first: it has the parameters' names, and somebody wrote it for curv to read.
    if known[:1] == [path / OPTIMIZER_FILE]:
        return read_optimizer(known[0]), known[:1]
    # accelerate's optimizer.bin, optimizer_1.bin, ...; beside an optimizer.pt they are of another save.
    if len(numbered) > 1 and "optimizer.pt" not in {p.name for p in known}:
        return _several(path, numbered), numbered
    if not known and len(found) != 1:
        if not found:
            return None, []
        what = f"{path} has optimizer state in files that are not known ({', '.join(p.name for p in found)[:200]})"
        return unusable(found[0], what, hint=_SAVE), found
    file = (known or found)[0]
    if file.is_dir() or file.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        return unusable(file, f"{file} has optimizer state in a form that is not known", hint=_SAVE), [file]
    return OptimizerFile(
        file, lambda model: _view(file, model), lambda: summary(_only(load_pickle(file, meta=True), file), file)
    ), [file]


def _several(path: Path, files: list[Path]) -> OptimizerFile:
    """Optimizers in a file each, as accelerate numbers them."""

    def view(model: nn.Module) -> OptimizerView:
        document = merged({file.name: _only(load_pickle(file), file) for file in files}, path)
        return map_state(document, model, (trainer_order, matrix_order, single_order), path=path, partial=True)

    return OptimizerFile(files[0], view, lambda: {"optimizers": len(files)})


def _view(file: Path, model: nn.Module) -> OptimizerView:
    orders = (trainer_order, matrix_order, single_order, *((lora_plus_order,) if adapted(model) else ()))
    return map_state(_only(load_pickle(file), file), model, orders, path=file, partial=True)


def _only(document: Any, file: Path) -> Any:
    """The one optimizer of a file. Raises UnsupportedError where it has several, and not Muon and Adam."""
    found = optimizers_in(document)
    return merged(found, file) if found else document


def _shards(index: Path) -> dict[Path, list[TensorInfo]]:
    """The weights of an index by the file that holds them."""
    document = read_json(index)
    shards = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise InputError(f"{index} has no weight_map", hint="copy the file again")
    found: dict[Path, list[TensorInfo]] = {}
    for shard in sorted(set(shards.values())):
        file = inside(index.parent, shard)
        if not file.is_file():
            raise InputError(f"{file} is named in {index.name} and missing", hint="copy the missing shard")
        found[file] = header(file)
    missing = sorted(set(shards) - {t.name for tensors in found.values() for t in tensors})
    if missing:
        raise InputError(f"{missing[0]} is named in {index.name} and in no shard", hint="copy the shards again")
    return found


def header(file: Path) -> list[TensorInfo]:
    """Names and shapes of the weights in a file. Raises InputError."""
    if file.suffix != ".bin":
        return safetensors_header(file)
    weights = load_pickle(file, meta=True)
    if not isinstance(weights, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in weights.items()):
        raise InputError(f"{file} holds no weights by name", hint="use another checkpoint")
    return [TensorInfo(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in weights.items()]


def trainer_state(path: Path) -> dict[str, Any] | None:
    """The Trainer's own record of a checkpoint, where it has one. Raises InputError."""
    file = path / "trainer_state.json"
    if not file.exists():
        return None
    state = read_json(file)
    if not isinstance(state, dict):
        raise InputError(f"{file} is not a trainer state", hint="copy the file again")
    return state


def integer(state: dict[str, Any] | None, key: str) -> int | None:
    """An integer of a JSON object, where it has it."""
    value = (state or {}).get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def _entries(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    history = (state or {}).get("log_history")
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []


def run_log(state: dict[str, Any] | None) -> tuple[Logged, ...]:
    """Losses and learning rates by step, as the Trainer logged them."""

    def number(entry: dict[str, Any], key: str) -> float | None:
        value = entry.get(key)
        # An integer of JSON may be larger than any float.
        if isinstance(value, (int, float)) and -sys.float_info.max <= value <= sys.float_info.max:
            return float(value)
        return None

    found = [
        Logged(e["step"], number(e, "loss"), number(e, "learning_rate"), _no_number(e.get("loss")))
        for e in _entries(state)
        if integer(e, "step")
    ]
    return tuple(entry for entry in found if entry.loss is not None or entry.lr is not None or entry.non_finite)


def _no_number(value: Any) -> bool:
    return isinstance(value, float) and not isfinite(value)


def _normaliser(architecture: str) -> dict[str, str]:
    if not architecture.startswith("GPT2"):
        return {}
    return {
        "loss-normaliser": "transformers' Trainer divides GPT-2's loss by all tokens of a window, the first too, which is "
        "no prediction: gradients and their moments are smaller by (n - 1)/n than of the loss that is measured here"
    }
