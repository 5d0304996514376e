"""What the user's own code is, as a digest: so that a report is taken for another's no more once the code has changed."""

from __future__ import annotations

import json
import os
import secrets
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path

from curvcli.models.user_code import imported

_SETTINGS = {".json", ".yaml", ".yml", ".toml", ".ini", ".cfg"}
_SKIPPED = {"__pycache__", "site-packages", "node_modules"}
_MOST_ENTRIES, _MOST_BYTES = 20_000, 2**26  # of folders that are looked through, and of files that are read
_OURS = b'"schema":"curv.'  # of documents that curv writes, which change from call to call


def code_digest(spec: str) -> str:
    """SHA-256 of all that a module of the user's can be made of; of this process alone where that is too much.

    - every .py file of its package, or of the folder that it lies in, and below;
    - settings (JSON, YAML, TOML, INI) in that folder and in the working directory, without curv's own documents;
    - modules that are loaded from elsewhere, but for Python's own and installed packages, which count by name and version.

    Not other files that it reads, nor the environment. Where something has changed since the first call, nobody knows what
    this process has loaded of it; and where a module was loaded since, as a network that is built or runs can do, that is
    in none of these files, no other process could tell that it has changed. The digest is of this process alone then, too:
    whoever keeps what was made by the code asks once more when it is made.

    Args:
        spec: as `package.module:name`.

    Raises:
        UsageError: it cannot be imported.
    """
    name = spec.partition(":")[0]
    if name not in sys.modules:
        imported(spec, "the user's")
    loaded = frozenset(_loaded())
    at_first, first = _first.get(spec, (loaded, None))
    try:
        files = _files(_home(sys.modules.get(name.partition(".")[0]))) | at_first
        found = _digest(files)
    except (OSError, _TooMuchError):
        return _of_process(spec)
    _first.setdefault(spec, (loaded, found))
    return found if first in (None, found) and loaded <= files else _of_process(found)


_first: dict[str, tuple[frozenset[Path], str]] = {}
_process = secrets.token_hex()


def _of_process(text: str) -> str:
    return sha256(f"{_process} {text}".encode()).hexdigest()


def _files(home: Path | None) -> frozenset[Path]:
    if home is None:
        raise _TooMuchError
    return frozenset([*_below(home), *_settings(home), *_settings(Path.cwd())])


def _digest(files: Iterable[Path]) -> str:
    if sum(file.stat().st_size for file in files) > _MOST_BYTES:
        raise _TooMuchError
    found = [(str(file), sha256(file.read_bytes()).hexdigest()) for file in sorted(files)]
    installed = sorted({f"{each.name} {each.version}" for each in distributions()})
    return sha256(json.dumps([found, installed]).encode()).hexdigest()


class _TooMuchError(Exception):
    """More files than a package's, as where the working directory is a home, or no folder."""


def _home(module: object) -> Path | None:
    """The folder that a top-level module and what is beside it lie in."""
    file, paths = getattr(module, "__file__", None), list(getattr(module, "__path__", []))
    return Path(file).resolve().parent if file else Path(paths[0]).resolve() if len(paths) == 1 else None


def _below(home: Path) -> Iterator[Path]:
    seen = 0
    for folder, folders, names in os.walk(home):
        seen += len(folders) + len(names)
        if seen > _MOST_ENTRIES:
            raise _TooMuchError
        environment = [name for name in folders if (Path(folder, name) / "pyvenv.cfg").exists()]
        folders[:] = [name for name in folders if name not in {*_SKIPPED, *environment} and not name.startswith(".")]
        # An editor's lock is a link to nothing, and of a pipe or a device there is no end.
        yield from (file for name in names if name.endswith(".py") and (file := Path(folder, name)).is_file())


def _settings(folder: Path) -> Iterator[Path]:
    for file in folder.iterdir():
        if file.suffix.lower() in _SETTINGS and file.is_file() and _OURS not in b"".join(file.open("rb").read(512).split()):
            yield file.resolve()


def _loaded() -> Iterator[Path]:
    """Files of modules that are neither Python's, nor an installed package's, nor curv's."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] not in ("curvcli", "__main__") and isinstance(file, str) and (own := _own(file)):
            yield own


@cache  # there are thousands, and it is asked for with each checkpoint
def _own(file: str) -> Path | None:
    """Where a module's file lies; None where that is no file, or an installed package's or Python's."""
    place = Path(file).resolve()
    installed = {"site-packages", "dist-packages"} & set(place.parts)  # of whatever Python, and of a user's own
    inside = any(place.is_relative_to(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib"))
    return None if installed or inside or not place.is_file() else place
