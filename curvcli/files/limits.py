"""Limits on what an untrusted file may claim: refused by what it says, before memory or time is given to it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.errors import CurvError, InputError
from curvcli.files.foreign import Foreign
from curvcli.files.parse import inside as inside

# A pickle has structure alone, as tensors' data lie apart: 64 MiB describe some hundred thousand tensors. Plain data of 20
# million values is far over any trainer's; 200 levels stay clear of Python's recursion limit.
_PICKLE_LIMIT = 64 * 2**20
_NODES, _DEPTH = 20_000_000, 200
# What torch's restricted unpickler allows, and what makes objects larger than the bytes that name them. No
# checkpoint of weights and moments has one. A name stands between newlines wherever a pickle asks for it.
_GROWING = (
    b"bytearray",
    b"Tensor",
    *(kind.__name__.encode() for kind in sorted(torch._tensor_classes, key=lambda kind: kind.__name__)),
    b"_rebuild_sparse_tensor",
    b"_rebuild_nested_tensor",
    b"_rebuild_qtensor",
    b"_rebuild_meta_tensor_no_storage",
    b"_rebuild_device_tensor_from_numpy",
    b"_rebuild_device_tensor_from_cpu_tensor",
)
_DAMAGED = "the file is damaged or was made to exhaust this machine: copy it again, or do not trust it"
# Over 2^53 JSON's numbers are no longer exact, and no layer is that wide. Masks and tables of positions are buffers that
# checkpoints need not store, so they are not held to the weights' bytes: 2^28 values are a causal mask over 16,384 tokens.
_CALM_INTEGER, _CALM_COUNT, _BUFFERS, _MODULES = 2**53, 10**5, 2**28, 250_000
# What a configuration or a model makes a Python object of each: no tensor's limit would stop it.
_COUNTS = ("layer", "block", "expert", "depth", "head", "group", "label", "class", "stage", "branch", "codebook", "adapter")


def check_zip(source: Path | io.BytesIO, path: object, size: int) -> None:
    """Refuse an archive that torch.save did not write, or that claims more than its `size`. Raises InputError."""
    try:
        with zipfile.ZipFile(source) as archive:
            records = archive.infolist()
            pickles = [r for r in records if r.filename.endswith(".pkl")]
            claimed = sum(r.file_size for r in records)
            long = next((r for r in pickles if r.file_size > _PICKLE_LIMIT), None)
            # Read only where that is sure to be small: a compressed record may unfold into a thousand times its size.
            content = [] if long or claimed > size else [archive.read(r) for r in pickles if r.compress_type == 0]
    except Exception as error:  # zipfile raises every kind there is on a damaged file
        raise InputError(f"{path} is a damaged zip: {str(error)[:200]}", hint="copy the file again") from error
    packed = next((r.filename for r in records if r.compress_type != zipfile.ZIP_STORED), None)
    if packed:
        raise InputError(f"{path} has compressed records ({packed})", hint="torch.save writes none: do not trust this file")
    if claimed > size or any(r.compress_size != r.file_size or r.header_offset + r.file_size > size for r in records):
        raise InputError(f"{path} has records of {claimed:,} bytes in a file of {size:,}", hint=_DAMAGED)
    names = {r.filename for r in records}
    odd = next((n for n in names if n.startswith("/") or ".." in n.split("/")), None)
    # Of two records of one name this check could see one and torch load the other.
    if odd or len(names) != len(records):
        raise InputError(
            f"{path} has a record named {odd[:200]!r}" if odd else f"{path} has two records of one name", hint=_DAMAGED
        )
    if long:
        raise InputError(f"{path} has {long.filename} of {long.file_size:,} bytes, data apart", hint=_DAMAGED)
    for text in content:
        _refuse_growing(text, path)


def check_legacy(path: Path) -> None:
    """Refuse a torch file of the form before zip whose pickle asks for more than it stores. Raises InputError."""
    # Its pickles, short, stand before the data.
    with path.open("rb") as stream:
        _refuse_growing(stream.read(_PICKLE_LIMIT), path)


def _refuse_growing(text: bytes, path: object) -> None:
    found = next((name for name in _GROWING if b"\n" + name + b"\n" in text), None)
    # A tensor with attributes of its own names its class beside the call that makes it.
    if found == b"Tensor" and b"\n_rebuild_from_type_v2\n" in text:
        return
    if found:
        raise InputError(
            f"{path} builds {found.decode()} objects, which no checkpoint of weights and moments has", hint=_DAMAGED
        )


def check_document(document: Any, path: object, size: int) -> None:
    """Refuse tensors larger than what is stored of them, and nests that only a walk of ages would leave.

    A tensor may be a view of its storage, not a repetition of it: one value with strides of 0 looks like terabytes to
    whoever copies it. Plain data may share parts, not hold itself, and its size is counted as if it shared none. Records
    of foreign objects may point back at what holds them, as the nodes of a configuration do: nothing walks through those.

    Raises:
        InputError: what was found.
    """
    done: dict[int, tuple[int, int]] = {}
    open_: set[int] = set()

    def measure(value: Any, depth: int) -> tuple[int, int]:
        """Nodes of the tree, and its height."""
        if isinstance(value, Tensor):
            _parts(value, path)
            _check_tensor(value, size, path)
            return 1, 1
        # Text counts by its length, as whoever shows or hashes it pays for that.
        if isinstance(value, (str, bytes)):
            return 1 + len(value) // 64, 1
        # Turning a long integer into decimal digits takes time that grows as the square of its length.
        if isinstance(value, int) and abs(value) >= 2**64:
            raise InputError(f"{path} holds an integer of {value.bit_length()} bits", hint=_DAMAGED)
        parts = _parts(value, path)
        if not parts:
            return 1, 1
        key = id(value)
        if key in open_ and isinstance(value, Foreign):
            return 1, 1
        # A part that many places share is walked once and counted at each, or a dozen nested lists would take forever.
        if key in done:
            nodes, height = done[key]
        else:
            if depth > _DEPTH or key in open_:
                raise InputError(f"{path} nests deeper than {_DEPTH} levels", hint=_DAMAGED)
            open_.add(key)
            measured = [measure(part, depth + 1) for part in parts]
            open_.remove(key)
            nodes, height = 1 + sum(n for n, _ in measured), 1 + max(h for _, h in measured)
            done[key] = nodes, height
        if nodes > _NODES or depth + height > _DEPTH:
            raise InputError(f"{path} unfolds into {nodes:,} values, {height} deep", hint=_DAMAGED)
        return nodes, height

    measure(document, 0)


def _parts(value: Any, path: object) -> list[Any]:
    # A pickle may give an object attributes. One that the class has too would answer in its place, as `numel` of a tensor.
    own = vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else {}
    if not isinstance(value, Foreign) and (found := next((name for name in own if hasattr(type(value), str(name))), None)):
        raise InputError(f"{path} holds a {type(value).__name__} with an attribute {str(found)[:40]!r}", hint=_DAMAGED)
    parts = list(own.values())
    if isinstance(value, dict):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts += value
    return parts


def _check_tensor(tensor: Tensor, size: int, path: object) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise InputError(f"{path} holds a sparse, nested or quantized tensor", hint="save plain tensors")
    # A DTensor, as FSDP2 saves it with torch.save.
    if type(tensor) not in (Tensor, nn.Parameter):
        raise InputError(
            f"{path} holds a {type(tensor).__name__}, one rank's piece of a tensor",
            hint="save whole tensors, or a torch.distributed.checkpoint directory",
        )
    stored = tensor.untyped_storage().nbytes()
    claimed = tensor.numel() * tensor.element_size()
    if claimed > stored or stored > size or any(stride < 0 for stride in tensor.stride()):
        raise InputError(
            f"{path} holds a tensor of shape {tuple(tensor.shape)}, {claimed:,} bytes, of which the file stores "
            f"{min(stored, size):,}",
            hint=_DAMAGED,
        )


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse a configuration whose numbers alone would take hours or terabytes to obey. Raises InputError."""
    found: list[tuple[str, Any]] = [("", config)]
    while found:
        key, value = found.pop()
        if isinstance(value, dict):
            found += [(str(k), v) for k, v in value.items()]
        elif isinstance(value, list):
            found += [(key, v) for v in value]
        elif isinstance(value, (int, float)):
            # A width is bounded by the stored weights; a count makes that many modules before any weight is looked at.
            counts = any(word in key.lower() for word in _COUNTS)
            limit = _CALM_COUNT if counts and isinstance(value, int) else _CALM_INTEGER
            if (isinstance(value, int) and abs(value) > limit) or value != value:
                raise InputError(f"{path} says {key} = {str(value)[:40]}, out of any range", hint="the file is damaged")


def check_size(build: Callable[[], nn.Module], *, values: int, where: object) -> None:
    """Build a model without its memory first, and stop as soon as it takes more than there are values for.

    Args:
        build: makes the model; called with the meta device as default.
        values: what the model may have: of weights, twice the bytes that are stored, since each takes one at least.

    Raises:
        InputError: the configuration asks for more. What `build` raises is passed on.
    """
    taken = {"parameters": 0, "buffers": 0, "modules": 0}
    # Some room: small models have parameters that no file stores, as biases that a trainer left out.
    limits = {"parameters": values + 2**20, "buffers": values + _BUFFERS, "modules": _MODULES}

    def count(kind: str, part: Tensor | nn.Module | None) -> None:
        if part is not None:
            taken[kind] += max(1, part.numel()) if isinstance(part, Tensor) else 1  # even empty ones take time
        if taken[kind] > limits[kind]:
            raise _TooLargeError

    # Hooks of the process: every module's parameters come through them, whoever makes it and however deep.
    hooks = nn.modules.module
    handles = [
        hooks.register_module_parameter_registration_hook(lambda module, name, tensor: count("parameters", tensor)),
        hooks.register_module_buffer_registration_hook(lambda module, name, tensor: count("buffers", tensor)),
        hooks.register_module_module_registration_hook(lambda module, name, inner: count("modules", inner)),
    ]
    try:
        with torch.device("meta"):
            build()
    except _TooLargeError:
        raise InputError(
            f"the configuration of {where} asks for a model of more than {limits['parameters']:,} weights, and no more than "
            f"{values:,} can be stored or held",
            hint="config and weights do not belong together, or the machine is too small",
        ) from None
    finally:
        for handle in handles:
            handle.remove()


# Of curv's own errors, so that what turns a factory's exceptions into a message (`blamed`) lets it through.
class _TooLargeError(CurvError):
    """The model outgrew its limit."""

    def __init__(self) -> None:
        super().__init__("the model is larger than what is stored")
