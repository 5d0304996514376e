"""The user's own code: imported where the command line names it, and never because a file does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from curvcli.errors import CurvError, UsageError, exhausted


def imported(spec: str, option: str) -> Callable[..., Any]:
    """What `package.module:name` names, with the working directory importable as under `python -m`.

    Args:
        option: that the user gave it with, for messages.

    Raises:
        UsageError: no such module or name, it is nothing that can be called, or the import fails.
    """
    module, _, name = spec.partition(":")
    if not module or not name or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise UsageError(f"{option} {spec} is not of the form package.module:name", hint=f"as in {option} mymodels:tiny")
    here = os.getcwd()  # noqa: PTH109  (sys.path holds text)
    if here not in sys.path:
        sys.path.insert(0, here)
    with blamed(f"the import of {option} {spec}"):
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # something that the module itself imports
            raise UsageError(
                f"{option} {spec}: there is no module {error.name}",
                hint="run curv in the directory that has it, or install it in this environment",
            ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{option} {spec}: module {module} has no {name}", hint="check the name after the colon")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{option} {spec} is a {type(found).__name__}", hint="name a function or a class")
    return found  # type: ignore[no-any-return]


@contextmanager
def blamed(what: str, hint: str = "set CURV_TRACEBACK=1 to see where") -> Iterator[None]:
    """Whatever is raised within becomes one line that says whose code failed. Raises UsageError."""
    try:
        yield
    except CurvError:
        raise
    # SystemExit too: a training script that is imported may parse its arguments. Ctrl-C stays what it is.
    except (Exception, SystemExit) as error:
        if os.environ.get("CURV_TRACEBACK") or exhausted(error):
            raise
        raise UsageError(f"{what} failed: {type(error).__name__}: {str(error)[:300]}", hint=hint) from error
