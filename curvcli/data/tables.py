"""Rows with named columns: of JSON lines, parquet, Arrow files, and what `datasets.save_to_disk` wrote."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np

from curvcli.errors import InputError
from curvcli.files.limits import inside
from curvcli.files.safe import first_line, read_json

Row = dict[str, Any]
Rows = Generator[Row, None, None]

_LINE = 2**26  # bytes of a line of JSON: readline would read a file without line ends whole
# Rows without anything, one after the other. A packed file says more of them in a kilobyte than can be skipped.
EMPTY = 2**18
# Values of a table's column that a byte of its file stores at most, beyond so many: tokens take half a byte each.
_CALM, _PER_BYTE = 2**24, 64
_FILES = 2**16  # of one dataset; each is looked at before any is read


@dataclass(frozen=True)
class Table:
    """Rows of a file or dataset, read no further than asked. Its calls raise InputError and OSError.

    Attributes:
        kind: what it was recognised as, for people.
        names: the columns, from the header; of JSON lines the first row's.
        rows: values of these columns, a dictionary a row, from the first row on. A list of numbers may be an array.
    """

    path: Path
    kind: str
    names: Callable[[], list[str]]
    rows: Callable[[Sequence[str]], Rows]


def open_table(path: Path) -> Table | None:
    """Recognise a table by its name; None for what is none. Raises InputError for a directory that is no dataset."""
    if path.is_dir():
        return _dataset(path)
    packed, suffix = packing(path)
    if suffix in (".jsonl", ".ndjson", ".json"):

        def rows(names: Sequence[str]) -> Rows:
            return ({name: row[name] for name in names if name in row} for row in _objects(path, packed))

        def first() -> list[str]:
            with closing(_objects(path, packed)) as found:
                return list(next(found, {}))

        return Table(path, f"jsonl{packed}", first, rows)
    if packed:
        return None
    if suffix == ".parquet":
        return Table(path, "parquet", partial(_parquet_names, path), partial(_parquet, path))
    if suffix in (".arrow", ".feather"):
        return Table(path, "arrow", partial(_arrow_names, [path]), partial(_arrow, [path]))
    return None


def packing(path: Path) -> tuple[str, str]:
    """How a file is packed (".gz", ".zst" or ""), and the suffix of what is in it."""
    name = path.name.lower()
    packed = next((s for s in (".gz", ".zst") if name.endswith(s)), "")
    return packed, Path(name.removesuffix(packed)).suffix


# --- JSON lines ----------------------------------------------------------------------------------


def _objects(path: Path, packed: str) -> Rows:
    with opened(path, packed) as stream:
        number = blank = 0
        while line := stream.readline(_LINE + 1):
            number += 1
            if len(line) > _LINE:
                raise InputError(f"{path}: line {number} is longer than {_LINE >> 20} MiB", hint="one row a line")
            blank = 0 if line.strip() else blank + 1
            if blank > EMPTY:
                raise InputError(f"{path} has {EMPTY:,} documents without a token in a row", hint="check the file")
            if blank:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number} is no JSON: {first_line(error)}", hint="one row a line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is no object", hint='as in {"text": "..."}')
            yield row


@contextmanager
def opened(path: Path, packed: str) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked while they are read: a bomb costs no more than what is asked for. Raises InputError."""
    damaged: tuple[type[Exception], ...] = (EOFError, zlib.error)
    if packed == ".gz":
        stored: Any = gzip.open(path, "rb")  # noqa: SIM115 - entered below
    elif packed == ".zst":
        zstandard = _needs("zstandard", path)
        damaged += (zstandard.ZstdError,)
        # zstandard's own reader has no readline.
        stored = BufferedReader(zstandard.open(path, "rb"))
    else:
        stored = path.open("rb")
    with stored as stream:
        try:
            yield stream
        except damaged as error:
            reason = first_line(error) or type(error).__name__
            raise InputError(f"{path} cannot be read: {reason}", hint="copy the file again") from error


# --- Arrow ---------------------------------------------------------------------------------------


def _parquet_names(path: Path) -> list[str]:
    parquet = _needs("pyarrow.parquet", path)
    with _read(path), closing(parquet.ParquetFile(path)) as file:
        return list(file.schema_arrow.names)


def _parquet(path: Path, names: Sequence[str]) -> Rows:
    parquet = _needs("pyarrow.parquet", path)
    with _read(path), closing(parquet.ParquetFile(path)) as file:
        schema = file.schema_arrow
        kept = [name for name in schema.names if name in names]
        _refuse_repeated(file.metadata, kept, path)
        # Of text few rows at a time: one long string that a page names again and again is as long each time.
        size = 16 if any("string" in str(schema.field(name).type) for name in kept) else 1024
        yield from _values(file.iter_batches(batch_size=size, columns=kept), kept)


def _refuse_repeated(metadata: Any, names: Sequence[str], path: Path) -> None:
    """Raises InputError where a column has far more values than bytes: a row of billions, said in a kilobyte.

    Bytes are those of all columns read: a mask of ones takes next to none beside the ids that it is of.
    """
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        parts = [part for part in map(group.column, range(group.num_columns)) if part.path_in_schema.split(".")[0] in names]
        stored = sum(part.total_compressed_size for part in parts)
        for part in parts:
            if part.num_values > _CALM and part.num_values > _PER_BYTE * stored:
                raise InputError(
                    f"{path} claims {part.num_values:,} values of {part.path_in_schema.split('.')[0]} in {stored:,} bytes",
                    hint="the file is damaged or was made to exhaust this machine: do not trust it",
                )


def _dataset(path: Path) -> Table:
    """What `datasets.save_to_disk` wrote: Arrow streams and the list of their names."""
    if (path / "dataset_dict.json").is_file():
        splits = _object(path / "dataset_dict.json").get("splits")
        names = [s for s in splits if isinstance(s, str)] if isinstance(splits, list) else []
        # What a run was trained on is the shard to measure on.
        chosen = "train" if "train" in names else names[0] if len(names) == 1 else None
        if chosen is None:
            raise InputError(f"{path} holds the splits {', '.join(names) or 'none'}", hint="give one of them: PATH/SPLIT")
        return _dataset(inside(path, chosen))
    if not (path / "state.json").is_file():
        raise InputError(
            f"data shard {path} is a directory, and no dataset of datasets.save_to_disk",
            hint="give files, or a pattern in quotes",
        )
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
    return Table(path, "datasets", partial(_arrow_names, files), partial(_arrow, files))


def _object(path: Path) -> Mapping[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} is no object", hint="save the dataset again")
    return found


@contextmanager
def _ipc(path: Path) -> Iterator[tuple[Any, Iterable[Any]]]:
    """Schema and record batches of an Arrow file, or of a stream as `datasets` writes them."""
    ipc = _needs("pyarrow.ipc", path)
    with _read(path), path.open("rb") as stream:
        # Arrow's files (and Feather's, which are the same) begin so; its streams have no mark.
        random = stream.read(6) == b"ARROW1"
        stream.seek(0)
        with ipc.open_file(stream) if random else ipc.open_stream(stream) as reader:
            yield reader.schema, (map(reader.get_batch, range(reader.num_record_batches)) if random else reader)


def _arrow_names(files: Sequence[Path]) -> list[str]:
    with _ipc(files[0]) as (schema, _):
        return list(schema.names)


def _arrow(files: Sequence[Path], names: Sequence[str]) -> Rows:
    for file in files:
        with _ipc(file) as (schema, batches):
            yield from _values(batches, [name for name in schema.names if name in names])


def _values(batches: Iterable[Any], names: Sequence[str]) -> Rows:
    for batch in batches:
        columns = {name: _column(batch.column(batch.schema.names.index(name))) for name in names}
        for i in range(batch.num_rows):
            yield {name: value(i) for name, value in columns.items()}


def _column(column: Any) -> Callable[[int], Any]:
    """A column's value by row: a list of numbers as an array over Arrow's own memory, the rest as Python has it."""
    flat = getattr(column.type, "value_type", None)
    if flat is None or not ("int" in str(flat) or "float" in str(flat) or "double" in str(flat)) or "<" in str(flat):
        # Text, single numbers, and lists of lists ("<" in the type's name), whose flat values would lose their shape.
        return lambda i: column[i].as_py()
    return lambda i: np.asarray(column[i].values) if column[i].is_valid else None


@contextmanager
def _read(path: Path) -> Iterator[None]:
    arrow = _needs("pyarrow", path)
    try:
        yield
    except arrow.ArrowException as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}", hint="copy the file again") from error


def _needs(module: str, path: Path) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"{path} needs {module.split('.')[0]}", hint="pip install 'curvcli[data]'") from error
