"""A folder of things that can be made again, bounded in size: the least recently used go first."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KeptFolder:
    """Entries that lie side by side in a folder of the user's, for its owner alone.

    Attributes:
        path: the folder.
        size: bound in bytes over all entries.
        entry: what the names of entries match. They are all files, or all directories (`directories`).
        stale: what the names match of files that no entry is made of any more: half-written ones, those of older versions.
    """

    path: Path
    size: int
    entry: re.Pattern[str]
    stale: re.Pattern[str] | None = None
    directories: bool = False

    def make(self) -> None:
        """Create the folder, and close it to others. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A folder that was there keeps its mode, and only its owner may change that.
        if self.path.stat().st_uid == os.geteuid():
            self.path.chmod(0o700)

    def used(self, entry: Path) -> None:
        """Make an entry the youngest; one that cannot be written to serves as it is."""
        with suppress(OSError):
            os.utime(entry)

    def evict(self, newest: Path | None = None) -> None:
        """Remove the oldest entries over the bound, links in the place of one, and what is stale.

        Nothing else: not what is none of the folder's own, nor what a link leads to. An entry that is larger than the bound
        takes no others with it, and goes.

        Args:
            newest: an entry that stays whatever its size, as it is wanted now.
        """
        found = [place for place in self.path.iterdir() if self._is_own(place)]
        total = 0
        # The one that is wanted now counts first, so that it takes room from older ones and not they from it.
        for place in sorted(found, key=lambda p: (p != newest, -p.lstat().st_mtime)):
            size = 0 if place.is_symlink() else _size(place)
            doomed = place.is_symlink() or not self.entry.fullmatch(place.name) or total + size > self.size
            if place != newest and doomed:
                _remove(place)
            else:
                total += size

    def _is_own(self, place: Path) -> bool:
        if self.entry.fullmatch(place.name):
            return place.is_symlink() or (place.is_dir() if self.directories else place.is_file())
        stale = self.stale is not None and self.stale.fullmatch(place.name) is not None
        return stale and (place.is_symlink() or place.is_file())


def _size(place: Path) -> int:
    return sum(p.stat().st_size for p in ([place] if place.is_file() else place.rglob("*")) if p.is_file())


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
