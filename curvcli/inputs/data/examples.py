"""Examples with named columns, for tasks whose data is more than a stream of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvcli.errors import InputError
from curvcli.inputs.tensors import leading, safetensors_header

IGNORED = -100  # torch's and transformers' label for "no prediction here"
_MARKS = frozenset({"labels", "pixel_values", "decoder_input_ids"})
_LINE_LIMIT = 16 * 2**20

Encode = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Examples:
    """Columns of one row per example, and where they are from.

    Attributes:
        columns: each of shape (rows, ...): integers as int64, the rest as float32.
        tokens: predictions: labels other than -100, or rows where there are no labels.
        sha256: digest of the columns used; of masked windows, of their token ids before they were masked.
    """

    path: Path
    columns: Mapping[str, Tensor]
    tokens: int
    sha256: str

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def sequence_length(self) -> int | None:
        ids = self.columns.get("input_ids")
        return ids.shape[1] if ids is not None and ids.dim() == 2 else None

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """The examples in batches of `size` rows, the last perhaps smaller."""
        parts = {name: column.split(size) for name, column in self.columns.items()}
        return [{name: pieces[i] for name, pieces in parts.items()} for i in range(-(-self.rows // size))]


def holds_examples(path: Path) -> bool:
    """Whether a file has labels or other columns of examples, rather than tokens alone. Raises InputError."""
    if not path.is_file():
        return False
    if path.suffix == ".safetensors":
        return not _MARKS.isdisjoint(t.name for t in safetensors_header(path))
    return path.suffix == ".jsonl" and not _MARKS.isdisjoint(next(_lines(path), {}))


def read_examples(path: Path, *, predictions: int, shifted: bool = False, encode: Encode | None = None) -> Examples:
    """The first examples of a file, as many as make up to so many predictions, and one at least.

    A .safetensors file has a tensor per column, its first dimension the examples. In a .jsonl file each line is an
    object; lists of integers of unequal length are padded at the end, labels with -100 and others with 0, and get an
    attention_mask where they have none. Examples without any label are left out.

    Args:
        predictions: labels other than -100 to average over.
        shifted: the label at a position is predicted from the positions before it, so that the first counts for none.
        encode: makes numbers of rows of text.

    Raises:
        InputError: not readable, or columns that do not fit together.
    """
    if not path.is_file():
        raise InputError(f"{path} is no file of examples", hint="give a .safetensors or .jsonl with named columns")
    if path.suffix not in (".safetensors", ".jsonl"):
        raise InputError(
            f"{path} holds no named columns (input_ids, pixel_values, labels, ...)",
            hint="this loss takes examples: give them as .safetensors or .jsonl",
        )
    try:
        columns = _safetensors(path, predictions) if path.suffix == ".safetensors" else _jsonl(path, predictions, encode)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}", hint="check the file and its permissions"
        ) from error
    _check(columns, path)
    counts = labelled(columns, shifted=shifted)
    kept = counts.nonzero().flatten()
    if not len(kept):
        raise InputError(f"{path} has no label other than {IGNORED} in its first rows", hint="label what is to be predicted")
    kept = kept[: max(1, int((counts[kept].cumsum(0) <= predictions).sum()))]
    columns = {name: column[kept].contiguous() for name, column in columns.items()}
    return Examples(path, columns, int(counts[kept].sum()), _digest(columns))


def labelled(columns: Mapping[str, Tensor], *, shifted: bool) -> Tensor:
    """Predictions in each row, shape (rows,)."""
    labels = columns.get("labels")
    if labels is None:
        return torch.ones(len(next(iter(columns.values()))), dtype=torch.int64)
    counted = labels[:, 1:] if shifted and labels.dim() == 2 else labels
    return (counted != IGNORED).reshape(len(labels), -1).sum(1)


def _safetensors(path: Path, limit: int) -> dict[str, Tensor]:
    return {name: _typed(name, tensor, path) for name, tensor in leading(path, limit).items()}


def _typed(name: str, tensor: Tensor, path: Path) -> Tensor:
    if tensor.is_complex():
        raise InputError(f"column {name} of {path} is complex", hint="give integers or floats")
    return tensor.float() if tensor.is_floating_point() else tensor.to(torch.int64)


def _lines(path: Path) -> Any:
    """The objects of a .jsonl file, one at a time."""
    with path.open("rb") as stream:
        for number in range(1, 2**62):
            line = stream.readline(_LINE_LIMIT)
            if not line:
                return
            if len(line) == _LINE_LIMIT:
                raise InputError(f"line {number} of {path} is longer than {_LINE_LIMIT >> 20} MiB", hint="check the file")
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"line {number} of {path} is no JSON: {error}", hint="write one object a line") from error
            if not isinstance(found, dict):
                raise InputError(f"line {number} of {path} is no object", hint="write one object a line")
            yield found


def _jsonl(path: Path, limit: int, encode: Encode | None) -> dict[str, Tensor]:
    rows: list[dict[str, Any]] = []
    for row in _lines(path):
        if rows and row.keys() != rows[0].keys():
            odd = sorted(row.keys() ^ rows[0].keys())[0]
            raise InputError(
                f"row {len(rows) + 1} of {path}: column {odd} is not in every row", hint="give all rows all columns"
            )
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        raise InputError(f"{path} has no examples", hint="write one object a line")
    rows = encode(rows) if encode else rows
    columns = {name: _column(name, [row[name] for row in rows], path) for name in rows[0]}
    lengths = [len(row["input_ids"]) for row in rows if isinstance(row.get("input_ids"), list)]
    if len(set(lengths)) > 1 and "attention_mask" not in columns:
        places = torch.arange(max(lengths))
        columns["attention_mask"] = (places < torch.tensor(lengths)[:, None]).to(torch.int64)
    return columns


def _column(name: str, values: list[Any], path: Path) -> Tensor:
    if all(isinstance(v, list) and all(type(x) is int for x in v) for v in values):
        width, blank = max(map(len, values)), IGNORED if name == "labels" else 0
        values = [[*v, *[blank] * (width - len(v))] for v in values]
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"column {name} of {path} has rows of unequal shapes", hint="only lists of ids may differ"
        ) from error
    if array.dtype.kind not in "iufb":
        raise InputError(
            f"column {name} of {path} holds no numbers",
            hint="give token ids, pixels and labels as numbers: text is tokenised for classifiers alone, as text and label",
        )
    return _typed(name, torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64)), path)


def _check(columns: Mapping[str, Tensor], path: Path) -> None:
    """Raises InputError where columns are empty, unequal in rows, not finite or of the wrong kind."""
    sizes = {name: len(column) if column.dim() else 0 for name, column in columns.items()}
    if not sizes or 0 in sizes.values():
        odd = next((name for name, size in sizes.items() if not size), "a column")
        raise InputError(f"{path} has no rows in {odd}", hint="give one row per example in every column")
    if len(set(sizes.values())) > 1:
        raise InputError(f"{path} has columns of unequal length: {sizes}", hint="give one row per example in every column")
    for name, column in columns.items():
        ids = name.endswith("input_ids") or name in ("labels", "token_type_ids")
        if ids and column.is_floating_point():
            raise InputError(
                f"column {name} of {path} holds floats, not ids or classes",
                hint="regression and several labels at once need --loss package.module:function of your own",
            )
        if column.is_floating_point() and not bool(torch.isfinite(column).all()):
            raise InputError(f"column {name} of {path} holds NaN or inf", hint="check how the file was made")
    mask, ids_column = columns.get("attention_mask"), columns.get("input_ids")
    if mask is not None and ids_column is not None and mask.shape != ids_column.shape:
        # A mask of four dimensions replaces the model's own causal and sliding masks: another function.
        raise InputError(
            f"attention_mask of {path} has shape {tuple(mask.shape)}, input_ids {tuple(ids_column.shape)}",
            hint="give one 0 or 1 for each id",
        )


def _digest(columns: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(f"{name} {columns[name].dtype} {tuple(columns[name].shape)}\n".encode())
        digest.update(columns[name].numpy().tobytes())
    return digest.hexdigest()
