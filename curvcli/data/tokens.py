"""Where token ids come from: one source a file or dataset, opened by its headers and read no further than asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvcli.checkpoints.base import Checkpoint
from curvcli.data.binary import open_bin, open_idx
from curvcli.data.tables import EMPTY, Table, open_table, opened, packing
from curvcli.errors import InputError
from curvcli.files.safe import first_line
from curvcli.files.tensors import safetensors_header, stored

Ids = NDArray[np.generic]

# Text is tokenised on every call; whoever samples from more than this should store tokens.
MOST = 2**26
_MAGIC = b"\x93NUMPY"
_NOTHING = np.zeros(0, dtype=np.int64)
_ID_COLUMNS, _TEXT_COLUMNS = ("input_ids", "tokens", "ids"), ("text", "content")
CHATS = frozenset({"messages", "conversations", "conversation"})


@dataclass(frozen=True)
class Source:
    """Token ids of one file or dataset.

    Attributes:
        kind: what it was recognised as, for people.
        tokens: how many it holds; None where only reading tells.
        load: the first n ids (at least, where there are as many), or all for None: an integer array of one dimension,
            or of two whose rows no window may cross. A memory map where the file allows it.
    """

    path: Path
    kind: str
    tokens: int | None
    load: Callable[[int | None], Ids]


def open_source(path: Path, checkpoint: Checkpoint) -> Source:
    """Recognise a file or a dataset directory by its name and header. Raises InputError."""
    table = open_table(path)
    if table is not None:
        return Source(path, table.kind, None, lambda n: _gathered(_documents(table, checkpoint), n, path))
    packed, suffix = packing(path)
    if not packed:
        if suffix == ".bin":
            kind, array = open_bin(path, checkpoint.vocabulary)
            return Source(path, kind, array.size, lambda n: array[:n])
        if suffix == ".idx":
            kind, array = open_idx(path)
            return Source(path, kind, array.size, lambda n: array[:n])
        if suffix == ".npy":
            ids = _npy(path)
            return Source(path, "npy", ids.size, lambda n: ids)
        if suffix == ".safetensors":
            shape = {tensor.name: tensor.shape for tensor in safetensors_header(path)}.get("input_ids")
            return Source(path, "safetensors", None if shape is None else prod(shape), lambda n: _safetensors(path))
    return Source(path, f"text{packed}", None, lambda n: _text(path, packed, checkpoint, n))


def _npy(path: Path) -> Ids:
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise InputError(
                f"{path} has no header of numpy's",
                hint="raw tokens, as numpy.memmap and OLMo write them, are read as .bin: rename it",
            )
    try:
        return _integers(np.load(path, mmap_mode="r", allow_pickle=False), path)
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python's tokens, and raises what that does
        raise InputError(f"{path} is not a plain .npy array: {error}", hint="save token ids with numpy.save") from error


def _safetensors(path: Path) -> Ids:
    names = sorted(tensor.name for tensor in safetensors_header(path))
    if "input_ids" not in names:
        raise InputError(f"{path} has no tensor input_ids", hint=f"it has {names[:5]}")
    return _integers(stored({"input_ids": path})["input_ids"].numpy(), path)


def _integers(array: Ids, path: Path) -> Ids:
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu" or 0 in array.shape:
        raise InputError(
            f"{path} has shape {array.shape} of {array.dtype}, not token ids",
            hint="expected integers, one or two dimensions",
        )
    return array


# --- documents of tables -------------------------------------------------------------------------


def _documents(table: Table, checkpoint: Checkpoint) -> Iterator[Ids]:
    """One array of ids a row, without its padding where an attention_mask says which that is."""
    path = table.path
    column = _column(table.names(), path)
    tokenize: Callable[[str], Ids] | None = None
    with closing(table.rows([column, "attention_mask"])) as rows:
        for number, row in enumerate(rows, 1):
            value, mask = row.get(column), row.get("attention_mask")
            if isinstance(value, str):
                tokenize = tokenize or tokenizer_of(checkpoint, path)
                yield tokenize(value) if value else _NOTHING
            elif isinstance(value, np.ndarray):
                yield _unpadded(value, mask, path)
            # Within int64, or numpy would make floats or objects of them.
            elif isinstance(value, list) and all(isinstance(i, int) and abs(i) < 2**62 for i in value):
                yield _unpadded(np.asarray(value, dtype=np.int64), mask, path)
            elif value is None and column in row:
                yield _NOTHING
            else:
                raise InputError(
                    f"{path}: row {number} holds neither text nor token ids in {column}", hint="integers in a list, or text"
                )


def _unpadded(ids: Ids, mask: Any, path: Path) -> Ids:
    if mask is None:
        return ids
    kept = np.asarray(mask)
    if kept.shape != ids.shape or kept.dtype.kind not in "iub":
        raise InputError(f"{path}: an attention_mask does not fit its ids", hint="give one 0 or 1 for each id")
    found: Ids = ids[kept != 0]
    return found


def _column(names: Sequence[str], path: Path) -> str:
    found = next((name for name in (*_ID_COLUMNS, *_TEXT_COLUMNS) if name in names), None)
    if found is not None:
        return found
    if not CHATS.isdisjoint(names):
        raise chat(path)
    raise InputError(
        f"{path} has {'the columns ' + ', '.join(names)[:200] if names else 'no rows'}",
        hint=f"expected one of: {', '.join((*_ID_COLUMNS, *_TEXT_COLUMNS))}",
    )


def chat(path: Path) -> InputError:
    """Why conversations are not read."""
    return InputError(
        f"{path} holds conversations: a checkpoint's chat template is a program, which curv never runs, and which tokens "
        "the loss counts is the trainer's choice",
        hint="give the rows that were trained on, as input_ids and labels: with TRL, "
        "SFTTrainer(...).train_dataset.to_parquet('rows.parquet'); or text rendered by tokenizer.apply_chat_template",
    )


# --- text ----------------------------------------------------------------------------------------


def _text(path: Path, packed: str, checkpoint: Checkpoint, wanted: int | None) -> Ids:
    # A file of text is one stream that is cut anywhere: its end is no document's.
    tokenize = tokenizer_of(checkpoint, path, end=False)
    # No tokenizer in use takes more than 16 bytes of text for a token on average.
    most = 16 * (wanted if wanted is not None else MOST)
    with opened(path, packed) as stream:
        raw = stream.read(most + 1)
    if wanted is None and len(raw) > most:
        raise InputError(f"{path} is more text than can be sampled from", hint="store tokens, or use --sample first")
    # The cut may go through a character.
    ids = tokenize(raw[:most].decode("utf-8", errors="ignore"))
    return ids if wanted is None else ids[:wanted]


def load_tokenizer(checkpoint: Checkpoint, path: Path) -> Any:
    """transformers' tokenizer beside the checkpoint, for the text in `path`. Raises InputError."""
    if checkpoint.tokenizer is None:
        raise InputError(
            f"{path} is text, and {checkpoint.path} has no tokenizer to turn it into tokens",
            hint="save the tokenizer beside the checkpoint, or give tokens (.bin, .npy, .safetensors, input_ids in .jsonl)",
        )
    return tokenizer_in(checkpoint.tokenizer, instead="tokens (.bin, .npy, .safetensors)")


def tokenizer_in(folder: Path, *, instead: str) -> Any:
    """transformers' tokenizer that is saved in a folder. Raises InputError, which says what to give instead."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises every kind there is
        raise InputError(
            f"transformers cannot build the tokenizer in {folder}: {first_line(error)}", hint=f"give {instead} instead"
        ) from error


def tokenizer_of(checkpoint: Checkpoint, path: Path, *, end: bool = True) -> Callable[[str], Ids]:
    """Text to ids by the checkpoint's tokenizer, its end-of-text token after each document where it has one."""
    tokenizer = load_tokenizer(checkpoint, path)
    last = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []

    def ids(text: str) -> Ids:
        return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + last, dtype=np.int64)

    return ids


def _gathered(rows: Iterator[Ids], wanted: int | None, path: Path) -> Ids:
    """Documents one after the other; as rows where all have one length."""
    found: list[Ids] = []
    count = empty = 0
    with closing(rows):  # type: ignore[type-var]
        for row in rows:
            empty = 0 if len(row) else empty + 1
            if empty > EMPTY:
                raise InputError(f"{path} has {EMPTY:,} documents without a token in a row", hint="check the file")
            if len(row):
                found.append(_integers(row, path))
                count += len(row)
            if count > (MOST if wanted is None else wanted):
                break
    if wanted is None and count > MOST:
        raise InputError(f"{path} holds more than can be sampled from", hint="store tokens, or use --sample first")
    if not found:
        return _NOTHING
    # One length throughout is what packing leaves, whose rows belong together; a row of one token predicts nothing.
    if len(found) > 1 and len(found[0]) > 1 and len({len(row) for row in found}) == 1:
        return np.stack(found)
    return np.concatenate(found)
