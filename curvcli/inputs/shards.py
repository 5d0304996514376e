"""Data shards: token files and text, cut into windows of sequence-length + 1 tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from curvcli.errors import InputError, UsageError
from curvcli.inputs.base import Checkpoint

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """Windows of token ids, int64 of shape (windows, sequence_length + 1), and where they are from."""

    path: Path
    windows: Tensor

    @property
    def sequence_length(self) -> int:
        return self.windows.shape[1] - 1

    @property
    def tokens(self) -> int:
        """Predictions: the tokens that the loss averages over."""
        return self.windows.shape[0] * self.sequence_length

    @property
    def sha256(self) -> str:
        """Digest of the token ids used, as little-endian int64, in order."""
        return hashlib.sha256(self.windows.numpy().astype("<i8").tobytes()).hexdigest()

    def batches(self, size: int) -> list[Tensor]:
        """The windows in batches of `size`, the last perhaps smaller."""
        return list(self.windows.split(size))


def read_shard(path: Path, checkpoint: Checkpoint, *, tokens: int, sequence_length: int | None) -> Shard:
    """Enough of a shard for `tokens` predictions.

    A stream is cut into consecutive windows. A file of rows (a 2-D array) keeps its rows: each is
    cut into windows of its own, so that no window crosses a row.

    Args:
        tokens: predictions wanted; rounded down to whole windows. A shorter shard is used whole.
        sequence_length: predictions per window; default the row's length or 1,024, at most the
            model's context.

    Raises:
        InputError: not readable, ids beyond the vocabulary, or shorter than one sequence.
    """
    if not path.exists():
        raise InputError(f"data shard {path} does not exist", hint="give one with --data or in curv.toml")
    if not path.is_file() and not path.is_dir():
        raise InputError(f"data shard {path} is not a file", hint="a pipe or device cannot be read twice: save it first")
    reader = _READERS.get(path.suffix.lower(), _text)
    wanted = tokens + tokens // max(1, (sequence_length or 1024)) + 2 * (sequence_length or 1024)
    try:
        array = reader(path, checkpoint, wanted)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}", hint="check the file and its permissions"
        ) from error
    rows = array if array.ndim == 2 else array[None]
    length = sequence_length or min(rows.shape[1] - 1 if array.ndim == 2 else 1024, checkpoint.context or 1024)
    if checkpoint.context is not None and length > checkpoint.context:
        raise UsageError(
            f"sequence length {length} exceeds the model's context of {checkpoint.context}",
            hint=f"pass --sequence-length {checkpoint.context} or less",
        )
    per_row = rows.shape[1] // (length + 1)
    if per_row == 0:
        raise InputError(
            f"{path} has {'rows of ' if array.ndim == 2 else ''}{rows.shape[1]} tokens, one sequence takes {length} + 1",
            hint="pass a shorter --sequence-length or a larger shard",
        )
    if tokens < length:
        raise UsageError(f"--tokens {tokens} is less than one sequence of {length}", hint="raise --tokens")
    windows = rows[:, : per_row * (length + 1)].reshape(-1, length + 1)[: tokens // length]
    low, high = int(windows.min()), int(windows.max())
    limit = checkpoint.vocabulary if checkpoint.vocabulary is not None else high + 1
    if low < 0 or high >= limit:
        bad = high if high >= limit else low
        raise InputError(
            f"{path} holds token id {bad}, the model's vocabulary has {limit}",
            hint="the shard was made with another tokenizer or is stored in another integer type",
        )
    return Shard(path, torch.from_numpy(np.ascontiguousarray(windows.astype(np.int64))))


def _bin(path: Path, checkpoint: Checkpoint, wanted: int) -> Tokens:
    """nanoGPT's stream of uint16, without a header."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise InputError(
            f"{path} has {size} bytes, no whole number of uint16 tokens", hint="expected nanoGPT's .bin of uint16"
        )
    array = np.memmap(path, dtype="<u2", mode="r")[:wanted]
    if len(array) >= 64 and not array[1::2].any() and array[::2].any():
        raise InputError(f"{path} looks like uint32 tokens: every second uint16 is 0", hint="store it as uint16 or .npy")
    return np.asarray(array, dtype=np.int64)


def _npy(path: Path, checkpoint: Checkpoint, wanted: int) -> Tokens:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python's tokens, and raises what that does
        raise InputError(f"{path} is not a plain .npy array: {error}", hint="save token ids with numpy.save") from error
    return _integers(array, path, wanted)


def _safetensors(path: Path, checkpoint: Checkpoint, wanted: int) -> Tokens:
    try:
        with safe_open(path, framework="np") as handle:
            if "input_ids" not in handle.keys():  # noqa: SIM118 - not iterable itself
                raise InputError(f"{path} has no tensor input_ids", hint=f"it has {sorted(handle.keys())[:5]}")
            array = handle.get_tensor("input_ids")
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}", hint="copy the file again") from error
    return _integers(array, path, wanted)


def _text(path: Path, checkpoint: Checkpoint, wanted: int) -> Tokens:
    if path.is_dir():
        raise InputError(f"data shard {path} is a directory", hint="give a file")
    if checkpoint.tokenizer is None:
        raise InputError(
            f"{path} is text, and {checkpoint.path} has no tokenizer to turn it into tokens",
            hint="save the tokenizer beside the checkpoint, or give tokens (.bin, .npy, .safetensors)",
        )
    from transformers import AutoTokenizer

    with path.open("rb") as stream:
        # No tokenizer in use takes more than 16 bytes of text for a token on average.
        raw = stream.read(16 * wanted)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.tokenizer, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises every kind there is
        raise InputError(
            f"transformers cannot build the tokenizer in {checkpoint.tokenizer}: {str(error).splitlines()[0][:200]}",
            hint="give tokens instead (.bin, .npy, .safetensors)",
        ) from error
    ids = tokenizer(raw.decode("utf-8", errors="ignore"), add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids[:wanted], dtype=np.int64)


def _integers(array: NDArray[np.generic], path: Path, wanted: int) -> Tokens:
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu" or 0 in array.shape:
        raise InputError(
            f"{path} has shape {array.shape} of {array.dtype}, not token ids",
            hint="expected integers, one or two dimensions",
        )
    kept = array[:wanted] if array.ndim == 1 else array[: -(-wanted // max(1, array.shape[1] - 1))]
    return np.asarray(kept, dtype=np.int64)


_READERS: dict[str, Callable[[Path, Checkpoint, int], Tokens]] = {
    ".bin": _bin,
    ".npy": _npy,
    ".safetensors": _safetensors,
}
