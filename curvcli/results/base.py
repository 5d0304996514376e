"""What every document shares: strict JSON, findings, versions, and files written whole or not at all. No torch."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from curvcli.errors import InputError

Severity = Literal["info", "warning", "error"]


class Document(BaseModel):
    """Strict JSON in and out: unknown fields, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    def to_json(self) -> str:
        """Strict JSON text, one trailing newline."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


D = TypeVar("D", bound=Document)


class Finding(Document):
    code: str
    severity: Severity
    message: str


class Versions(Document):
    curvcli: str
    torch: str
    transformers: str | None
    python: str

    @classmethod
    def installed(cls) -> Self:
        """This package and what its numbers depend on, from their metadata: nothing is imported for it."""
        found: dict[str, str | None] = {}
        for package in ("curvcli", "torch", "transformers"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = None
        return cls.model_validate({**found, "python": platform.python_version()})


_LIMIT = 2**30


def _content(path: Path) -> bytes:
    """Raises InputError for what is no file, which might never end or be gone at the second look, and OSError."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file", hint="a pipe or device cannot be read twice: save it first")
    if path.stat().st_size > _LIMIT:
        raise InputError(f"{path} is larger than {_LIMIT >> 30} GiB", hint="no document of curv is: check the file")
    return path.read_bytes()


def read_document(kind: type[D], path: Path, name: str, hint: str) -> D:
    """Read a document of one kind. Raises InputError where the file is something else."""
    try:
        return kind.model_validate_json(_content(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a {name} document: {str(error).splitlines()[0]}", hint=hint) from error


def schema_of(path: Path) -> str | None:
    """The schema that a document names, as "curv.report/1"; None where it names none.

    Raises:
        InputError: the file is no JSON.
    """
    try:
        document = json.loads(_content(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON document: {error}", hint="write one with curv analyze -o") from error
    name = document.get("schema") if isinstance(document, dict) else None
    return name if isinstance(name, str) else None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises InputError where it cannot be written."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", hint="choose a writable place with -o") from error


def dumps(value: Any) -> str:
    """JSON text of plain data, strict."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
