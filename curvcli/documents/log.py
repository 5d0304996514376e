"""Reading the log of a job that may still run: every state that its file can be found in. No torch."""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import BinaryIO

from pydantic import ValidationError

from curvcli.documents.record import Record
from curvcli.documents.shown import Shown
from curvcli.errors import InputError

LOG_NAME = "curvature.jsonl"
_CHUNK = 1 << 20
_LONGEST = 1 << 20  # bytes of one line; a record has a few hundred
# Of a log: a record takes some 3,400 bytes as an object, of a line of 550. A job of a million steps that measures every
# tenth writes 100,000.
_MOST, _RECORDS = 2**28, 2**18
_SHORTEN = "give its newest lines: tail -n 100000 LOG > NEW"
_TAIL = 4096  # bytes before the read position that must still be there: more than a record, whose step is at its beginning


@dataclass(frozen=True, repr=False)
class Log(Shown):
    """What is known of a log at one moment.

    `records` rise in step: where a resumed job goes back, its records replace those from that step on,
    which are counted in `superseded`. `gap` is the usual number of seconds between records, known after
    a few have arrived while watching; the records themselves carry no time.
    """

    path: Path
    exists: bool = False
    records: tuple[Record, ...] = ()
    damaged: int = 0
    damage: str | None = None  # the last damaged line: its number and what is wrong with it
    superseded: int = 0
    replaced: int = 0  # times that the file was truncated or replaced while watched
    half: bool = False  # the last line is not whole yet
    age: float | None = None  # seconds since the file was last written
    gap: float | None = None

    @property
    def stalled(self) -> bool:
        """Whether the last record is much older than the usual gap."""
        # Four gaps, as an evaluation or a save takes some; ten seconds where records come every second.
        return self.age is not None and self.gap is not None and self.age > max(4 * self.gap, self.gap + 10)


class Follower:
    """Reads what was appended since the last look. A file that shrinks or changes behind it is read anew."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._replaced = 0
        self._gaps: deque[float] = deque(maxlen=20)
        self._forget()

    def poll(self) -> Log:
        """Look once. Raises InputError where the file is there and cannot be read, or is larger than any job's."""
        try:
            with open(self.path, "rb", opener=_no_waiting) as stream:
                status = os.fstat(stream.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise InputError(f"{self.path} is no regular file", hint=f"name the job's {LOG_NAME} or its directory")
                _bounded(self.path, status.st_size)
                self._find_place(stream, status.st_ino, status.st_size)
                self._consume(stream)
        except (FileNotFoundError, NotADirectoryError):
            return self._state(None)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}", hint=f"name a readable {LOG_NAME}") from error
        return self._state(status.st_mtime)

    def _forget(self) -> None:
        self._inode: int | None = None
        self._offset = 0
        self._tail = b""
        self._skipping = False
        self._lines = 0
        self._records: list[Record] = []
        self._damaged = 0
        self._damage: str | None = None
        self._superseded = 0
        self._half = False
        self._arrival: float | None = None
        self._count = self._counted = 0

    def _find_place(self, stream: BinaryIO, inode: int, size: int) -> None:
        # The same inode and a larger size do not make it the same file: what was read last must be there still.
        if self._inode is not None:
            stream.seek(self._offset - len(self._tail))
            if inode != self._inode or size < self._offset or stream.read(len(self._tail)) != self._tail:
                self._forget()
                self._replaced += 1
        self._inode = inode
        stream.seek(self._offset)

    def _consume(self, stream: BinaryIO) -> None:
        rest = b""
        while chunk := stream.read(_CHUNK):
            _bounded(self.path, stream.tell())  # the size may be a wrong one: of /proc, of a file that grows
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                self._line(line)
            # Dropped up to its end, or a file without line ends would be kept in memory whole.
            if len(rest) > _LONGEST:
                self._skipping, rest = True, b""
        if rest and not self._skipping and isinstance(_parse(rest), Record):
            # Whole without its newline: the last line of a file written by hand. A newline to come is its own.
            self._line(rest)
            self._lines -= 1
            rest = b""
        self._half = bool(rest.strip()) or self._skipping
        self._offset = stream.tell() - len(rest)
        # From the file and not from what was read here: after one line there may be too little of it.
        self._tail = os.pread(stream.fileno(), min(_TAIL, self._offset), max(0, self._offset - _TAIL))

    def _line(self, line: bytes) -> None:
        self._lines += 1
        if self._skipping:
            self._skipping = False
            self._broken(f"longer than {_LONGEST >> 20} MiB")
            return
        if not line.strip():
            return
        record = _parse(line)
        if isinstance(record, str):
            self._broken(record)
            return
        while self._records and self._records[-1].step >= record.step:
            self._records.pop()
            self._superseded += 1
        if len(self._records) == _RECORDS:
            raise InputError(f"{self.path} has more than {_RECORDS:,} records", hint=_SHORTEN)
        self._records.append(record)
        self._count += 1

    def _broken(self, reason: str) -> None:
        self._damaged += 1
        self._damage = f"line {self._lines}: {reason}"

    def _state(self, written: float | None) -> Log:
        age = None
        if written is not None:
            # A file server's clock may be ahead of this machine's.
            age = max(0.0, self._clock() - written)
            if new := self._count - self._counted:
                # The first look finds any number of records at once: their times are not known.
                if self._arrival is not None and written > self._arrival:
                    self._gaps.append((written - self._arrival) / new)
                self._arrival, self._counted = written, self._count
        return Log(
            path=self.path,
            exists=written is not None,
            records=tuple(self._records),
            damaged=self._damaged,
            damage=self._damage,
            superseded=self._superseded,
            replaced=self._replaced,
            half=self._half,
            age=age,
            gap=median(self._gaps) if self._gaps else None,
        )


def load_records(path: Path) -> Log:
    """Read a log once.

    Raises:
        InputError: there is none, no line of it is a curv.curvature/1 record, or it is larger than any job's: over 256 MiB,
            or over 262,144 records.
    """
    log = Follower(path).poll()
    if not log.exists:
        raise InputError(f"{path} does not exist", hint=f"name the job's {LOG_NAME} or its directory")
    if log.damaged and not log.records:
        raise InputError(f"{path} is no curv.curvature/1 log: {log.damage}", hint="a tracker in the training job writes one")
    return log


def find_log(path: Path) -> Path | None:
    """The log that an argument means: a file itself; of a directory its own, or else the newest one level below.

    Raises InputError where it may not be looked into.
    """
    try:
        if not path.is_dir():
            return path if path.exists() else None
        if (own := path / LOG_NAME).exists():
            return own
        # The newest: a folder of runs is asked for while the last of them is running.
        below = sorted((found.stat().st_mtime, found) for found in path.glob(f"*/{LOG_NAME}"))
        return below[-1][1] if below else None
    except OSError as error:
        raise InputError(f"cannot look into {path}: {error.strerror}", hint=f"name a readable {LOG_NAME}") from error


def _parse(line: bytes) -> Record | str:
    """The record on a line, or what is wrong with it."""
    try:
        return Record.read(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else first["msg"].replace("at line 1 column", "at column")


def _bounded(path: Path, size: int) -> None:
    if size > _MOST:
        raise InputError(f"{path} is larger than {_MOST >> 20:,} MiB", hint=_SHORTEN)


def _no_waiting(path: str, flags: int) -> int:
    # Opening a named pipe would wait for its writer.
    return os.open(path, flags | os.O_NONBLOCK)
