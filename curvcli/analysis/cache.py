"""Reports already made, by the content of what they are of: a daily run pays for what is new."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from curvcli.analysis.solve import Directions
from curvcli.documents import Report, write_whole
from curvcli.errors import CurvError
from curvcli.files.parse import byte_size, parse_json, read_limited

DEFAULT_SIZE = 2**30
_KEY_BYTES = 32
# An entry, or one half-written.
_OWN = re.compile(r"[0-9a-f]{64}\.(?:json|safetensors)|\.[0-9a-f]{60}\.[0-9a-f]{8}")


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

    Entries are written whole or not at all, the report last: without it an entry is not there. Each is signed with a key
    that lies beside them, and everything is readable by its owner alone. So an entry that was edited, damaged, renamed
    or made by anybody else counts as missing. Whoever can read the key, as the user's own programs can, can sign.

    Args:
        folder: default the user's cache directory (XDG_CACHE_HOME is honoured).
        size: bound in bytes; default CURV_CACHE_SIZE (as 500M or 2G), else 1 GiB.

    Raises:
        UsageError: CURV_CACHE_SIZE is no size.
    """

    def __init__(self, folder: Path | None = None, size: int | None = None) -> None:
        self.folder = folder or user_cache_path("curv") / "reports"
        given = os.environ.get("CURV_CACHE_SIZE")
        self.size = size if size is not None else byte_size(given, "CURV_CACHE_SIZE") if given else DEFAULT_SIZE
        self.complaint: str | None = None

    def get(self, key: str) -> Entry | None:
        file, vectors = self._files(key)
        if not (_is_plain(file) and (secret := self._secret())):
            return None
        try:
            said = parse_json(read_limited(file, 2**26))
            if not hmac.compare_digest(said["signature"], _signature(secret, key, said["report"], said["vectors"])):
                raise ValueError("it was not signed here")
            report = Report.model_validate_json(said["report"])
            directions = None
            if said["vectors"] is not None:
                if not _is_plain(vectors) or _digest(vectors) != said["vectors"]:
                    raise ValueError("its vectors are others")
                directions = _read(vectors)
        except (CurvError, SafetensorError, OSError, ValueError, KeyError, TypeError):
            with suppress(OSError):
                file.unlink()
            return None
        with suppress(OSError):  # a cache that is read-only serves as it is
            os.utime(file)
        return Entry(report, directions)

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry. Where that fails, `complaint` says why and nothing is lost but time."""
        file, vectors = self._files(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.folder.stat().st_uid == os.geteuid():
                self.folder.chmod(0o700)
            with self._locked():
                secret = self._secret() or self._new_secret()
                content = _written(entry.directions) if entry.directions else b""
                if len(content) > self.size / 4:
                    self.complaint = (
                        f"the cache of {self.size / 1e9:.3g} GB is too small for the eigenvector that the next checkpoint "
                        f"starts from ({len(content) / 1e9:.3g} GB), so only reports are kept; set CURV_CACHE_SIZE"
                    )
                    content = b""
                digest = sha256(content).hexdigest() if content else None
                if content:
                    write_whole(vectors, content, private=True)
                report = entry.report.to_json()
                said = {"signature": _signature(secret, key, report, digest), "report": report, "vectors": digest}
                write_whole(file, json.dumps(said).encode(), private=True)
                self._evict()
        except (CurvError, OSError) as error:
            self.complaint = f"the cache {self.folder} cannot be written, so nothing is kept: {error}"

    def _files(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.json", self.folder / f"{key}.safetensors"

    def _secret(self) -> bytes | None:
        """The key that entries are signed with; None where there is none that only this user can have written."""
        try:
            handle = os.open(self.folder / ".key", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(handle, "rb") as stream:
                found = os.fstat(handle)
                private = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
                secret = stream.read(_KEY_BYTES + 1) if private else b""
        except OSError:
            return None
        return secret if len(secret) == _KEY_BYTES else None

    def _new_secret(self) -> bytes:
        secret = secrets.token_bytes(_KEY_BYTES)
        write_whole(self.folder / ".key", secret, private=True)
        return secret

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.folder / ".lock", timeout=60, mode=0o600):
            yield

    def _evict(self) -> None:
        """Remove the oldest entries over the bound, vectors without a report, and what a killed run left half-written.

        Nothing else: not a file that is none of the cache's, nor what a link leads to.
        """
        own = [p for p in self.folder.iterdir() if _OWN.fullmatch(p.name) and (p.is_symlink() or p.is_file())]
        reports = [p for p in own if p.suffix == ".json" and _is_plain(p)]
        total = 0
        kept = set()
        for report in sorted(reports, key=lambda p: p.stat().st_mtime, reverse=True):
            files = [p for p in self._files(report.stem) if _is_plain(p)]
            size = sum(p.stat().st_size for p in files)
            if total + size <= self.size:  # one that is larger than all takes no others with it
                total += size
                kept |= set(files)
        for file in own:
            if file not in kept:
                file.unlink()


def _is_plain(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _signature(secret: bytes, key: str, report: str, vectors: str | None) -> str:
    return hmac.new(secret, json.dumps([key, report, vectors]).encode(), "sha256").hexdigest()


@cache
def method_digest() -> str:
    """SHA-256 over the sources of this package, but for those that only show: a changed method serves no old number."""
    root = Path(__file__).parent.parent
    sources = {p.relative_to(root): p for p in root.rglob("*.py") if p.relative_to(root).parts[0] not in ("cli", "render")}
    return sha256(json.dumps([(str(name), _digest(p)) for name, p in sorted(sources.items())]).encode()).hexdigest()


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
    """Name of an entry: a digest of everything that the report depends on, the method too."""
    return sha256(json.dumps({**parts, "method": method_digest()}, sort_keys=True, default=str).encode()).hexdigest()


def _written(directions: Directions) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in directions.items()})


def _read(path: Path) -> Directions:
    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not iterable itself
