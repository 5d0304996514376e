"""Reading untrusted files: nothing in them is executed, and every failure is one line."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from curvcli.errors import InputError
from curvcli.inputs.base import TensorInfo

_JSON_LIMIT = 64 * 2**20


def load_pickle(path: Path, *, meta: bool = False) -> Any:
    """A torch.save file, with weights_only always; `meta` reads shapes without data.

    Raises:
        InputError: missing, truncated, not a torch file, or holding anything but tensors and plain data.
    """
    _refuse_pointer(path)
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_zip(path)
    try:
        return torch.load(path, map_location="meta" if meta else "cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)|global:? ?[`']?([\w.]+)|type ([\w.]+)", str(error))
        what = next((g for g in named.groups() if g), None) if named else None
        raise InputError(
            f"{path} holds {f'the object {what}' if what else 'more than tensors and plain data'}; it was not loaded, "
            "for a pickle can run code",
            hint="save tensors, numbers and names only",
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise InputError(
            f"{path} cannot be read as a torch file: {_first_line(error) or 'it is empty'}",
            hint="the file is truncated or damaged: copy it again",
        ) from error


def read_json(path: Path) -> Any:
    """A JSON file. Raises InputError."""
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise InputError(
                f"{path} is larger than {_JSON_LIMIT >> 20} MiB", hint="no checkpoint's JSON is: check the file"
            )
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {_first_line(error)}", hint="copy the file again") from error


def safetensors_header(path: Path) -> list[TensorInfo]:
    """Names, shapes and types of the tensors in a safetensors file; no data is read. Raises InputError."""
    _refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as handle:
            return [
                TensorInfo(name, tuple(piece.get_shape()), piece.get_dtype())
                for name in handle.keys()  # noqa: SIM118 - not iterable itself
                for piece in [handle.get_slice(name)]
            ]
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors: {_first_line(error)}",
            hint="the file is truncated or damaged: copy it again",
        ) from error


def stored(files: Mapping[str, Path]) -> Mapping[str, Tensor]:
    """Tensors of safetensors files by name, each read when it is asked for. Reading raises InputError."""
    return _Stored(files)


class _Stored(Mapping[str, Tensor]):
    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        try:
            with safe_open(path, framework="pt") as handle:
                return handle.get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as safetensors: {_first_line(error)}",
                hint="the file is truncated or damaged: copy it again",
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def check_finite(model: nn.Module) -> None:
    """Raise InputError naming the first weight that is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"weight {name} holds {bad} NaN or inf of {tensor.numel()} values",
                hint="the run has already diverged or the file is damaged: use an earlier checkpoint",
            )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


def _refuse_pointer(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="check the path and its permissions") from error
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-LFS pointer, not the file itself", hint="run git lfs pull")
    if not head:
        raise InputError(f"{path} is empty", hint="copy the file again")


def _check_zip(path: Path) -> None:
    """torch.save stores its records uncompressed; a compressed one could claim any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} is a damaged zip: {_first_line(error)}", hint="copy the file again") from error
    if packed:
        raise InputError(
            f"{path} has compressed records ({packed[0]})", hint="torch.save writes none: do not trust this file"
        )
