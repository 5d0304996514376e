"""curv.toml, or [tool.curv] in pyproject.toml, found upward from the checkpoint."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from curvcli.errors import InputError

Positive = Annotated[int, Field(gt=0)]
Limit = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]


_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # pathlib has taken one of its slashes


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=lambda n: n.replace("_", "-"))


class GateTable(_Table):
    """[gate]: the rules of `curv gate`, and how it takes them. None where the table does not say."""

    max_rho: Limit | None = None
    max_layer_rho: Limit | None = None
    max_update_ratio: Limit | None = None
    max_surge: Limit | None = None
    max_regression: Percent | None = None
    min_tokens: Annotated[int, Field(gt=0, strict=True)] | None = None
    require_resolved: Annotated[bool, Field(strict=True)] | None = None
    regression_tolerance: Percent | None = None
    unresolved: Literal["pass", "fail"] | None = None
    baseline: Path | None = None


class Config(_Table):
    """Defaults for the command line. Paths are relative to the file."""

    data: Annotated[tuple[Path, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] | None = None
    sample: Literal["first", "spread", "random"] | None = None
    tokens: Positive | None = None
    sequence_length: Positive | None = None
    batch_size: Positive | None = None
    seed: int | None = None
    gate: GateTable | None = None


def find_config(checkpoint: Path) -> tuple[Config, Path | None]:
    """The nearest configuration from the checkpoint's directory upward, and its file.

    A file that holds nothing but gate rules is passed over, so that it does not hide the data of one above it.

    Raises:
        InputError: the file is no TOML or has a key or value that is not known.
    """
    return _first(_upward(checkpoint), lambda config: config.model_fields_set != {"gate"}) or (Config(), None)


def find_gate(subject: Path) -> tuple[GateTable, Path | None]:
    """The nearest gate table from the checkpoint or report upward, or else from the working directory upward.

    Raises:
        InputError: a file on the way is no TOML or has a key or value that is not known.
    """
    for start in (subject, Path()):
        if (found := _first(_upward(start), lambda config: config.gate is not None)) and found[0].gate is not None:
            return found[0].gate, found[1]
    return GateTable(), None


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


def _read(file: Path, table: tuple[str, ...]) -> Config | None:
    try:
        content: Any = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable TOML: {error}", hint="mend or remove it") from error
    for key in table:
        content = content.get(key) if isinstance(content, dict) else None
        if content is None:
            return None
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}: {where}: {first['msg']}", hint=known(error, Config)) from error
    # Only what is set, so that model_fields_set still says what the file holds.
    update: dict[str, Any] = (
        {"data": tuple(p if _URL.match(str(p)) else file.parent / p for p in config.data)} if config.data else {}
    )
    if config.gate and config.gate.baseline:
        update["gate"] = config.gate.model_copy(update={"baseline": file.parent / config.gate.baseline})
    return config.model_copy(update=update)
