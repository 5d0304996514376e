"""Checkpoints and data behind a URL (hf://, s3://, gs://, https://, ...): fetched once by fsspec, then read as files."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from platformdirs import user_cache_path

from curvcli.errors import InputError, counted, plain
from curvcli.files.kept import KeptFolder
from curvcli.files.runs import step_of

# pathlib takes one of the two slashes; a scheme of one letter would be a drive.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)", re.IGNORECASE)
_BACKENDS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
# What no reader looks at, in directories that hold the same weights several times.
_SKIPPED = re.compile(r"rng_state.*|.*\.(?:onnx|h5|msgpack|gguf|ot)")
# The same weights in transformers' two forms, of which its readers take the first. FSDP's pytorch_model_fsdp is neither.
_SAFE = re.compile(r"model(?:-\d+-of-\d+)?\.safetensors")
_UNSAFE = re.compile(r"pytorch_model(?:-\d+-of-\d+)?\.bin(?:\.index\.json)?")
_TIMES = ("LastModified", "Last-Modified", "last_modified", "mtime", "created")
_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors")
# Several checkpoints with optimizer state of a model of some billion parameters.
MOST = 64 * 2**30
_COPY = re.compile("[0-9a-f]{32}")
_T = TypeVar("_T")


def fetched(path: Path, folder: Path | None = None) -> Path:
    """A local copy of what a URL names: a file, a checkpoint directory, or the newest checkpoint of a run.

    Copies are whole or not there at all, under a name made of the URL and of what the far side says of the files (size
    and entity tag or time), so that a changed file is fetched again. The oldest go when they take more than 64 GiB.

    Args:
        folder: where copies are kept; default the user's cache directory.

    Raises:
        InputError: no backend is installed, or the URL cannot be read.
    """
    url = _address(path)
    if url is None:
        return path

    def look(system: Any, root: str) -> tuple[Any, str, dict[str, dict[str, Any]]]:
        # Not all of a run, which may be terabytes: whoever wants every checkpoint asks `checkpoints_behind` for their URLs.
        newest = [root, *_numbered(system, root)][-1]
        return system, newest, _files(system, newest)

    system, root, files = _reach(url, look)
    if not files:
        raise InputError(f"{url} does not exist or is empty", hint="check the address and your access to it")
    stamp = json.dumps([url, root, [(name, _version(info)) for name, info in sorted(files.items())]])
    copies = KeptFolder(folder or user_cache_path("curv") / "remote", MOST, _COPY, directories=True)
    place = copies.path / hashlib.sha256(stamp.encode()).hexdigest()[:32]
    target = place / PurePosixPath(root).name
    if not target.exists():
        size = sum(int(info.get("size") or 0) for info in files.values())
        print(
            plain(f"curv: fetching {counted(len(files), 'file')}, {size / 1e6:,.1f} MB, from {url}"),
            file=sys.stderr,
            flush=True,
        )
        try:
            copies.make()
            _download(lambda far, near: system.get_file(far, near), root, files, target)
        except OSError as error:
            raise InputError(f"cannot keep {url} in {place}: {error}", hint="free space, or set XDG_CACHE_HOME") from error
        except Exception as error:
            raise _unreachable(url, error) from error
        with suppress(OSError):  # another process may be at it too
            copies.evict(place)
    copies.used(place)
    return target


def checkpoints_behind(path: Path) -> list[Path]:
    """The checkpoints of a run behind a URL, as URLs in step order; none where it is no run. Raises InputError."""
    url = _address(path)
    if url is None:
        return []
    found = _reach(url, lambda system, root: [system.unstrip_protocol(name) for name in _numbered(system, root)])
    return [Path(name) for name in found]


def _address(path: Path) -> str | None:
    match = _URL.fullmatch(str(path))
    return f"{match[1].lower()}://{match[2]}" if match else None


def _reach(url: str, look: Callable[[Any, str], _T]) -> _T:
    """What is seen of a URL. Raises InputError."""
    try:
        from fsspec.core import url_to_fs

        return look(*url_to_fs(url))
    except ImportError as error:
        package = _BACKENDS.get(url.partition(":")[0])
        hint = f"pip install {package}" if package else "install the fsspec backend of that scheme"
        raise InputError(f"{url} needs a package that is not installed: {_line(error)}", hint=hint) from error
    except Exception as error:  # every backend raises its own
        raise _unreachable(url, error) from error


def _numbered(system: Any, root: str) -> list[str]:
    """The checkpoints in a run, in step order. What has a step in its own name is no run, whatever lies in it."""
    if step_of(Path(PurePosixPath(root).name)) is not None or system.info(root).get("type") == "file":
        return []
    steps = {}
    for entry in system.ls(root, detail=True):
        # Object stores list a folder with a slash at its end.
        name = PurePosixPath(entry["name"].rstrip("/"))
        step = step_of(Path(name.name))
        if step is not None and (entry.get("type") == "directory" or name.suffix in _CHECKPOINTS):
            steps[entry["name"].rstrip("/")] = (step, name.name)
    return sorted(steps, key=lambda name: steps[name])


def _files(system: Any, root: str) -> dict[str, dict[str, Any]]:
    """Files by their path under the root; one file by the empty path."""
    info = system.info(root)
    if info.get("type") == "file":
        return {"": info}
    found = {}
    for name, entry in system.find(root, detail=True).items():
        inner = name[len(root.rstrip("/")) :].lstrip("/") if name.startswith(root.rstrip("/")) else PurePosixPath(name).name
        if entry.get("type") == "file" and not _SKIPPED.fullmatch(PurePosixPath(inner).name):
            # A listing is the far side's word: such a name would be written outside the copy.
            if ".." in PurePosixPath(inner).parts or PurePosixPath(inner).is_absolute():
                raise InputError(f"{root} lists a file outside itself: {inner!r:.200}", hint="do not trust this checkpoint")
            found[inner] = entry
    if any(_SAFE.fullmatch(name) for name in found):
        found = {name: entry for name, entry in found.items() if not _UNSAFE.fullmatch(name)}
    return found


def _download(get: Callable[[str, str], None], root: str, files: dict[str, dict[str, Any]], target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    # Beside its target, as a rename is whole on one file system alone.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
        near = Path(partial) / target.name
        for inner, entry in files.items():
            place = near / inner if inner else near
            place.parent.mkdir(parents=True, exist_ok=True)
            get(entry.get("name") or root, str(place))
        try:
            near.rename(target)
        except OSError:  # another process was faster, with the same content: a directory that is not empty stays
            if not target.exists():
                raise


def _version(info: dict[str, Any]) -> list[str]:
    # Each backend names them in its own way, and none has all.
    keys = ("size", "ETag", "etag", "blob_id", "md5Hash", *_TIMES)
    return [str(info[key]) for key in keys if info.get(key) is not None]


def _unreachable(url: str, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    return InputError(
        f"cannot read {url}: {type(error).__name__}: {_line(error)}", hint="check the address and your access to it"
    )


def _line(error: BaseException) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
