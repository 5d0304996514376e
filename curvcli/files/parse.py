"""Limits on small files of anybody's (JSON, TOML), checked before memory or time is given to them. No torch."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from curvcli.errors import InputError, UsageError

# Each value takes at most some 250 bytes as an object.
_VALUES = 5_000_000
_TOML_BYTES, _TOML_DEPTH = 2**20, 16
# Where in TOML dots and brackets mean nothing. Read from the left, an alternative begins where TOML's own token does.
_TOML_TEXT = re.compile(r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL)


def read_limited(path: Path, most: int) -> bytes:
    """A file's content, of at most so many bytes.

    Raises:
        InputError: it is no regular file, which might never end or be gone at the second look, or it is larger.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file", hint="a pipe or device cannot be read twice: save it first")
    content = b""
    if (size := path.stat().st_size) <= most:
        with path.open("rb") as stream:
            content = stream.read(most + 1)  # the size may be a wrong one: of /proc, of a file that grows
    if max(size, len(content)) > most:
        raise InputError(f"{path} is larger than {most >> 20:,} MiB", hint="no such file is: check that it is the right one")
    return content


def parse_json(content: bytes) -> Any:
    """Plain data of JSON.

    Raises:
        ValueError: it is none, nests too deep, or has more than five million values.
    """
    # Every value but the first follows one of these (keys of objects go with theirs), so the count bounds what is made.
    if content.count(b",") + content.count(b"[") + content.count(b"{") > _VALUES:
        raise ValueError(f"more than {_VALUES:,} values")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file of at most 1 MiB, whose keys and arrays nest at most 16 levels. Raises InputError.

    tomllib calls itself for every bracket, and walks through all parts of a dotted key for each of them.
    """
    try:
        text = read_limited(path, _TOML_BYTES).decode()
        bare = _TOML_TEXT.sub("_", text)
        if any(piece.count(".") >= _TOML_DEPTH for piece in re.split(r"[\n,=\[\]{}]", bare)) or _nesting(bare) > _TOML_DEPTH:
            raise ValueError(f"it nests deeper than {_TOML_DEPTH} levels")
        return tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable TOML: {str(error)[:300]}", hint="mend or remove it") from error


def _nesting(bare: str) -> int:
    deepest = depth = 0
    for bracket in re.findall(r"[\[{\]}]", bare):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def byte_size(text: str, name: str) -> int:
    """Bytes of a size such as 500M or 2.5G, of an option or environment variable of that name. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,15}|\d{1,12}\.\d{1,6}(?=[KMGT]))([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if not match:
        raise UsageError(f"{name} {text[:40]!r} is no size", hint="as in 500M or 2G")
    power: int = " KMGT".index(match[2].upper() or " ")
    unit = int(1024**power)
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def inside(directory: Path, name: object) -> Path:
    """The file that an index names, which must lie in the index's directory, also after links. Raises InputError.

    Links of the Hugging Face cache, from snapshots/<revision> into the blobs beside, count as inside.
    """
    path = directory / name if isinstance(name, str) and name and "\0" not in name else directory
    try:
        home, real = directory.resolve(), path.resolve()
        if real.is_symlink():  # from Python 3.13 on a loop is given back and not raised
            raise RuntimeError("a link to itself")
    except (OSError, RuntimeError) as error:  # a link to itself
        raise InputError(f"cannot follow {str(path)[:400]}: {str(error)[:100]}", hint="copy the file again") from error
    # snapshots/<revision>/model.safetensors is a link to ../../blobs/<digest> there.
    cached = home.parent.name == "snapshots" and real.parent == home.parents[1] / "blobs"
    plain = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
    if path == directory or not plain or not (real.is_relative_to(home) or cached):
        raise InputError(
            f"a path of the checkpoint in {directory} leads outside its directory: {str(name)[:200]!r}",
            hint="do not trust this checkpoint",
        )
    return path
