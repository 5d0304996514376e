"""The pickle that `.metadata` is, run by a machine that knows no instruction but those that such a file is made of.

Python's unpickler in C allocates what an instruction claims, and hashes keys that take forever to hash; the one in Python
is three times slower than this (141,000 pieces: 1.8 s against 5.9 s). Nothing here imports, and nothing that is named is
called: a class becomes an inert record of its own name.
"""

from __future__ import annotations

import gc
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_META = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # where releases before 2.3 kept the same classes
_RECORDS = {
    *((_META, name) for name in ("Metadata", "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata")),
    *((_META, name) for name in ("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_SHARDED, name) for name in ("TensorProperties", "MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "PurePosixPath")),
}


class Record:
    """Stands in for every object of a class that `.metadata` may name: holds what it is given and does nothing."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: Any = None

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


@contextmanager
def without_collection() -> Iterator[None]:
    """The garbage collector held off: among millions of objects that all live it finds nothing, at twice the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def load(data: bytes) -> Any:
    """The document. Raises UnpicklingError, naming what no metadata names; any other exception where it is damaged."""
    with without_collection():
        return _run(data)


_PROTO, _FRAME, _STOP, _MARK = (code[0] for code in (pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK))
_NONE, _TRUE, _FALSE = pickle.NONE[0], pickle.NEWTRUE[0], pickle.NEWFALSE[0]
_INT, _INT1, _INT2, _LONG1 = pickle.BININT[0], pickle.BININT1[0], pickle.BININT2[0], pickle.LONG1[0]
_FLOAT, _TEXT, _SHORT_TEXT = pickle.BINFLOAT[0], pickle.BINUNICODE[0], pickle.SHORT_BINUNICODE[0]
_DICT, _LIST, _NOTHING = pickle.EMPTY_DICT[0], pickle.EMPTY_LIST[0], pickle.EMPTY_TUPLE[0]
_TUPLE, _TUPLE1, _TUPLE2, _TUPLE3 = pickle.TUPLE[0], pickle.TUPLE1[0], pickle.TUPLE2[0], pickle.TUPLE3[0]
_ITEM, _ITEMS, _APPEND, _APPENDS = pickle.SETITEM[0], pickle.SETITEMS[0], pickle.APPEND[0], pickle.APPENDS[0]
_MEMOIZE, _PUT, _LONG_PUT = pickle.MEMOIZE[0], pickle.BINPUT[0], pickle.LONG_BINPUT[0]
_GET, _LONG_GET = pickle.BINGET[0], pickle.LONG_BINGET[0]
_GLOBAL, _STACK_GLOBAL = pickle.GLOBAL[0], pickle.STACK_GLOBAL[0]
_CALL, _NEW, _BUILD = pickle.REDUCE[0], pickle.NEWOBJ[0], pickle.BUILD[0]
_U4, _I4, _U2, _F8 = (struct.Struct(code).unpack_from for code in ("<I", "<i", "<H", ">d"))


def _run(data: bytes) -> Any:  # noqa: C901 - one loop over the instructions: calls would cost it its speed
    # One function, the frequent instructions first: a call for each of ten million would be most of the time.
    stack: list[Any] = []
    outer: list[list[Any]] = []
    memo: list[Any] = []
    at = 0
    while True:
        code = data[at]
        at += 1
        if code == _MEMOIZE:
            memo.append(stack[-1])
        elif code == _LONG_GET:
            stack.append(memo[_U4(data, at)[0]])
            at += 4
        elif code == _GET:
            stack.append(memo[data[at]])
            at += 1
        elif code == _TUPLE1:
            stack[-1] = (stack[-1],)
        elif code == _INT1:
            stack.append(data[at])
            at += 1
        elif code == _INT2:
            stack.append(_U2(data, at)[0])
            at += 2
        elif code == _NOTHING:
            stack.append(())
        elif code in (_NEW, _CALL):
            arguments = stack.pop()
            stack[-1] = _made(stack[-1], arguments)
        elif code == _MARK:
            outer.append(stack)
            stack = []
        elif code == _BUILD:
            state = stack.pop()
            stack[-1].fields = state  # of a Record; nothing else on the stack has the attribute
        elif code == _ITEMS:
            items, stack = stack, outer.pop()
            for i in range(0, len(items), 2):
                _put(stack[-1], items[i], items[i + 1])
        elif code == _DICT:
            stack.append({})
        elif code == _TUPLE2:
            last = stack.pop()
            stack[-1] = (stack[-1], last)
        elif code == _SHORT_TEXT:
            end = at + 1 + data[at]
            stack.append(data[at + 1 : end].decode())
            at = end
        elif code == _INT:
            stack.append(_I4(data, at)[0])
            at += 4
        elif code == _LONG1:
            end = at + 1 + data[at]
            stack.append(int.from_bytes(data[at + 1 : end], "little", signed=True))
            at = end
        elif code == _TUPLE3:
            last, middle = stack.pop(), stack.pop()
            stack[-1] = (stack[-1], middle, last)
        elif code == _TUPLE:
            items, stack = stack, outer.pop()
            stack.append(tuple(items))
        elif code == _LIST:
            stack.append([])
        elif code == _APPENDS:
            items, stack = stack, outer.pop()
            _list(stack[-1]).extend(items)
        elif code == _APPEND:
            last = stack.pop()
            _list(stack[-1]).append(last)
        elif code == _ITEM:
            last, key = stack.pop(), stack.pop()
            _put(stack[-1], key, last)
        elif code == _NONE:
            stack.append(None)
        elif code in (_TRUE, _FALSE):
            stack.append(code == _TRUE)
        elif code == _FLOAT:
            stack.append(_F8(data, at)[0])
            at += 8
        elif code == _TEXT:
            end = at + 4 + _U4(data, at)[0]
            stack.append(data[at + 4 : end].decode())
            at = end
        elif code == _STACK_GLOBAL:
            name = stack.pop()
            stack[-1] = _named(stack[-1], name)
        elif code == _GLOBAL:
            line, name_end = data.index(b"\n", at), data.index(b"\n", data.index(b"\n", at) + 1)
            stack.append(_named(data[at:line].decode(), data[line + 1 : name_end].decode()))
            at = name_end + 1
        elif code in (_PUT, _LONG_PUT):
            index, at = (data[at], at + 1) if code == _PUT else (_U4(data, at)[0], at + 4)
            if index != len(memo):  # no pickler leaves gaps, and a gap is memory asked for
                raise ValueError("a place in the memo that is not the next")
            memo.append(stack[-1])
        elif code == _PROTO:
            at += 1
        elif code == _FRAME:
            at += 8
        elif code == _STOP:
            return stack[-1]
        else:
            raise ValueError(f"instruction {code:#x}")


def _named(module: str, name: str) -> Any:
    """What a name stands for: a kind of record, `tuple` for torch.Size, or a dtype of torch."""
    if (module, name) == ("torch", "Size"):
        return tuple
    # Not getattr, which would have torch import modules by name.
    if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
        return vars(torch)[name]
    if module in ("builtins", "__builtin__") and name == "getattr":
        return _member
    if (module, name) in _RECORDS:
        return type(name, (Record,), {"__slots__": ()})
    raise pickle.UnpicklingError(f"{module}.{name}"[:120])


def _made(kind: Any, arguments: Any) -> Any:
    if kind is tuple:
        (value,) = arguments
        if type(value) is not tuple:  # a list copied again and again is time and memory without end
            raise ValueError("a size that is no tuple")
        return value
    if kind is _member:
        return _member(*arguments)
    if not (isinstance(kind, type) and issubclass(kind, Record)):
        raise ValueError("a call of what is no class")
    return kind()


def _member(*arguments: Any) -> Record:
    """A member of an enumeration, as Python 3.11.0 to 3.11.3 write it: getattr(class, name). Nothing is looked up."""
    match arguments:
        case (type() as kind, str()) if issubclass(kind, Record):
            return kind()
    raise pickle.UnpicklingError("builtins.getattr of what is no class of metadata")


def _put(target: Any, key: Any, value: Any) -> None:
    # Not tuples: one that holds another twice, and so on, takes forever to hash.
    if type(target) is not dict or not isinstance(key, (str, int, Record)):
        raise ValueError("a dictionary's key is no name")
    target[key] = value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("items of what is no list")
    return value
