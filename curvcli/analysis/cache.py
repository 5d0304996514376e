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
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock
from platformdirs import user_cache_path

from curvcli.documents import Report, write_whole
from curvcli.errors import CurvError
from curvcli.files.kept import KeptFolder
from curvcli.files.parse import byte_size, parse_json, read_limited

if TYPE_CHECKING:
    from curvcli.curvature.ranks import Ranks

DEFAULT_SIZE = 2**30
_KEY_BYTES = 32
_ENTRY = re.compile(r"[0-9a-f]{64}\.json")
# Half-written, or the eigenvectors that version 0.1.0 kept beside a report.
_STALE = re.compile(r"\.[0-9a-f]{60}\.[0-9a-f]{8}|[0-9a-f]{64}\.safetensors")


class Cache(Protocol):
    """Where reports are looked up and kept."""

    def get(self, key: str) -> Report | None:
        """The report kept under a key that `cache_key` made; None where there is none."""
        ...

    def put(self, key: str, report: Report) -> None:
        """Keep a report under a key. Nothing is raised where it cannot be written: a cache only saves time."""
        ...


class NoCache:
    """Keeps nothing."""

    def get(self, key: str) -> Report | None:
        """None, whatever the key: every report is made anew."""
        return None

    def put(self, key: str, report: Report) -> None:
        """Drop the report."""


class RankedCache:
    """A cache that rank 0 looks into, for all."""

    def __init__(self, cache: Cache, ranks: Ranks) -> None:
        self.cache, self.ranks = cache, ranks

    def get(self, key: str) -> Report | None:
        """What rank 0 has under its key."""
        found = self.cache.get(key) if self.ranks.rank == 0 else None
        # As text: the others need not have rank 0's disk.
        text = self.ranks.first_text(found.to_json() if found is not None else "")
        return Report.model_validate_json(text) if text else None

    def put(self, key: str, report: Report) -> None:
        """Rank 0 keeps it."""
        if self.ranks.rank == 0:
            self.cache.put(key, report)


class MemoryCache:
    """Keeps reports, and what contents were digested, as long as this process looks at one run.

    Args:
        behind: a cache that outlives it, asked where this one has nothing; every report goes there too.
    """

    def __init__(self, behind: Cache | None = None) -> None:
        self.behind = behind or NoCache()
        self._reports: dict[str, Report] = {}

    def get(self, key: str) -> Report | None:
        """The report kept here, or by the cache behind."""
        if key not in self._reports and (found := self.behind.get(key)) is not None:
            self._reports[key] = found
        return self._reports.get(key)

    def put(self, key: str, report: Report) -> None:
        """Keep a report, here and behind."""
        self._reports[key] = report
        self.behind.put(key, report)


class FileCache:
    """A directory of reports, the least recently used out first.

    Entries are written whole or not at all. Each is signed with a key that lies beside them, and everything is readable by
    its owner alone. So an entry that was edited, damaged, renamed
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
        self.kept = KeptFolder(self.folder, self.size, _ENTRY, _STALE)
        self.complaint: str | None = None

    def get(self, key: str) -> Report | None:
        """The report under a key, which then counts as just used; None where there is none that is signed.

        An entry that cannot be read, or whose signature is not right for this key, is deleted.
        """
        file = self.folder / f"{key}.json"
        if not (_is_plain(file) and (secret := self._secret())):
            return None
        try:
            said = parse_json(read_limited(file, 2**26))  # bytes, more than any report has
            if not hmac.compare_digest(said["signature"], _signature(secret, key, said["report"])):
                raise ValueError("it was not signed here")
            report = Report.model_validate_json(said["report"])
        except (CurvError, OSError, ValueError, KeyError, TypeError):
            with suppress(OSError):
                file.unlink()
            return None
        self.kept.used(file)
        return report

    def put(self, key: str, report: Report) -> None:
        """Keep a report. Where that fails, `complaint` says why and nothing is lost but time."""
        try:
            self.kept.make()
            # Two writers would make two keys. Readers need no lock: entries are replaced whole.
            with self._locked():
                secret = self._secret() or self._new_secret()
                text = report.to_json()
                said = {"signature": _signature(secret, key, text), "report": text}
                write_whole(self.folder / f"{key}.json", json.dumps(said).encode(), private=True)
                self.kept.evict()
        except (CurvError, OSError) as error:
            self.complaint = f"the cache {self.folder} cannot be written, so nothing is kept: {error}"

    def _secret(self) -> bytes | None:
        """The key that entries are signed with; None where there is none that only this user can have written."""
        try:
            # No link that somebody put there is followed, and no pipe waited for.
            handle = os.open(self.folder / ".key", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(handle, "rb") as stream:
                found = os.fstat(handle)
                private = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
                secret = stream.read(_KEY_BYTES + 1) if private else b""  # one more, to see that it ends
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


def _is_plain(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _signature(secret: bytes, key: str, report: str) -> str:
    # The key is signed too, so that a report cannot be renamed to stand for another measurement.
    return hmac.new(secret, json.dumps([key, report]).encode(), "sha256").hexdigest()


@cache
def method_digest() -> str:
    """SHA-256 over the sources of this package and its coefficients, but for what only shows.

    So a changed method serves no old number.
    """
    root = Path(__file__).parent.parent
    found = [path for kind in ("*.py", "*.json") for path in root.rglob(kind)]
    sources = {p.relative_to(root): p for p in found if p.relative_to(root).parts[0] not in ("cli", "render")}
    return sha256(json.dumps([(str(name), _digest(p)) for name, p in sorted(sources.items())]).encode()).hexdigest()


_digests: dict[Path, tuple[list[tuple[str, int, int]], str]] | None = None


@contextmanager
def digests_kept() -> Iterator[None]:
    """Within, files that have the sizes and times that they had are not read again to be digested: for who looks often."""
    global _digests
    before, _digests = _digests, {}
    try:
        yield
    finally:
        _digests = before


def checkpoint_digest(path: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, wherever it lies. Raises OSError."""
    if _digests is None:
        return _content_digest(path)
    stamp = checkpoint_stamp(path)
    known = _digests.get(path)
    if known is None or known[0] != stamp:
        known = _digests[path] = stamp, _content_digest(path)
    return known[1]


def _content_digest(path: Path) -> str:
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
    """A checkpoint's files by their names inside it.

    Behind directories that link out of it nothing is read (SECURITY.md), so nothing there counts: a link to / would be the
    whole disk.
    """
    if path.is_file():
        return [(path.name, path)]
    root = path.resolve()
    seen: set[Path] = set()
    found = []
    for folder, folders, names in os.walk(path, followlinks=True):
        real = Path(folder).resolve()
        if real in seen or not real.is_relative_to(root):  # a link back, or out
            folders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names]
    return sorted((p.relative_to(path).as_posix(), p) for p in found if p.is_file())


def cache_key(**parts: Any) -> str:
    """Name of an entry: a digest of everything that the report depends on, the method too."""
    return sha256(json.dumps({**parts, "method": method_digest()}, sort_keys=True, default=str).encode()).hexdigest()
