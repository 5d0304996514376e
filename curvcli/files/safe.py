"""Reading untrusted files: nothing in them is executed, and every failure is one line."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from curvcli.errors import InputError
from curvcli.files.foreign import stand_ins
from curvcli.files.limits import check_document, check_legacy, check_zip
from curvcli.files.parse import parse_json, read_limited

_JSON_LIMIT = 64 * 2**20
_mapped: ContextVar[bool] = ContextVar("mapped", default=False)


@contextmanager
def mapped() -> Iterator[None]:
    """Within it the tensors of torch.save files stay in their files, and come to memory as they are used.

    For files that several processes read and each keeps a part of. Nothing may cut such a file short meanwhile: that ends
    whoever touches it (SIGBUS).
    """
    before = _mapped.set(True)
    try:
        yield
    finally:
        _mapped.reset(before)


def load_pickle(path: Path, *, meta: bool = False) -> Any:
    """A torch.save file, with weights_only always; `meta` reads shapes without data.

    Settings and the like of well-known packages, which trainers put beside the weights, come as `foreign.Foreign`.

    Raises:
        InputError: missing, truncated, not a torch file, or holding anything but tensors, plain data and those.
    """
    refuse_pointer(path)
    zipped, before = _is_zip(path), stamp(path)
    # A file that a running job cuts short while it is mapped kills whoever touches it (SIGBUS), so it is mapped only
    # where its data is not read, is divided over processes, or would not fit.
    map_it = zipped and (meta or _mapped.get() or before[0] > psutil.virtual_memory().available // 4)
    if zipped:
        check_zip(path, path, before[0])
    else:
        check_legacy(path)
    try:
        document = _load(path, path, before[0], map_location="meta" if meta else "cpu", mmap=map_it or None)
    except InputError:
        refuse_changed(path, before)
        raise
    refuse_changed(path, before)
    return document


def load_bytes(data: bytes, where: object) -> Any:
    """What torch.save wrote into a part of a file, with weights_only. Raises InputError as `load_pickle` does.

    Args:
        where: the file and the part, for messages.
    """
    stream = io.BytesIO(data)
    if not _is_zip(stream):
        raise InputError(f"{where} is no torch.save record", hint="the file is truncated or damaged: copy it again")
    check_zip(stream, where, len(data))
    stream.seek(0)
    return _load(stream, where, len(data), map_location="cpu")


def _load(source: Path | io.BytesIO, where: object, size: int, **settings: Any) -> Any:
    try:
        document = _restricted(source, settings)
    except pickle.UnpicklingError as error:
        # torch words it in three ways: a blocked module, a class that is not allowed, a type that is not built.
        named = re.search(r"GLOBAL ([\w.]+)|global:? ?[`']?(?!GLOBAL)([\w.]+)|type ([\w.]+)", str(error))
        what = next((g for g in named.groups() if g), None) if named else None
        raise InputError(
            f"{where} holds {f'the object {what}' if what else 'more than tensors and plain data'}; it was not loaded, "
            "for a pickle can run code",
            hint="save tensors, numbers and names only",
        ) from error
    except Exception as error:  # a damaged pickle reaches every line of torch's reader
        raise InputError(
            f"{where} cannot be read as a torch file: {first_line(error) or type(error).__name__}",
            hint="the file is truncated or damaged: copy it again",
        ) from error
    check_document(document, where, size)
    return document


def _restricted(source: Path | io.BytesIO, settings: dict[str, Any]) -> Any:
    try:
        return torch.load(source, weights_only=True, **settings)
    # Only now are foreign classes looked for: most files have none, and looking means a second walk through the pickles.
    except pickle.UnpicklingError:
        inert = stand_ins(source)
        if not inert:
            raise
    if isinstance(source, io.BytesIO):
        source.seek(0)
    # Allowed for this one load, and not for whatever else the process reads.
    with torch.serialization.safe_globals(inert):
        return torch.load(source, weights_only=True, **settings)


def read_json(path: Path) -> Any:
    """A JSON file. Raises InputError."""
    try:
        return parse_json(read_limited(path, _JSON_LIMIT))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {first_line(error)}", hint="copy the file again") from error


def check_finite(model: nn.Module) -> None:
    """Raise InputError naming the first weight that is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"weight {name} holds {bad} NaN or inf of {tensor.numel()} values",
                hint="the run has already diverged or the file is damaged: use an earlier checkpoint",
            )


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a line of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written: its size and time."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def refuse_changed(path: Path, before: tuple[int, int]) -> None:
    """Raises InputError where the file is not as `stamp` found it."""
    if not path.exists() or stamp(path) != before:
        raise InputError(f"{path} changed while it was read", hint="a job is writing it: run again when it is done")


def refuse_pointer(path: Path) -> None:
    """Raises InputError for what cannot be any file of tensors: a directory, an empty file, a git-LFS pointer."""
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


def _is_zip(source: Path | io.BytesIO) -> bool:
    try:
        return zipfile.is_zipfile(source)
    except zipfile.BadZipFile:  # it is one, and damaged: check_zip says how
        return True
