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

MOUNTS = Path("/proc/self/mountinfo")  # Linux's
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "rootfs")  # file systems that lie in memory

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
        folder: on a disk. A file system that lies in memory (tmpfs) saves none: see `scratch`.
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
    """Where vectors lie that a device has no room for; None where there is no disk, or it shares its memory with the CPU."""
    if device.type == "cpu":
        return scratch()
    return Host() if device.type == "cuda" else None


def scratch() -> Scratch | None:
    """TMPDIR, else /var/tmp, else Python's own: the first where one can write and that does not lie in memory itself."""
    usable = (place for place in _places() if not in_memory(place))
    return next((Scratch(place) for place in usable), None)


def passed_over() -> str:
    """That TMPDIR lies in memory and is not used; empty where that is not so."""
    named = os.environ.get("TMPDIR")
    if not named or Path(named) not in _places() or not in_memory(Path(named)):
        return ""
    found = scratch()
    return f"TMPDIR={named} lies in memory, vectors {'may lie in ' + str(found.folder) if found else 'have no disk'}"


def _places() -> list[Path]:
    """Where files can be written, the best first."""
    # /var/tmp lies on a disk by custom, and not, as /tmp, in memory. Files in it have no name.
    named = (os.environ.get("TMPDIR"), "/var/tmp")  # noqa: S108
    found = [Path(place) for place in named if place and Path(place).is_dir() and os.access(place, os.W_OK)]
    return found or [Path(tempfile.gettempdir())]


def in_memory(folder: Path) -> bool:
    """Whether what lies in a folder takes main memory (tmpfs), as far as Linux says so."""
    try:
        device = folder.stat().st_dev
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:  # another system
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    # A line's third field is the device; the type follows the "-" behind fields that may be there or not.
    mounts = (fields for fields in map(str.split, lines) if fields[2:3] == [number] and "-" in fields[6:-1])
    return any(fields[fields.index("-", 6) + 1] in IN_MEMORY for fields in mounts)


def let_go(tensor: Tensor) -> None:
    """What is in its file need not be in memory until it is used again. Of a tensor that is not on disk nothing happens."""
    mapped = _maps.get(tensor.untyped_storage().data_ptr())
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # what was written stays in the file
        mapped.madvise(mmap.MADV_DONTNEED)


def resident(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy in memory where it is over a file of `Scratch`."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in _maps else tensor
