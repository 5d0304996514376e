"""Reports already made, by the content of what they are of: a daily run pays for what is new."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from curvcli.errors import CurvError, UsageError
from curvcli.measurement import Directions
from curvcli.results import Report, load_report, write_whole

DEFAULT_SIZE = 2**30


@dataclass(frozen=True)
class Entry:
    """A report and the eigenvector that the next checkpoint starts from; None where it was too large to keep."""

    report: Report
    directions: Directions | None


class Cache(Protocol):
    """Where entries are looked up and kept."""

    def get(self, key: str) -> Entry | None: ...
    def put(self, key: str, entry: Entry) -> None: ...


class NoCache:
    """Keeps nothing."""

    def get(self, key: str) -> Entry | None:
        return None

    def put(self, key: str, entry: Entry) -> None:
        return None


class FileCache:
    """A directory of entries, the least recently used out first.

    Entries are written whole or not at all, the report last: without it an entry is not there. A damaged one is
    removed and counts as missing.

    Args:
        folder: default the user's cache directory (XDG_CACHE_HOME is honoured).
        size: bound in bytes; default CURV_CACHE_SIZE (as 500M or 2G), else 1 GiB.

    Raises:
        UsageError: CURV_CACHE_SIZE is no size.
    """

    def __init__(self, folder: Path | None = None, size: int | None = None) -> None:
        self.folder = folder or user_cache_path("curv") / "reports"
        self.size = size if size is not None else _size(os.environ.get("CURV_CACHE_SIZE"))
        self.complaint: str | None = None

    def get(self, key: str) -> Entry | None:
        report, vectors = self._files(key)
        if not report.is_file():
            return None
        try:
            entry = Entry(load_report(report), _read(vectors) if vectors.is_file() else None)
        except (CurvError, SafetensorError, OSError, ValueError):
            with suppress(OSError):
                report.unlink()
            return None
        with suppress(OSError):  # a cache that is read-only serves as it is
            os.utime(report)
        return entry

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry. Where that fails, `complaint` says why and nothing is lost but time."""
        report, vectors = self._files(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                content = _written(entry.directions) if entry.directions else b""
                if len(content) > self.size / 4:
                    self.complaint = (
                        f"the cache of {self.size / 1e9:.3g} GB is too small for the eigenvector that the next checkpoint "
                        f"starts from ({len(content) / 1e9:.3g} GB), so only reports are kept; set CURV_CACHE_SIZE"
                    )
                elif content:
                    write_whole(vectors, content)
                write_whole(report, entry.report.to_json().encode())
                self._evict()
        except (CurvError, OSError) as error:
            self.complaint = f"the cache {self.folder} cannot be written, so nothing is kept: {error}"

    def _files(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.json", self.folder / f"{key}.safetensors"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.folder / ".lock", timeout=60):
            yield

    def _evict(self) -> None:
        """Remove the oldest entries over the bound, vectors without a report, and what a killed run left half-written."""
        reports = sorted(self.folder.glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True)
        total = 0
        kept = set()
        for report in reports:
            files = [p for p in self._files(report.stem) if p.is_file()]
            size = sum(p.stat().st_size for p in files)
            if total + size <= self.size:  # one that is larger than all takes no others with it
                total += size
                kept |= set(files)
        for file in self.folder.iterdir():
            if file not in kept and file.name != ".lock":
                file.unlink()


def checkpoint_digest(path: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, wherever it lies. Raises OSError."""
    digest = hashlib.sha256()
    for name, file in _files_of(path):
        with file.open("rb") as stream:
            digest.update(json.dumps([name, hashlib.file_digest(stream, "sha256").hexdigest()]).encode())
    return digest.hexdigest()


def checkpoint_stamp(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a checkpoint's files: differs where one was written in between. Raises OSError."""
    stats = [(name, file.stat()) for name, file in _files_of(path)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _files_of(path: Path) -> list[tuple[str, Path]]:
    """A checkpoint's files by their names inside it, linked directories too."""
    if path.is_file():
        return [(path.name, path)]
    seen: set[Path] = set()
    found = []
    for folder, folders, names in os.walk(path, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:  # a link back
            folders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names]
    return sorted((p.relative_to(path).as_posix(), p) for p in found if p.is_file())


def cache_key(**parts: Any) -> str:
    """Name of an entry: a digest of everything that the report depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _written(directions: Directions) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in directions.items()})


def _read(path: Path) -> Directions:
    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not iterable itself


def _size(text: str | None) -> int:
    if not text:
        return DEFAULT_SIZE
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"CURV_CACHE_SIZE {text!r} is no size", hint="as in 500M or 2G")
    power: int = " KMGT".index(match[2].upper() or " ")
    return int(match[1]) * int(1024**power)
