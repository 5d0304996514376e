"""curv.toml, or [tool.curv] in pyproject.toml, found upward from the checkpoint."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from curvcli.errors import InputError

Positive = Annotated[int, Field(gt=0)]


class Config(BaseModel):
    """Defaults for the command line. Paths are relative to the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=lambda n: n.replace("_", "-"))

    data: Path | None = None
    tokens: Positive | None = None
    sequence_length: Positive | None = None
    batch_size: Positive | None = None
    seed: int | None = None


def find_config(checkpoint: Path) -> tuple[Config, Path | None]:
    """The nearest configuration from the checkpoint's directory upward, and its file.

    Raises:
        InputError: the file is no TOML or has a key or value that is not known.
    """
    for folder in (
        checkpoint.resolve().parents if checkpoint.is_file() else [checkpoint.resolve(), *checkpoint.resolve().parents]
    ):
        for name, table in (("curv.toml", ()), ("pyproject.toml", ("tool", "curv"))):
            file = folder / name
            if file.is_file() and (found := _read(file, table)) is not None:
                return found, file
    return Config(), None


def _read(file: Path, table: tuple[str, ...]) -> Config | None:
    try:
        content: Any = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable TOML: {error}", hint="mend or remove it") from error
    for key in table:
        content = content.get(key)
        if content is None:
            return None
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(name.replace("_", "-") for name in Config.model_fields)
        raise InputError(f"{file}: {where}: {first['msg']}", hint=f"known keys: {known}") from error
    return config.model_copy(update={"data": file.parent / config.data}) if config.data else config
