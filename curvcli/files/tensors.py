"""Safetensors files. Their tensors are read and never mapped.

A file that is cut short while it is mapped, as by a job that writes the next checkpoint over it, kills whoever touches it
(SIGBUS).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from curvcli.errors import InputError
from curvcli.files.safe import first_line, refuse_changed, refuse_pointer, stamp

_DAMAGED = "the file is truncated or damaged: copy it again"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor as its file's header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Parts(Protocol):
    """Stored tensors by name, of which a part can be read without the rest."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor. Raises InputError."""
        ...

    def entries(self, name: str, begin: int, end: int) -> Tensor:
        """Entries begin to end of the tensor, row by row, as a flat one of shape (end - begin,). Raises InputError."""
        ...


def safetensors_header(path: Path) -> list[TensorInfo]:
    """Names, shapes and types of the tensors in a safetensors file; no data is read. Raises InputError."""
    return _opened(path)[0]


def safetensors_metadata(path: Path) -> Mapping[str, str]:
    """The text that its writer put into a safetensors file's header. Raises InputError."""
    return _opened(path)[1]


def stored(files: Mapping[str, Path]) -> Stored:
    """Tensors of safetensors files by name, each read when it is asked for. Reading raises InputError."""
    return Stored(files)


def leading(path: Path, rows: int) -> dict[str, Tensor]:
    """The first rows of every tensor of a safetensors file. Raises InputError."""
    file = _File(path)
    return {name: file.read(name, rows) for name in file.infos}


def _opened(path: Path) -> tuple[list[TensorInfo], Mapping[str, str]]:
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as handle:
            infos = [
                TensorInfo(name, tuple(piece.get_shape()), piece.get_dtype())
                for name in handle.keys()  # noqa: SIM118 - not iterable itself
                for piece in [handle.get_slice(name)]
            ]
            return infos, handle.metadata() or {}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {first_line(error)}", hint=_DAMAGED) from error


class Stored(Mapping[str, Tensor]):
    """Tensors of safetensors files by name, each read when it is asked for, or a part of it. Reading raises InputError."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, _File] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._file(name).read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `Parts` has it."""
        return self._file(name).infos[name].shape

    def entries(self, name: str, begin: int, end: int) -> Tensor:
        """As `Parts` has it."""
        return self._file(name).flat(name, begin, end)

    def _file(self, name: str) -> _File:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _File(path)
        return self._open[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class _File:
    """One file, whose header the safetensors library has found sound: places inside the file, none over another."""

    def __init__(self, path: Path) -> None:
        try:
            self.path, self.stamp = path, stamp(path)
            self.infos = {info.name: info for info in safetensors_header(path)}
            with path.open("rb") as stream:
                # Read again: the library does not tell where a tensor's bytes lie; that places are good it has checked.
                # The length too, and it is bounded all the same, in case the file was replaced since.
                length = min(int.from_bytes(stream.read(8), "little"), self.stamp[0])
                header = stream.read(length)
        except OSError as error:  # of a file that went after its headers were listed
            raise InputError(f"cannot read {path}: {error.strerror}", hint="check the path and its permissions") from error
        refuse_changed(path, self.stamp)
        self.start = 8 + length
        self.places: dict[str, Any] = json.loads(header)

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """The tensor, or its first rows."""
        shape = self.infos[name].shape
        shape = (min(shape[0], rows), *shape[1:]) if rows is not None and shape else shape
        return self.flat(name, 0, prod(shape)).view(shape)

    def flat(self, name: str, begin: int, end: int) -> Tensor:
        """The tensor's entries from one to another."""
        info = self.infos[name]
        if info.dtype not in _DTYPES:
            raise InputError(f"{self.path}: {name} is of type {info.dtype}, which is not known", hint="save it as float32")
        tensor = torch.empty(end - begin, dtype=_DTYPES[info.dtype])
        # The tensor's own memory as bytes: numpy has no bfloat16 or float8 to read into.
        into = tensor.view(torch.uint8).numpy()
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(self.start + self.places[name]["data_offsets"][0] + begin * tensor.element_size())
                done = _fill(stream, into)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}", hint="check its permissions") from error
        refuse_changed(self.path, self.stamp)
        if done != into.nbytes:
            raise InputError(f"{self.path}: {name} is not whole", hint=_DAMAGED)
        return tensor


def _fill(stream: Any, into: Any) -> int:
    """Bytes read; the system gives at most 2 GiB at once."""
    view, done = memoryview(into), 0
    while done < len(view) and (got := stream.readinto(view[done:])):
        done += got
    return done
