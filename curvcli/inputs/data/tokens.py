"""Where token ids come from: one source a file or dataset, opened by its headers and read no further than asked."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from curvcli.errors import InputError
from curvcli.inputs.base import Checkpoint
from curvcli.inputs.bounds import inside
from curvcli.inputs.data.binary import open_bin, open_idx
from curvcli.inputs.safe import read_json
from curvcli.inputs.tensors import safetensors_header, stored

Ids = NDArray[np.generic]

# Text is tokenised on every call; whoever samples from more than this should store tokens.
MOST = 2**26
_LINE = 2**26
# Documents without a token, one after the other. A packed file says more of them in a kilobyte than can be skipped.
_EMPTY = 2**18
# Values of a table's column that a byte of its file stores at most, beyond so many: tokens take half a byte each.
_CALM, _PER_BYTE = 2**24, 64
_FILES = 2**16  # of one dataset; each is looked at before any is read
_NOTHING = np.zeros(0, dtype=np.int64)
_ID_COLUMNS, _TEXT_COLUMNS = ("input_ids", "tokens", "ids"), ("text", "content")


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
    if path.is_dir():
        return _dataset(path, checkpoint)
    name = path.name.lower()
    packed = next((s for s in (".gz", ".zst") if name.endswith(s)), "")
    suffix = Path(name.removesuffix(packed)).suffix
    if not packed:
        if suffix == ".bin":
            kind, array = open_bin(path, checkpoint.vocabulary)
            return Source(path, kind, array.size, lambda n: array[:n])
        if suffix == ".idx":
            kind, array = open_idx(path)
            return Source(path, kind, array.size, lambda n: array[:n])
        if suffix in (".npy", ".safetensors"):
            ids = _npy(path) if suffix == ".npy" else _safetensors(path)
            return Source(path, suffix[1:], ids.size, lambda n: ids)
        if suffix == ".parquet":
            return _parquet(path, checkpoint)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return Source(path, f"jsonl{packed}", None, lambda n: _gathered(_json_lines(path, packed, checkpoint), n, path))
    return Source(path, f"text{packed}", None, lambda n: _text(path, packed, checkpoint, n))


def _npy(path: Path) -> Ids:
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


# --- columns of tables ---------------------------------------------------------------------------


def _parquet(path: Path, checkpoint: Checkpoint) -> Source:
    parquet = _needs("pyarrow.parquet", "data", path)

    def batches() -> Iterator[Any]:
        with closing(parquet.ParquetFile(path)) as file:
            column = _column(file.schema_arrow.names, path)
            _refuse_repeated(file.metadata, column, path)
            # Of text few rows at a time: one long string that a page names again and again is as long each time.
            rows = 16 if "string" in str(file.schema_arrow.field(column).type) else 1024
            for batch in file.iter_batches(batch_size=rows, columns=[column]):
                yield batch.column(0)

    return Source(path, "parquet", None, lambda n: _gathered(_rows(batches(), checkpoint, path), n, path))


def _refuse_repeated(metadata: Any, column: str, path: Path) -> None:
    """Raises InputError where a column has far more values than bytes: a row of billions, said in a kilobyte."""
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        parts = [part for part in map(group.column, range(group.num_columns)) if part.path_in_schema.split(".")[0] == column]
        for part in parts:
            if part.num_values > _CALM and part.num_values > _PER_BYTE * part.total_compressed_size:
                raise InputError(
                    f"{path} claims {part.num_values:,} values of {column} in {part.total_compressed_size:,} bytes",
                    hint="the file is damaged or was made to exhaust this machine: do not trust it",
                )


def _dataset(path: Path, checkpoint: Checkpoint) -> Source:
    """What `datasets.save_to_disk` wrote: Arrow streams and the list of their names."""
    if (path / "dataset_dict.json").is_file():
        splits = _object(path / "dataset_dict.json").get("splits")
        names = [s for s in splits if isinstance(s, str)] if isinstance(splits, list) else []
        chosen = "train" if "train" in names else names[0] if len(names) == 1 else None
        if chosen is None:
            raise InputError(f"{path} holds the splits {', '.join(names) or 'none'}", hint="give one of them: PATH/SPLIT")
        return _dataset(inside(path, chosen), checkpoint)
    if not (path / "state.json").is_file():
        raise InputError(
            f"data shard {path} is a directory, and no dataset of datasets.save_to_disk",
            hint="give files, or a pattern in quotes",
        )
    ipc = _needs("pyarrow.ipc", "data", path)
    listed = _object(path / "state.json").get("_data_files")
    entries = listed if isinstance(listed, list) else []
    if len(entries) > _FILES:
        raise InputError(f"{path / 'state.json'} names {len(entries):,} files", hint="save the dataset in fewer shards")
    files = [inside(path, str(entry.get("filename"))) for entry in entries if isinstance(entry, dict)]
    if not files:
        raise InputError(f"{path / 'state.json'} names no data files", hint="save the dataset again")
    odd = next((file for file in files if not file.is_file()), None)  # a pipe would be waited for
    if odd:
        raise InputError(f"{odd} is named in state.json and is no file", hint="copy the dataset again")

    def batches() -> Iterator[Any]:
        for file in files:
            with file.open("rb") as stream, ipc.open_stream(stream) as reader:
                index = reader.schema.get_field_index(_column(reader.schema.names, path))
                for batch in reader:
                    yield batch.column(index)

    return Source(path, "datasets", None, lambda n: _gathered(_rows(batches(), checkpoint, path), n, path))


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} is no object", hint="save the dataset again")
    return found


def _rows(columns: Iterable[Any], checkpoint: Checkpoint, path: Path) -> Iterator[Ids]:
    """One array of ids a row of an Arrow column of lists or of strings."""
    arrow = _needs("pyarrow", "data", path)
    tokenize: Callable[[str], Ids] | None = None
    try:
        for column in columns:
            if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
                tokenize = tokenize or tokenizer_of(checkpoint, path)
                yield from (tokenize(text) if text else _NOTHING for text in column.to_pylist())
            elif arrow.types.is_list(column.type) or arrow.types.is_large_list(column.type):
                yield from (np.asarray(scalar.values) if scalar.is_valid else _NOTHING for scalar in column)
            else:
                raise InputError(f"{path}: its column is {column.type}", hint="expected lists of token ids, or text")
    except arrow.ArrowException as error:
        raise InputError(f"{path} cannot be read: {_line(error)}", hint="copy the file again") from error


def _column(names: list[str], path: Path) -> str:
    found = next((name for name in (*_ID_COLUMNS, *_TEXT_COLUMNS) if name in names), None)
    if found is None:
        raise InputError(
            f"{path} has the columns {', '.join(names)[:200]}",
            hint=f"expected one of: {', '.join((*_ID_COLUMNS, *_TEXT_COLUMNS))}",
        )
    return found


# --- lines and text ------------------------------------------------------------------------------


def _json_lines(path: Path, packed: str, checkpoint: Checkpoint) -> Iterator[Ids]:
    tokenize: Callable[[str], Ids] | None = None
    with _opened(path, packed) as stream:
        number = 0
        while line := stream.readline(_LINE + 1):
            number += 1
            if len(line) > _LINE:
                raise InputError(f"{path}: line {number} is longer than {_LINE >> 20} MiB", hint="one document a line")
            if not line.strip():
                yield _NOTHING
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number} is no JSON: {_line(error)}", hint="one document a line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is no object", hint='as in {"text": "..."}')
            value = row[_column(list(row), path)]
            if isinstance(value, str):
                tokenize = tokenize or tokenizer_of(checkpoint, path)
                yield tokenize(value)
            elif isinstance(value, list) and all(isinstance(i, int) and abs(i) < 2**62 for i in value):
                yield np.asarray(value, dtype=np.int64)
            else:
                raise InputError(f"{path}: line {number} holds neither text nor token ids", hint="integers in a list")


def _text(path: Path, packed: str, checkpoint: Checkpoint, wanted: int | None) -> Ids:
    tokenize = tokenizer_of(checkpoint, path, end=False)
    # No tokenizer in use takes more than 16 bytes of text for a token on average.
    most = 16 * (wanted if wanted is not None else MOST)
    with _opened(path, packed) as stream:
        raw = stream.read(most + 1)
    if wanted is None and len(raw) > most:
        raise InputError(f"{path} is more text than can be sampled from", hint="store tokens, or use --sample first")
    ids = tokenize(raw[:most].decode("utf-8", errors="ignore"))
    return ids if wanted is None else ids[:wanted]


def load_tokenizer(checkpoint: Checkpoint, path: Path) -> Any:
    """transformers' tokenizer beside the checkpoint, for the text in `path`. Raises InputError."""
    if checkpoint.tokenizer is None:
        raise InputError(
            f"{path} is text, and {checkpoint.path} has no tokenizer to turn it into tokens",
            hint="save the tokenizer beside the checkpoint, or give tokens (.bin, .npy, .safetensors, input_ids in .jsonl)",
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.tokenizer, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises every kind there is
        raise InputError(
            f"transformers cannot build the tokenizer in {checkpoint.tokenizer}: {_line(error)}",
            hint="give tokens instead (.bin, .npy, .safetensors)",
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
            if empty > _EMPTY:
                raise InputError(f"{path} has {_EMPTY:,} documents without a token in a row", hint="check the file")
            if len(row):
                found.append(_integers(row, path))
                count += len(row)
            if count > (MOST if wanted is None else wanted):
                break
    if wanted is None and count > MOST:
        raise InputError(f"{path} holds more than can be sampled from", hint="store tokens, or use --sample first")
    if not found:
        return _NOTHING
    if len(found) > 1 and len(found[0]) > 1 and len({len(row) for row in found}) == 1:
        return np.stack(found)
    return np.concatenate(found)


@contextmanager
def _opened(path: Path, packed: str) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked while they are read: a bomb costs no more than what is asked for."""
    damaged: tuple[type[Exception], ...] = (EOFError, zlib.error)
    if packed == ".gz":
        opened: Any = gzip.open(path, "rb")  # noqa: SIM115 - entered below
    elif packed == ".zst":
        zstandard = _needs("zstandard", "data", path)
        damaged += (zstandard.ZstdError,)
        opened = BufferedReader(zstandard.open(path, "rb"))
    else:
        opened = path.open("rb")
    with opened as stream:
        try:
            yield stream
        except damaged as error:
            raise InputError(f"{path} cannot be read: {_line(error)}", hint="copy the file again") from error


def _needs(module: str, extra: str, path: Path) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"{path} needs {module.split('.')[0]}", hint=f"pip install 'curvcli[{extra}]'") from error


def _line(error: BaseException) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
