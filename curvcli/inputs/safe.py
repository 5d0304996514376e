"""Reading untrusted files: nothing in them is executed, and every failure is one line."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from curvcli.errors import InputError
from curvcli.inputs.base import TensorInfo
from curvcli.inputs.bounds import check_document, check_legacy, check_zip

_JSON_LIMIT = 64 * 2**20


def load_pickle(path: Path, *, meta: bool = False) -> Any:
    """A torch.save file, with weights_only always; `meta` reads shapes without data.

    Raises:
        InputError: missing, truncated, not a torch file, or holding anything but tensors and plain data.
    """
    _refuse_pointer(path)
    zipped, before = zipfile.is_zipfile(path), _stamp(path)
    # A file that a running job cuts short while it is mapped kills whoever touches it (SIGBUS), so it is mapped only
    # where its data is not read or would not fit.
    mapped = zipped and (meta or before[0] > psutil.virtual_memory().available // 4)
    if zipped:
        check_zip(path)
    else:
        check_legacy(path)
    try:
        document = torch.load(path, map_location="meta" if meta else "cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)|global:? ?[`']?([\w.]+)|type ([\w.]+)", str(error))
        what = next((g for g in named.groups() if g), None) if named else None
        raise InputError(
            f"{path} holds {f'the object {what}' if what else 'more than tensors and plain data'}; it was not loaded, "
            "for a pickle can run code",
            hint="save tensors, numbers and names only",
        ) from error
    except Exception as error:  # a damaged pickle reaches every line of torch's reader
        _refuse_changed(path, before)
        raise InputError(
            f"{path} cannot be read as a torch file: {_first_line(error) or type(error).__name__}",
            hint="the file is truncated or damaged: copy it again",
        ) from error
    _refuse_changed(path, before)
    check_document(document, path)
    return document


def read_json(path: Path) -> Any:
    """A JSON file. Raises InputError."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not readable JSON: not a file", hint="check the path")
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
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors: {_first_line(error)}",
            hint="the file is truncated or damaged: copy it again",
        ) from error


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


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _refuse_changed(path: Path, before: tuple[int, int]) -> None:
    if not path.exists() or _stamp(path) != before:
        raise InputError(f"{path} changed while it was read", hint="a job is writing it: run again when it is done")


def _refuse_pointer(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a file", hint="check the path")
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="check the path and its permissions") from error
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-LFS pointer, not the file itself", hint="run git lfs pull")
    if not head:
        raise InputError(f"{path} is empty", hint="copy the file again")
