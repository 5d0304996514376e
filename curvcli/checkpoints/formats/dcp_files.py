"""Files of torch.distributed.checkpoint, read without torch's own reader, which unpickles what it is given.

`.metadata` is a pickle of which tensors there are and where their pieces lie; the pieces are torch.save records inside
`.distcp` files. Here the pickle is read by dcp_pickle, so that no class of torch's is touched, and every claim in it is
checked against the files' sizes before memory is asked for. No process group is needed.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvcli.checkpoints.formats import dcp_pickle
from curvcli.errors import InputError
from curvcli.files.limits import inside
from curvcli.files.safe import load_bytes

METADATA = ".metadata"
# Pieces take some hundred bytes each: millions of them. Plain data are numbers and lists of names. torch itself has no more
# than 64 dimensions.
_METADATA_LIMIT, _PLAIN_LIMIT, _DIMENSIONS = 2**30, 64 * 2**20, 64
_DAMAGED = "the checkpoint is incomplete or damaged: copy it again"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a tensor, or plain data: `length` bytes of `file` from `offset` on."""

    file: Path
    offset: int
    length: int
    start: tuple[int, ...] = ()  # of its first entry in the whole tensor, a number a dimension
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Entry:
    """What is stored under one key.

    Attributes:
        path: where it was in the nested state that was saved, outermost first.
        shape: None for plain data.
    """

    key: str
    path: tuple[str, ...]
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    chunks: tuple[Chunk, ...]

    def read(self) -> Any:
        """The tensor, put together from its pieces, or the plain data. Raises InputError."""
        if self.shape is None:
            return load_bytes(_bytes(self.chunks[0]), self._where(self.chunks[0]))
        if len(self.chunks) == 1:
            return self._piece(self.chunks[0])
        return self.rows(0, self.shape[0])

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows begin to end of the tensor, put together from the pieces that have some of them. Raises InputError."""
        shape = self.shape or ()
        found = torch.empty((end - begin, *shape[1:]), dtype=self.dtype)
        # Pieces with as many values as the tensor (`_complete`), none over another, are all of it.
        filled = torch.zeros(found.shape, dtype=torch.bool)
        for chunk in self.chunks:
            first, last = max(chunk.start[0], begin), min(chunk.start[0] + chunk.shape[0], end)
            if first >= last:
                continue
            part = tuple(slice(a, a + n) for a, n in zip(chunk.start[1:], chunk.shape[1:], strict=True))
            place = (slice(first - begin, last - begin), *part)
            if bool(filled[place].any()):
                raise InputError(f"{self._where(chunk)}: two pieces of the tensor overlap", hint=_DAMAGED)
            found[place] = self._piece(chunk)[first - chunk.start[0] : last - chunk.start[0]]
            filled[place] = True
        if not bool(filled.all()):
            raise InputError(f"{self.key}: two pieces of the tensor overlap", hint=_DAMAGED)
        return found

    def _piece(self, chunk: Chunk) -> Tensor:
        piece = load_bytes(_bytes(chunk), self._where(chunk))
        if type(piece) is not Tensor or piece.layout != torch.strided or piece.device.type != "cpu":
            raise InputError(f"{self._where(chunk)} is a {type(piece).__name__}, no plain tensor", hint=_DAMAGED)
        if tuple(piece.shape) != chunk.shape or piece.dtype != self.dtype:
            raise InputError(
                f"{self._where(chunk)} has shape {tuple(piece.shape)} of {piece.dtype}, {METADATA} says {chunk.shape} of "
                f"{self.dtype}",
                hint=_DAMAGED,
            )
        return piece

    def _where(self, chunk: Chunk) -> str:
        return f"{chunk.file} ({self.key})"


class Lazy(Mapping[str, Any]):
    """Entries by name, read anew at every look-up: what is in memory is what the caller keeps."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> Any:
        return self._entries[name].read()

    def shape(self, name: str) -> tuple[int, ...]:
        """As `files.tensors.Parts` has it, of tensors."""
        return self._entries[name].shape or ()

    def entries(self, name: str, begin: int, end: int) -> Tensor:
        """As `files.tensors.Parts` has it, of tensors: pieces that have some of these rows are read, one at a time."""
        entry, shape = self._entries[name], self.shape(name)
        if not shape or begin >= end:  # one number, or nothing
            flat: Tensor = entry.read().reshape(-1) if not shape else torch.empty(0, dtype=entry.dtype)
            return flat[begin:end]
        row = prod(shape[1:])
        first = begin // row
        return entry.rows(first, -(-end // row)).reshape(-1)[begin - first * row : end - first * row].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_metadata(directory: Path) -> tuple[Entry, ...]:
    """All entries of a checkpoint, in the order saved. Reads `.metadata` and the files' sizes, no data.

    Raises:
        InputError: `.metadata` is missing, damaged, or names anything but the few classes that it is made of; a file is
            missing, short or outside the directory; the pieces of a tensor are not the tensor.
    """
    file = directory / METADATA
    document = _unpickle(file)
    try:
        with dcp_pickle.without_collection():
            return _Entries(directory, document).all()
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise InputError(f"{file} is not a checkpoint's metadata ({type(error).__name__})", hint=_DAMAGED) from error


def _unpickle(file: Path) -> Any:
    try:
        if file.stat().st_size > _METADATA_LIMIT:
            raise InputError(f"{file} is larger than {_METADATA_LIMIT >> 30} GiB", hint="no checkpoint's is: check the file")
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", hint="check the path and its permissions") from error
    try:
        return dcp_pickle.load(data)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} names {error}, which no checkpoint's metadata does; nothing in it was run",
            hint="do not trust this checkpoint",
        ) from error
    except Exception as error:  # a damaged pickle raises every kind there is
        raise InputError(f"{file} is a damaged pickle ({type(error).__name__})", hint=_DAMAGED) from error


class _Entries:
    """The entries that a document of inert records describes, every field checked."""

    def __init__(self, directory: Path, document: Any) -> None:
        self.directory = directory
        self.described: dict[str, dcp_pickle.Record] = document["state_dict_metadata"]
        self.paths = document["planner_data"]
        self.sizes: dict[str, int] = {}
        self.stored = {
            (_text(index["fqn"]), None if index.fields.get("offset") is None else _numbers(index["offset"])): place
            for index, place in document["storage_data"].items()
        }

    def all(self) -> tuple[Entry, ...]:
        return tuple(self._entry(_text(key), value) for key, value in self.described.items())

    def _entry(self, key: str, described: dcp_pickle.Record) -> Entry:
        path = self._path(key)
        if type(described).__name__ == "BytesStorageMetadata":
            chunk = self._chunk(key, None, (), ())
            if chunk.length > _PLAIN_LIMIT:
                raise InputError(f"{chunk.file}: {key} claims {chunk.length} bytes of plain data", hint=_DAMAGED)
            return Entry(key, path, None, None, (chunk,))
        shape, properties = _numbers(described["size"]), described["properties"].fields
        dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
        if not isinstance(dtype, torch.dtype):
            raise ValueError("no dtype")
        if prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**62:
            raise ValueError("no tensor is so large")  # empty ones too: strides are products of the sizes
        chunks = []
        for piece in described["chunks"]:
            start, extent = _numbers(piece["offsets"]), _numbers(piece["sizes"])
            # A rank with nothing of a tensor describes an empty piece: nothing to read.
            if prod(extent) or not prod(shape):
                chunks.append(self._chunk(key, start, start, extent))
            if len(start) != len(shape) or any(a + n > end for a, n, end in zip(start, extent, shape, strict=True)):
                raise InputError(f"{self._file}: a piece of {key} lies outside its shape {shape}", hint=_DAMAGED)
        self._complete(key, shape, dtype, chunks)
        return Entry(key, path, shape, dtype, tuple(chunks))

    def _complete(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, chunks: list[Chunk]) -> None:
        numel, covered = prod(shape), sum(prod(chunk.shape) for chunk in chunks)
        if covered != numel or not chunks:
            raise InputError(f"{self._file}: the pieces of {key} have {covered} of its {numel} values", hint=_DAMAGED)
        # Several pieces may claim the same bytes: together no tensor is larger than the files.
        short = next((c for c in chunks if prod(c.shape) * dtype.itemsize > c.length), None)
        if short or sum(chunk.length for chunk in chunks) > self._total:
            raise InputError(
                f"{self._file}: {key} claims {numel * dtype.itemsize} bytes, more than its files hold", hint=_DAMAGED
            )

    def _chunk(self, key: str, offset: tuple[int, ...] | None, start: tuple[int, ...], shape: tuple[int, ...]) -> Chunk:
        place = self.stored.get((key, offset))
        if place is None:
            raise InputError(f"{self._file} does not say where {key} is stored", hint=_DAMAGED)
        if place.fields.get("transform_descriptors"):
            raise InputError(
                f"{self._file}: {key} is stored compressed or encrypted",
                hint="save it again with torch.distributed.checkpoint and no extensions",
            )
        name, (begin, length) = _text(place["relative_path"]), _numbers((place["offset"], place["length"]))
        if begin + length > self._size(name):
            raise InputError(
                f"{self.directory / name} has {self._size(name)} bytes, {key} ends at {begin + length}",
                hint="the file is truncated: copy it again",
            )
        return Chunk(self.directory / name, begin, length, start, shape)

    def _size(self, name: str) -> int:
        if name not in self.sizes:
            file = inside(self.directory, name)
            if not file.is_file():
                raise InputError(f"{file} is named in {METADATA} and missing", hint="copy every rank's files")
            self.sizes[name] = file.stat().st_size
        return self.sizes[name]

    @cached_property
    def _total(self) -> int:
        names = {_text(place["relative_path"]) for place in self.stored.values()}
        return sum(self._size(name) for name in names)

    @property
    def _file(self) -> Path:
        return self.directory / METADATA

    def _path(self, key: str) -> tuple[str, ...]:
        # The planner says from which nesting a key was flattened; without its word the key is one name.
        path = self.paths.get(key) if isinstance(self.paths, dict) else None
        return tuple(str(_scalar(part)) for part in path) if isinstance(path, tuple) and path else (key,)


def _bytes(chunk: Chunk) -> bytes:
    try:
        with chunk.file.open("rb") as stream:
            stream.seek(chunk.offset)
            return stream.read(chunk.length)
    except OSError as error:
        raise InputError(f"cannot read {chunk.file}: {error.strerror}", hint="check its permissions") from error


def _scalar(value: object) -> str | int:
    if not isinstance(value, (str, int)):
        raise TypeError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _numbers(values: object) -> tuple[int, ...]:
    if (
        not isinstance(values, tuple)
        or len(values) > _DIMENSIONS
        or not all(type(n) is int and 0 <= n < 2**62 for n in values)
    ):
        raise TypeError
    return values
