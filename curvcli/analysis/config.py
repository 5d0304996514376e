"""curv.toml, or [tool.curv] in pyproject.toml, found upward from the checkpoint.

One in the working directory or above it is the user's own. Any other came with the checkpoint, from anybody: it may name
data below its own directory and nothing else, and its rules for the gate do not count.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from curvcli.documents.columns import LimitKind, rules
from curvcli.errors import InputError
from curvcli.files.parse import inside, read_toml

MOST = 2**53  # of any count: what a float holds exactly
Positive = Annotated[int, Field(gt=0, le=MOST)]
# Strict, since pydantic would take true for 1.0, and text for a number.
Limit = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]


_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # pathlib has taken one of its slashes
_OF_A_CHECKPOINT = ("config.json", ".metadata", "trainer_state.json", "latest", "model.safetensors", "pytorch_model.bin")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=lambda n: n.replace("_", "-"))


_LIMITS: dict[LimitKind, Any] = {
    "limit": Limit,
    "percent": Percent,
    "count": Annotated[int, Field(gt=0, le=MOST, strict=True)],
    "flag": Annotated[bool, Field(strict=True)],
}
if TYPE_CHECKING:
    _Rules = _Table
else:  # a field for each rule that a number has
    _Rules = create_model("_Rules", __base__=_Table, **{r.field: (_LIMITS[r.kind] | None, None) for r in rules()})


class GateTable(_Rules):
    """[gate]: the rules of `curv gate`, and how it takes them. None where the table does not say."""

    regression_tolerance: Percent | None = None
    unresolved: Literal["pass", "fail"] | None = None
    baseline: Path | None = None
    any: Annotated[bool, Field(strict=True)] | None = None
    last: Annotated[int, Field(gt=0, le=MOST, strict=True)] | None = None


class Config(_Table):
    """Defaults for the command line. Paths are relative to the file."""

    data: Annotated[tuple[Path, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] | None = None
    sample: Literal["first", "spread", "random"] | None = None
    tokens: Positive | None = None
    sequence_length: Positive | None = None
    batch_size: Positive | None = None
    seed: Annotated[int, Field(ge=0, le=MOST)] | None = None
    gate: GateTable | None = None


def find_config(checkpoint: Path, *, data: bool = True) -> tuple[Config, Path | None]:
    """The nearest configuration from the checkpoint's directory upward, and its file.

    A file that holds nothing but gate rules is passed over, so that it does not hide the data of one above it.

    Args:
        data: whether the file's data is wanted; where it is not, it is not looked at.

    Raises:
        InputError: the file is no TOML, has a key or value that is not known, or is not the user's own and names data
            that does not lie below its own directory.
    """
    found = _first(_upward(checkpoint), lambda config: config.model_fields_set != {"gate"})
    if found is None:
        return Config(), None
    config, file = found
    sources: tuple[Path, ...] | None = None
    if data and config.data:
        own = is_own(file, checkpoint)
        sources = tuple(path if own and _URL.match(str(path)) else file.parent / path for path in config.data)
        if not own:
            for path in config.data:
                _check_below(file, path)
    return config.model_copy(update={"data": sources}), file


def find_gate(subject: Path) -> tuple[GateTable, Path | None]:
    """The nearest gate table from the working directory upward: who is judged does not bring the rules.

    Args:
        subject: what is judged; where it is the working directory itself and a checkpoint, its table does not count.

    Raises:
        InputError: a file on the way is no TOML or has a key or value that is not known.
    """
    for config, file in _upward(Path()):
        if config.gate is not None and is_own(file, subject):
            baseline = config.gate.baseline
            return config.gate.model_copy(update={"baseline": file.parent / baseline} if baseline else {}), file
    return GateTable(), None


def gate_not_counted(subject: Path) -> Path | None:
    """The nearest file with a gate table from the subject upward that is not the user's own."""
    with suppress(InputError):
        for config, file in _upward(subject):
            if config.gate is not None and not is_own(file, subject):
                return file
    return None


def is_own(file: Path, subject: Path) -> bool:
    """Whether a configuration is the user's: at or above the working directory, and not part of the checkpoint itself.

    Nor one that another user put into a directory that everybody may write to, as /tmp.
    """
    folder = file.parent
    # Running curv inside a checkpoint does not make the checkpoint's own files trusted.
    if folder == subject.resolve() and any((folder / name).exists() for name in _OF_A_CHECKPOINT):
        return False
    shared = folder.stat().st_mode & stat.S_IWOTH and file.stat().st_uid not in (0, os.geteuid())
    return Path().resolve().is_relative_to(folder) and not shared


def known(error: ValidationError, model: type[BaseModel]) -> str:
    """The remedy for a name or value that was refused: the nearest known name, and all of them."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    names = [name.replace("_", "-") for name in (GateTable if where[:-1] == ["gate"] else model).model_fields]
    near = get_close_matches(where[-1].replace("_", "-"), names, n=1) if first["type"] == "extra_forbidden" else []
    guess = f"did you mean {near[0]}? " if near else ""
    return f"{guess}known keys: {', '.join(names)}"


def _upward(start: Path) -> Iterator[tuple[Config, Path]]:
    place = start.resolve()
    for folder in place.parents if place.is_file() else [place, *place.parents]:
        for name, table in (("curv.toml", ()), ("pyproject.toml", ("tool", "curv"))):
            file = folder / name
            if file.is_file() and (found := _read(file, table)) is not None:
                yield found, file


def _first(candidates: Iterator[tuple[Config, Path]], wanted: Callable[[Config], bool]) -> tuple[Config, Path] | None:
    return next((found for found in candidates if wanted(found[0])), None)


def _check_below(file: Path, path: Path) -> None:
    """Refuse data of a configuration that is not the user's own, unless all of it lies below. Raises InputError."""
    folder = file.parent
    try:
        if _URL.match(str(path)):
            raise InputError("a URL")
        inside(folder, str(path))
        # Everything that the pattern matches, and everything below it, as any link may lead out; and the literal name.
        for match in [str(folder / path), *glob(str(folder / path))]:  # noqa: PTH207
            inside(folder, os.path.relpath(match, folder))
            for place, folders, names in os.walk(match):
                for name in (*folders, *names):
                    inside(folder, os.path.relpath(Path(place, name), folder))
    except InputError as error:
        trusted = "" if (folder / "config.json").exists() else f", or, if you trust it, run curv in {folder}"
        raise InputError(
            f"{file} is not in the working directory or above it, and names data outside its own directory: {path}",
            hint=f"pass --data{trusted}",
        ) from error


def _read(file: Path, table: tuple[str, ...]) -> Config | None:
    content: Any = read_toml(file)
    for key in table:
        content = content.get(key) if isinstance(content, dict) else None
        if content is None:
            return None
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:100] for part in first["loc"])
        raise InputError(f"{file}: {where}: {first['msg']}", hint=known(error, Config)) from error
