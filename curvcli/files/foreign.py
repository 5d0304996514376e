"""Objects of foreign classes in a pickle: read as inert records of what the file says of them, never as the objects."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

# Packages whose objects trainers put beside the weights: settings, enumerations, loss scalers, random states,
# projectors of optimizers. Classes of a training script itself are __main__'s.
_PACKAGES = frozenset(
    ("__main__", "accelerate", "deepspeed", "lightning", "lightning_fabric", "megatron", "numpy", "omegaconf", "pathlib")
) | {"apollo_torch", "galore_torch", "pytorch_lightning", "transformers"}
# From modules that can act, single names. The built-in types and typing's are what a typed configuration says its entries
# are, operator.getitem is how List[int] is written down.
_NAMES = frozenset(
    ["argparse.Namespace", "types.SimpleNamespace", "_codecs.encode", "_operator.getitem"]
    + [f"typing.{name}" for name in ("Any", "Dict", "List", "Optional", "Set", "Tuple", "Union")]
    + [f"datetime.{name}" for name in ("date", "datetime", "timedelta", "timezone")]
    + [f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple", "type")]
)
# torch fills nothing that is no plain dictionary.
_DICTIONARIES = frozenset(["collections.defaultdict"])
# How Python 3.11.0 to 3.11.3 (Debian 12's) write down a member of an enumeration: getattr(its class, its name).
_MEMBER = "builtins.getattr"
# Each name becomes a class. A trainer's file has dozens of them: one of thousands was made to cost time and memory.
_MOST = 256


class Foreign:
    """What stands in a file where it has an object of a foreign class.

    Whatever the file wants done with the class (call it, make an instance, set its state) makes one of these and runs
    none of the class's code, for the class is never looked up.

    Attributes:
        arguments: what the file would have called the class with.
        attributes: what it would have set on the instance.
    """

    name = "object"

    def __new__(cls, *arguments: Any) -> Foreign:
        """Keep the arguments and do nothing with them."""
        made = object.__new__(cls)
        made.arguments = arguments
        made.attributes = {}
        return made

    arguments: tuple[Any, ...]
    attributes: dict[Any, Any]

    def __init__(self, *arguments: Any) -> None:
        """Nothing more: pickle calls this or not, as the file likes."""

    def __setstate__(self, state: Any) -> None:
        # A pair is the dictionary and the slots of an object; a state of another kind says nothing by name.
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.attributes.update(part)

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


def stand_ins(source: Path | io.BytesIO) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """An inert class for every foreign one that a torch file names, as `torch.serialization.safe_globals` takes them.

    The rule: a class is stood in for where its package is one of those above, or its full name is. Everything else that
    torch does not itself allow (os, subprocess, builtins.eval, functools, any package not listed) is left to torch, which
    refuses the file. The rule protects nothing by itself, since a stand-in cannot act whatever its name; it keeps a file
    that was made to act from being read as if it were a good one.
    """
    named = _globals(source)
    found = {name for name in named if name.partition(".")[0] in _PACKAGES or name in _NAMES}
    if len(found) > _MOST:
        return []
    # A class each: torch keeps allowed classes by name and class, and a message should say which one stood in the file.
    records = [(type("Foreign", (Foreign,), {"name": name}), name) for name in sorted(found)]
    members = [(_member, _MEMBER)] if _MEMBER in named else []
    return [*records, *((_dictionary, name) for name in sorted(named & _DICTIONARIES)), *members]


def _member(*arguments: Any) -> Foreign:
    """Stands in for getattr, of a foreign class and a name alone: a record with the name. Nothing is looked up."""
    match arguments:
        case (type() as kind, str() as name) if issubclass(kind, Foreign):
            return kind(name)
    raise pickle.UnpicklingError(f"GLOBAL {_MEMBER} of what is no foreign class")


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    """Stands in for a dictionary with a default, whose default is not kept."""
    return {}


def _globals(source: Path | io.BytesIO) -> set[str]:
    """Names of all classes and functions in the pickles of a torch file, as torch understands them."""
    found: set[str] = set()
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                for record in archive.namelist():
                    if record.endswith(".pkl"):  # of a size that check_zip has bounded
                        _collect(io.BytesIO(archive.read(record)), found)
        elif isinstance(source, Path):
            with source.open("rb") as stream:
                # The form before zip is five pickles: a magic number, a version, the system, the document, keys of its data.
                for _ in range(5):
                    _collect(stream, found)
    except Exception:  # a damaged pickle: what torch said of it stands
        return set()
    return found


def _collect(stream: BinaryIO, found: set[str]) -> None:
    for operation, argument, _ in pickletools.genops(stream):
        # torch.save writes protocol 2, which has this one instruction for names; torch's reader refuses the later one.
        if operation.name == "GLOBAL" and isinstance(argument, str):
            module, _, name = argument.partition(" ")
            # Protocol 2 has Python 2's module names, as __builtin__; torch compares what it allows by today's.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            found.add(f"{module}.{name}")
