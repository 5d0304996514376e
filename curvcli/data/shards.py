"""The shard: tokens of files and datasets, cut into windows of sequence-length + 1 tokens, and which ones they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvcli.checkpoints.base import Checkpoint
from curvcli.data.tokens import Ids, Source, open_source
from curvcli.errors import InputError, UsageError, counted
from curvcli.files.remote import fetched

Sample = Literal["first", "spread", "random"]


@dataclass(frozen=True)
class Shard:
    """Windows of token ids, int64 of shape (windows, sequence_length + 1), and where they are from.

    `starts` are the windows' first tokens, counted over all sources as one stream.
    """

    windows: Tensor
    sources: tuple[Source, ...]
    sample: Sample
    starts: NDArray[np.int64]

    @property
    def path(self) -> str:
        """For people."""
        first = str(self.sources[0].path)
        return first if len(self.sources) == 1 else f"{first} and {len(self.sources) - 1} more"

    @property
    def sequence_length(self) -> int:
        """Predictions per window."""
        return self.windows.shape[1] - 1

    @property
    def tokens(self) -> int:
        """Predictions: the tokens that the loss averages over."""
        return self.windows.shape[0] * self.sequence_length

    @property
    def sha256(self) -> str:
        """Digest of the token ids used, as little-endian int64, in order."""
        return hashlib.sha256(self.windows.numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Where the windows lie, as (first token, windows that follow each other from there)."""
        width = self.windows.shape[1]
        breaks = np.flatnonzero(np.diff(self.starts) != width) + 1
        edges = [0, *breaks.tolist(), len(self.starts)]
        return [(int(self.starts[a]), b - a) for a, b in pairwise(edges)]

    def batches(self, size: int) -> list[Tensor]:
        """The windows in batches of `size`, the last perhaps smaller."""
        return list(self.windows.split(size))


def find_paths(paths: Path | Sequence[Path]) -> list[Path]:
    """The files and datasets that paths, patterns and URLs name. Raises InputError."""
    found: list[Path] = []
    for given in [paths] if isinstance(paths, Path) else paths:
        path = fetched(given)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"data shard {path} is not a file", hint="a pipe or device cannot be read twice: save it first")
        if path.exists():
            found.append(path)
            continue
        matches = sorted(Path(p) for p in glob(str(path))) if any(c in str(path) for c in "*?[") else []  # noqa: PTH207
        if not matches:
            raise InputError(f"data shard {path} does not exist", hint="give one with --data or in curv.toml")
        found += matches
    return found


def find_sources(paths: Path | Sequence[Path], checkpoint: Checkpoint) -> tuple[Source, ...]:
    """The sources that paths and patterns name, recognised by name and header. Raises InputError."""
    found = find_paths(paths)
    try:
        return tuple(open_source(path, checkpoint) for path in found)
    except OSError as error:
        raise _unreadable(error) from error


def read_shard(
    paths: Path | Sequence[Path],
    checkpoint: Checkpoint,
    *,
    tokens: int,
    sequence_length: int | None,
    sample: Sample = "first",
    seed: int = 0,
) -> Shard:
    """Enough of the data for `tokens` predictions.

    A stream is cut into consecutive windows. Rows (a 2-D array, or documents that all have one length) stay rows: each
    is cut into windows of its own, so that no window crosses one. Nor does a window cross from file to file.

    Args:
        paths: files, datasets or patterns.
        tokens: predictions wanted; rounded down to whole windows. Shorter data is used whole.
        sequence_length: predictions per window; default the row's length or 1,024, at most the model's context.
        sample: "first" takes the first windows, "spread" evenly over all, "random" without replacement by the seed.

    Raises:
        InputError: not readable, ids beyond the vocabulary, or shorter than one sequence.
    """
    sources = find_sources(paths, checkpoint)
    try:
        chosen, starts = _windows(sources, checkpoint, tokens, sequence_length, sample, seed)
    except OSError as error:
        raise _unreadable(error) from error
    low, high = int(chosen.min()), int(chosen.max())
    limit = checkpoint.vocabulary if checkpoint.vocabulary is not None else high + 1
    if low < 0 or high >= limit:
        bad = high if high >= limit else low
        raise InputError(
            f"{sources[0].path} holds token id {bad}, the model's vocabulary has {limit}",
            hint="the shard was made with another tokenizer or is stored in another integer type",
        )
    return Shard(torch.from_numpy(chosen), sources, sample, starts)


def _windows(
    sources: tuple[Source, ...], checkpoint: Checkpoint, tokens: int, length: int | None, sample: Sample, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    guess = length or 1024
    arrays: list[Ids] = []
    places: list[NDArray[np.int64]] = []
    base = found = 0
    wanted = tokens // guess
    for source in sources:
        # Rows of unknown width lose less than one window in each: twice is enough for any that holds one.
        array = source.load(None if sample != "first" else 2 * (tokens + wanted) + 4 * guess)
        if not arrays:
            length = _length(array, length, checkpoint, source.path)
            wanted = tokens // length
            if not wanted:
                raise UsageError(f"--tokens {tokens} is less than one sequence of {length}", hint="raise --tokens")
        starts = _starts(array, length or guess)
        arrays.append(array)
        places.append(starts)
        base += array.size
        found += len(starts)
        if sample == "first" and found >= wanted:
            break
    if not found:
        raise _too_short(sources, arrays, length or guess)
    picked = _picked(found, min(wanted, found), sample, seed)
    # Windows and tokens before each file: a number over all files minus its file's is the place within it.
    counts = np.cumsum([0, *(len(p) for p in places)])
    bases = np.cumsum([0, *(a.size for a in arrays)])
    owner = np.searchsorted(counts, picked, side="right") - 1  # (windows,): each one's file
    width = (length or guess) + 1
    windows = np.empty((len(picked), width), dtype=np.int64)  # (windows, sequence_length + 1)
    starts = np.empty(len(picked), dtype=np.int64)
    # Window by window, so that only what is used is read of a map of terabytes.
    for i, (file, index) in enumerate(zip(owner, picked, strict=True)):
        start = int(places[file][index - counts[file]])
        windows[i] = arrays[file].reshape(-1)[start : start + width]
        starts[i] = bases[file] + start
    return windows, starts


def _too_short(sources: tuple[Source, ...], arrays: list[Ids], length: int) -> InputError:
    place = max(range(len(arrays)), key=lambda i: arrays[i].shape[-1])
    longest = arrays[place].shape[-1]
    which = f", the longest of {counted(len(arrays), 'file')}," if len(arrays) > 1 else ""
    shape = f"{'rows of ' if arrays[place].ndim == 2 else ''}{counted(longest, 'token')}"
    more = "give more data: a prediction takes two tokens"
    return InputError(
        f"{sources[place].path}{which} has {shape}, one sequence takes {length} + 1",
        hint=more if longest < 2 else f"pass --sequence-length {longest - 1}{' or less' * (longest > 2)}, or give more data",
    )


def _length(array: Ids, length: int | None, checkpoint: Checkpoint, path: Path) -> int:
    row = array.shape[1] - 1 if array.ndim == 2 else 1024
    found = length or min(row, checkpoint.context or 1024)
    if found < 1:
        raise InputError(f"{path} has rows of {array.shape[1]} token", hint="a prediction takes two")
    if checkpoint.context is not None and found > checkpoint.context:
        raise UsageError(
            f"sequence length {found} exceeds the model's context of {checkpoint.context}",
            hint=f"pass --sequence-length {checkpoint.context} or less",
        )
    return found


def _starts(array: Ids, length: int) -> NDArray[np.int64]:
    """First tokens of the windows of a stream, or of each row, counted over the flattened array."""
    rows, width = array.shape if array.ndim == 2 else (1, array.size)
    # Windows share no token: the last target of one is not the first input of the next.
    within = np.arange(width // (length + 1), dtype=np.int64) * (length + 1)
    return np.add.outer(np.arange(rows, dtype=np.int64) * width, within).ravel()  # type: ignore[no-any-return]


def _picked(count: int, wanted: int, sample: Sample, seed: int) -> NDArray[np.int64]:
    """Which of `count` windows, in order."""
    if sample == "random":
        # In the file's order: maps are read forward, and neighbours are told as one range.
        return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False)).astype(np.int64)
    if sample == "spread":
        return (np.arange(wanted) * count // wanted).astype(np.int64)
    return np.arange(wanted, dtype=np.int64)


def _unreadable(error: OSError) -> InputError:
    return InputError(
        f"cannot read {error.filename or 'the data'}: {error.strerror or error}", hint="check the file and its permissions"
    )
