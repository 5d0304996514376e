"""What every document shares: JSON in and out, findings, versions, and files read within limits. No torch."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from curvcli.documents.version import package_version
from curvcli.errors import InputError
from curvcli.files.parse import parse_json, read_limited

MOST = 2**53  # of any count: what a float holds exactly
LARGEST = 1e300  # of any measured value: what is drawn of one is a few times as large
Severity = Literal["info", "warning", "error"]

# Nothing that a terminal obeys or that turns text around, and no surrogate, has a place in JSON either, where an escape
# says the same. Beyond the basic plane: tags, which nobody sees.
_HIDDEN = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)


_READING = "reading"  # context of a validation


def _open(schema: dict[str, Any]) -> None:
    # pydantic writes false for extra="forbid"; a newer document has to be valid by this schema, as `read` takes it.
    schema["additionalProperties"] = True


class Document(BaseModel):
    """A document of curv or a part of one: strict where it is written, lenient to newer versions where it is read.

    Made in code, unknown fields are errors. `read` leaves them out, at every level, as a newer version of curv may have
    written them under the same major version ("curv.report/1"): what is there for all that is checked in full. A field
    that comes in later has a default, for documents that lack it. NaN and infinity are always errors.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, json_schema_extra=_open
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, content: Any, info: ValidationInfo) -> Any:
        # The context goes down into every part with the validation, so that parts need not know how their document is made.
        if info.context != _READING or not isinstance(content, dict):
            return content
        names = {name for field, about in cls.model_fields.items() for name in (field, about.alias)}
        return {name: value for name, value in content.items() if name in names}

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """A document of JSON text, without the fields that this version does not know. Raises pydantic's ValidationError."""
        return cls.model_validate_json(text, context=_READING)

    @model_validator(mode="after")
    def _countable(self) -> Self:
        for name, value in self:
            if isinstance(value, (int, float)) and abs(value) > (LARGEST if isinstance(value, float) else MOST):
                raise ValueError(f"{name} is out of any range")
        return self

    def to_json(self) -> str:
        """Strict JSON text, one trailing newline."""
        return visible_json(self.model_dump_json(by_alias=True, indent=2)) + "\n"


D = TypeVar("D", bound=Document)


class Finding(Document):
    """Something that a reader of the numbers should know: `code` for programs, `message` for people."""

    code: str
    severity: Severity
    message: str


class Versions(Document):
    """What made the document."""

    curvcli: str
    torch: str
    transformers: str | None
    python: str

    @classmethod
    def installed(cls) -> Self:
        """This package and what its numbers depend on, from their metadata: nothing is imported for it."""
        found: dict[str, str | None] = {"curvcli": package_version()}
        for package in ("torch", "transformers"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = None
        return cls.model_validate({**found, "python": platform.python_version()})


_LIMIT = 2**28  # a track of a thousand checkpoints has a fifth of it


def read_document(kind: type[D], path: Path, name: str, hint: str) -> D:
    """Read a document of one kind. Raises InputError where the file is something else."""
    return digested_document(kind, path, name, hint)[0]


def digested_document(kind: type[D], path: Path, name: str, hint: str) -> tuple[D, str]:
    """A document and the SHA-256 of its bytes, from one reading of a file. Raises InputError as `read_document` does."""
    try:
        content = read_limited(path, _LIMIT)
        # Parsed twice, for its limit on values: pydantic's own parser has none.
        parse_json(content)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", hint=hint) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a {name} document: {str(error)[:300]}", hint=hint) from error
    return document_in(content, kind, path, name, hint), hashlib.sha256(content).hexdigest()


def first_problem(error: ValidationError) -> str:
    """Where a document is wrong and why."""
    # Without the input, which may be all of the file.
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:100] for part in first["loc"])
    reason = first["msg"][:300]
    return f"{where}: {reason}" if where else reason


def schema_of(path: Path) -> str | None:
    """The schema that a document names, as "curv.report/1"; None where it names none.

    Raises:
        InputError: the file is no JSON.
    """
    return named_content(path)[0]


def named_content(path: Path) -> tuple[str | None, bytes]:
    """The schema that a document names, as `schema_of` has it, and the bytes that `document_in` takes, from one reading."""
    try:
        content = read_limited(path, _LIMIT)
        document = parse_json(content)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", hint="write one with curv analyze -o") from error
    except (OSError, ValueError) as error:
        if path.suffix == ".jsonl":  # as a tracker writes in the job: a line a record
            hint = "curv watch and curv report show a job's log; give a document, as curv analyze -o writes it"
            raise InputError(f"{path} is lines of JSON, and no document", hint=hint) from error
        raise InputError(f"{path} is no JSON document: {str(error)[:300]}", hint="write one with curv analyze -o") from error
    name = document.get("schema") if isinstance(document, dict) else None
    return (name if isinstance(name, str) else None), content


def document_in(content: bytes, kind: type[D], path: Path, name: str, hint: str) -> D:
    """A document of one kind, of a file's bytes that are known to be JSON. Raises InputError where they are another's."""
    try:
        return kind.read(content)
    except ValidationError as error:
        raise InputError(f"{path} is not a {name} document: {first_problem(error)}", hint=hint) from error
    except ValueError as error:
        raise InputError(f"{path} is not a {name} document: {str(error)[:300]}", hint=hint) from error


def visible_json(text: str) -> str:
    """JSON that says the same without a character that is not to be printed: each becomes its escape."""
    return _HIDDEN.sub(lambda match: json.dumps(match[0])[1:-1], text)


def dumps(value: Any) -> str:
    """JSON text of plain data, strict."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
