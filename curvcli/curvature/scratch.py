"""Vectors on disk: the basis of an eigensolver where memory has no room for it.

A vector is a tensor over a file that is mapped into memory and has no name any more, so it goes when the tensor does, or
the process. Whoever has read or written one lets go of it, and the system may take its pages back; it streams in again when
it is next asked for. What a tensor may be used for stays as it was: no solver sees where its vectors lie.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from curvcli.errors import InputError

_maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by the address of the tensor over each


@dataclass(frozen=True)
class Scratch:
    """A folder for vectors.

    Args:
        folder: on a disk. A file system that lies in memory (tmpfs) saves none.
    """

    folder: Path

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU that is not filled, over a file of its own. Raises InputError where the disk is full."""
        nbytes = prod(shape) * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # All of it now: a write into a hole of a full disk would end the process with SIGBUS.
                os.posix_fallocate(file.fileno(), 0, nbytes)
                mapped = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise InputError(
                f"cannot keep {nbytes / 2**30:.2f} GiB of vectors in {self.folder}: {error.strerror or error}",
                hint="give more --memory, or a disk with room as TMPDIR",
            ) from error
        found = torch.frombuffer(mapped, dtype=dtype).view(shape)
        _maps[found.data_ptr()] = mapped
        return found

    @property
    def free(self) -> int:
        """Bytes that there is room for."""
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize


def scratch() -> Scratch:
    """Where TMPDIR says; else /var/tmp, which by custom lies on a disk and not, as /tmp often does, in memory."""
    folder = Path("/var/tmp")  # noqa: S108  (files in it have no name)
    given = os.environ.get("TMPDIR")
    usable = folder.is_dir() and os.access(folder, os.W_OK)
    return Scratch(Path(given or (folder if usable else tempfile.gettempdir())))


def let_go(tensor: Tensor) -> None:
    """Its pages need not be in memory until it is used again. Of a tensor that is not on disk nothing happens."""
    mapped = _maps.get(tensor.data_ptr())
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # what was written stays in the file
        mapped.madvise(mmap.MADV_DONTNEED)
