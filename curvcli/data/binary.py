"""Token streams as memory maps: nanoGPT's, llm.c's and modded-nanogpt's .bin, Megatron's .bin with its .idx."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvcli.errors import InputError, counted

Ids = NDArray[np.generic]

# llm.c and modded-nanogpt: 256 int32, the first three magic, version, number of tokens.
_HEADER = 1024
_MAGIC = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
_EVALUATION = 20240522
# Megatron-LM's indexed_dataset.py: codes of the element type. Floats hold no tokens.
_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_IDX = b"MMIDIDX\x00\x00"


def open_bin(path: Path, vocabulary: int | None) -> tuple[str, Ids]:
    """A .bin's kind and its tokens, by its neighbour, its header or its values. Raises InputError."""
    # First of all: Megatron's .bin has no header and would pass for nanoGPT's.
    if path.with_suffix(".idx").is_file():
        return open_idx(path.with_suffix(".idx"))
    size = path.stat().st_size
    head = np.fromfile(path, dtype="<i4", count=3) if size >= _HEADER else np.zeros(0, dtype="<i4")
    if len(head) == 3 and int(head[0]) in (_EVALUATION, *(magic for magic, _ in _MAGIC)):
        return _with_header(path, size, *map(int, head))
    if size == 0 or size % 2:
        raise InputError(
            f"{path} has {size} bytes, no whole number of uint16 tokens",
            hint="known: nanoGPT's uint16 and uint32, llm.c's and Megatron's .bin",
        )
    narrow = np.memmap(path, dtype="<u2", mode="r")
    if size % 4 == 0 and _is_wide(narrow[: 2**20], vocabulary):
        wide = np.memmap(path, dtype="<u4", mode="r")
        # numpy's own type of integers, where a script named none.
        if size % 8 == 0 and len(wide) >= 64 and not wide[1 : 2**20 : 2].any():
            return "nanoGPT .bin, int64", np.memmap(path, dtype="<i8", mode="r")
        return "nanoGPT .bin, uint32", wide
    return "nanoGPT .bin, uint16", narrow


def _is_wide(sample: Ids, vocabulary: int | None) -> bool:
    """Whether uint16 values are the halves of uint32 tokens: nothing in such a file says which it is."""
    high, low = sample[1::2], sample[::2]
    # So few values prove nothing, and zeros alone are padding in either width.
    if len(sample) < 64 or not low.any():
        return False
    # Upper halves of ids below 2^16 are 0 throughout; no text has one and the same token at every second place.
    if vocabulary is None or vocabulary <= 2**16:
        return not high.any()
    # Upper halves of a large vocabulary's ids are few small numbers; as tokens of their own they would be large too.
    return int(high.max()) <= (vocabulary - 1) >> 16


def _with_header(path: Path, size: int, magic: int, version: int, count: int) -> tuple[str, Ids]:
    if magic == _EVALUATION:
        raise InputError(f"{path} is llm.c's evaluation format", hint="give a training shard (magic 20240520 or 20240801)")
    dtype = _MAGIC.get((magic, version))
    if dtype is None:
        raise InputError(f"{path} has llm.c's magic {magic} with version {version}", hint="known: 20240520/1 and 20240801/7")
    expected = _HEADER + count * np.dtype(dtype).itemsize
    if count <= 0 or size != expected:
        raise InputError(
            f"{path} has {size:,} bytes, its header says {counted(count, 'token')}, {expected:,} bytes",
            hint="copy the file again",
        )
    return f"llm.c .bin, {np.dtype(dtype).name}", np.memmap(path, dtype=dtype, mode="r", offset=_HEADER)


def open_idx(path: Path) -> tuple[str, Ids]:
    """Megatron's pair, by its .idx: documents one after the other, as the .bin has them. Raises InputError."""
    data = path.with_suffix(".bin")
    if not data.is_file():
        raise InputError(f"{data} is missing beside {path}", hint="Megatron's datasets are a pair of .bin and .idx")
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(34)
        if len(head) < 34 or not head.startswith(_IDX):
            raise InputError(f"{path} is no Megatron index", hint="expected MMIDIDX at its beginning")
        version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
        dtype = _CODES.get(code)
        if version != 1 or dtype is None:
            raise InputError(f"{path} has version {version} and type code {code}", hint="known: version 1, integer types")
        # A length (int32) and a pointer (int64) for each sequence, an int64 for each document.
        if size < 34 + 12 * sequences + 8 * documents:
            raise InputError(f"{path} has {size:,} bytes, too few for {sequences:,} sequences", hint="copy the file again")
        lengths: NDArray[Any] = np.fromfile(stream, dtype="<i4", count=sequences)
        pointers: NDArray[Any] = np.fromfile(stream, dtype="<i8", count=sequences)
    width = np.dtype(dtype).itemsize
    # Where sequences follow each other the .bin is one stream, mapped as it is; any other layout would need a copy.
    ends = np.cumsum(lengths.astype(np.int64) * width)
    if sequences == 0 or (lengths < 0).any() or not np.array_equal(pointers[1:], ends[:-1]) or pointers[0] != 0:
        raise InputError(f"{path}: its sequences do not follow each other in {data.name}", hint="build the pair again")
    if int(ends[-1]) != data.stat().st_size:
        raise InputError(
            f"{data} has {data.stat().st_size:,} bytes, its index covers {int(ends[-1]):,}", hint="copy both files again"
        )
    return f"Megatron .bin/.idx, {np.dtype(dtype).name}", np.memmap(data, dtype=dtype, mode="r")
