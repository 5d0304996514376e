"""Vectors elsewhere: the basis of an eigensolver where the memory it is measured in has no room for it.

That of the CPU lies on disk, that of another device in main memory. On disk a vector is a tensor over a file that is mapped
into memory and has no name any more, so it goes when the tensor does, or the process. Whoever has read or written one lets
go of it, and the system may take its pages back; it streams in again when it is next asked for.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Protocol
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

from curvcli.curvature import resources
from curvcli.errors import FullDiskError, InputError

SHARE = 0.5  # of what is free there, at most
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, of the user's share of it, of what a process may write

Put = Callable[[Sequence[Tensor]], list[Tensor]]  # `Scratch.put`, or `list` where they stay where they are

_maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by the address of the tensor over each


class Store(Protocol):
    """Where vectors lie that the device they are used on has no room for."""

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor there that is not filled. Raises CurvError where there is no room."""
        ...

    @property
    def free(self) -> int:
        """Bytes that vectors may take."""
        ...


@dataclass(frozen=True)
class Host:
    """Main memory, for vectors of a GPU."""

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU that is not filled, in pages that stay where they are, where CUDA can be told."""
        found = torch.empty(shape, dtype=dtype)
        if torch.cuda.is_available():
            # Fixed pages are copied an order of magnitude faster. Not by pin_memory, which rounds up to a power of two.
            runtime, address = torch.cuda.cudart(), found.data_ptr()
            if int(runtime.cudaHostRegister(address, found.nbytes, 0)) == 0:
                finalize(found.untyped_storage(), runtime.cudaHostUnregister, address)
            else:  # pages that may move are slower and as good; CUDA tells its next caller of the error, who is nobody else
                with suppress(RuntimeError):
                    torch.zeros(1, device="cuda")
        return found

    @property
    def free(self) -> int:
        """Half of the memory that is free."""
        return int(SHARE * resources.free_bytes(torch.device("cpu")))


@dataclass(frozen=True)
class Scratch:
    """A folder for vectors.

    Args:
        folder: on a disk. A file system that lies in memory (tmpfs) saves none.
    """

    folder: Path

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU that is not filled, over a file of its own.

        Raises:
            FullDiskError: there is no room for it.
            InputError: no file can be made there for another reason.
        """
        nbytes = prod(shape) * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                _fill(file, nbytes)
                mapped = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            kind = FullDiskError if error.errno in FULL else InputError
            size = f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 100 else f"{nbytes:,} bytes"
            raise kind(
                f"cannot keep {size} of vectors in {self.folder}: {error.strerror or error}",
                hint="set TMPDIR to a folder on another disk, or give it more --memory",
            ) from error
        found = torch.frombuffer(mapped, dtype=dtype).view(shape)
        _maps[found.data_ptr()] = mapped
        return found

    def put(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors of one precision in one file, none in memory until it is read. Raises as `empty`."""
        sizes = [tensor.numel() for tensor in tensors]
        if not any(sizes):
            return list(tensors)
        flat = self.empty(sum(sizes), dtype=tensors[0].dtype)
        found = []
        for part, tensor in zip(flat.split(sizes), tensors, strict=True):
            found.append(part.view(tensor.shape).copy_(tensor))
            let_go(flat)
        return found

    @property
    def free(self) -> int:
        """Half of what the disk has left."""
        found = os.statvfs(self.folder)
        return int(SHARE * found.f_bavail * found.f_frsize)


def _fill(file: IO[bytes], nbytes: int) -> None:
    """Takes all of a file's room now: a write into a hole of a full disk would end the process with SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return
    zeros = bytes(2**20)  # macOS has no such call
    for done in range(0, nbytes, len(zeros)):
        file.write(zeros[: nbytes - done])
    file.flush()


def elsewhere(device: torch.device) -> Store | None:
    """Where vectors lie that a device has no room for; None of one that shares its memory with the CPU."""
    if device.type == "cpu":
        return scratch()
    return Host() if device.type == "cuda" else None


def scratch() -> Scratch:
    """TMPDIR, if one can write there; else /var/tmp, which by custom lies on a disk and not, as /tmp, in memory."""
    places = (os.environ.get("TMPDIR"), "/var/tmp")  # noqa: S108  (files in it have no name)
    usable = (place for place in places if place and Path(place).is_dir() and os.access(place, os.W_OK))
    return Scratch(Path(next(usable, None) or tempfile.gettempdir()))


def let_go(tensor: Tensor) -> None:
    """What is in its file need not be in memory until it is used again. Of a tensor that is not on disk nothing happens."""
    mapped = _maps.get(tensor.untyped_storage().data_ptr())
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # what was written stays in the file
        mapped.madvise(mmap.MADV_DONTNEED)
