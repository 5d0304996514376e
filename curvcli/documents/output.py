"""Outputs: written whole or not at all, behind links, and never in the place of a device."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from curvcli.errors import InputError

_HINT = "choose a writable place with -o"


def check_writable(path: Path) -> None:
    """Fail before the work and not after it. Raises InputError where `write_whole` would."""
    with _told(path):
        _behind(path)


def write_whole(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file whole or not at all.

    A link stays, and the file behind it is replaced; one that exists keeps its permissions. What has no content to
    replace is written through: a pipe, a terminal, /dev/null, a file that the process has open (/dev/stdout, /dev/fd/3).

    Args:
        private: for its owner alone, and in the place of a link, which is not followed.

    Raises:
        InputError: it cannot be written, is a directory, a disk or a socket, or a pipe that nobody reads.
    """
    with _told(path):
        if private:
            _replace(path, content, 0o600, keep=False)
        elif (place := _behind(path)) is not None:
            _replace(place, content, 0o666, keep=True)
        else:
            with os.fdopen(_open(path), "wb") as stream:
                stream.write(content)


def _behind(path: Path) -> Path | None:
    """The regular file, there or to come, that a path means behind its links; None for what is written through."""
    if _own_descriptor(path) is not None:
        return None
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return None
    place = Path(os.path.realpath(path))
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a disk" if stat.S_ISBLK(mode) else "no file"
        raise InputError(f"cannot write {path}: it is {what}", hint=_HINT)
    if not place.parent.is_dir() or not os.access(place.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: {place.parent} is not a writable directory", hint=_HINT)
    return place


def _open(path: Path) -> int:
    if (number := _own_descriptor(path)) is not None:
        # What was printed before has to come before.
        sys.stdout.flush()
        return os.dup(number)
    handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)  # a pipe that nobody reads would be waited for
    os.set_blocking(handle, True)
    return handle


def _own_descriptor(path: Path) -> int | None:
    """N of /dev/fd/N and its like, which /dev/stdout leads to. Opened anew, its file would be written from the start."""
    own = os.path.realpath("/dev/fd")
    # /dev/stdout leads to /proc/self/fd/1, that to /proc/N/fd/1; a ring of links ends too.
    for _ in range(8):
        if os.path.realpath(path.parent) == own and path.name.isascii() and path.name.isdigit():
            return int(path.name[:9])
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def _replace(place: Path, content: bytes, mode: int, *, keep: bool) -> None:
    # Beside it, as a rename is whole on one file system alone; a random name, as two jobs may write at once.
    temporary = place.with_name(f".{place.name[:60]}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            # Some file systems order the rename before the data: after a crash the file would be there and empty.
            os.fsync(stream.fileno())
        if keep:
            with suppress(OSError):
                temporary.chmod(stat.S_IMODE(place.stat().st_mode))
        temporary.replace(place)
    except BaseException:
        temporary.unlink()
        raise


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of the system as one line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise InputError(f"cannot write {path}: nobody reads it", hint="start its reader first") from error
        raise InputError(f"cannot write {path}: {error.strerror}", hint=_HINT) from error
