"""Examples with named columns, for tasks whose data is more than a stream of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvcli.data.tables import Row, Table, open_table
from curvcli.data.tokens import CHATS, MOST, chat
from curvcli.errors import InputError
from curvcli.files.tensors import leading, safetensors_header

IGNORED = -100  # torch's and transformers' label for "no prediction here"
_MARKS = frozenset({"labels", "pixel_values", "decoder_input_ids"})  # a stream of tokens has none of these
# What trainers write beside the ids of rows without labels: which predictions count, and which documents a row was
# packed of (TRL's names).
_COUNTED = ("completion_mask", "assistant_masks")
_PACKED = ("position_ids", "seq_lengths")
_LOOKED = 64  # rows looked at for padding
_TEXTS = ("text", "text_pair", "label", "labels")

Encode = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Examples:
    """Columns of one row per example, and where they are from.

    Attributes:
        columns: each of shape (rows, ...): integers as int64, the rest as float32.
        tokens: predictions: labels other than -100, or rows where there are no labels.
        sha256: digest of the columns used; of masked windows, of their token ids before they were masked.
        files: those that were read, each with what it was recognised as.
    """

    path: Path
    columns: Mapping[str, Tensor]
    tokens: int
    sha256: str
    files: tuple[tuple[Path, str], ...] = ()

    @property
    def rows(self) -> int:
        """How many examples there are."""
        return len(next(iter(self.columns.values())))

    @property
    def sequence_length(self) -> int | None:
        """Length of the padded ids; None where there are none."""
        ids = self.columns.get("input_ids")
        return ids.shape[1] if ids is not None and ids.dim() == 2 else None

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """The examples in batches of `size` rows, the last perhaps smaller."""
        parts = {name: column.split(size) for name, column in self.columns.items()}
        return [{name: pieces[i] for name, pieces in parts.items()} for i in range(-(-self.rows // size))]


def holds_examples(path: Path, *, causal: bool = False) -> bool:
    """Whether a file or dataset has labels or other columns of examples, rather than tokens alone. Raises InputError.

    Args:
        causal: of a causal language model rows are examples, too, where masks say which tokens count or are padding.
    """
    with _readable(path):
        if path.suffix == ".safetensors" and path.is_file():
            names = {tensor.name for tensor in safetensors_header(path)}
            masks = [leading(path, _LOOKED)["attention_mask"]] if causal and "attention_mask" in names else []
        else:
            table = open_table(path) if path.exists() else None
            names = set(table.names()) if table else set()
            masks = _masks(table) if table and causal and "attention_mask" in names else []
    if not _MARKS.isdisjoint(names) or (causal and not names.isdisjoint((*_COUNTED, *_PACKED))):
        return True
    return "input_ids" in names and any(not bool((mask != 0).all()) for mask in masks)


def _masks(table: Table) -> list[Tensor]:
    with closing(table.rows(["attention_mask"])) as rows:
        found = [row.get("attention_mask") for _, row in zip(range(_LOOKED), rows, strict=False)]
    return [_value("attention_mask", mask, table.path) for mask in found if mask is not None]


def read_examples(
    paths: Path | Sequence[Path], *, predictions: int, shifted: bool = False, encode: Encode | None = None
) -> Examples:
    """The first examples of files or datasets, as many as make up to so many predictions, and one at least.

    A .safetensors file has a tensor per column, its first dimension the examples; a table (JSON lines, parquet, Arrow,
    save_to_disk) has a row per example. Lists of integers of unequal length are padded at the end, labels with -100
    and others with 0, and get an attention_mask where they have none. Columns that hold no numbers are left out beside
    input_ids or pixel_values. Examples without any label are left out.

    Args:
        predictions: labels other than -100 to average over.
        shifted: of a causal language model: the label at a position is predicted from the positions before it, so that
            the first counts for none. Rows without labels have their ids for labels, where masks say that they count.
        encode: makes numbers of rows of text.

    Raises:
        InputError: not readable, or columns that do not fit together.
    """
    listed = [paths] if isinstance(paths, Path) else list(paths)
    parts: list[dict[str, Tensor]] = []
    files: list[tuple[Path, str]] = []
    left = predictions
    for path in listed:
        with _readable(path):
            kind, columns = _read(path, max(left, 1), shifted, encode)
        _check(columns, path)
        parts.append(columns)
        files.append((path, kind))
        left -= int(labelled(columns, shifted=shifted).sum())
        if left <= 0:
            break
    columns = _joined(parts, files)
    counts = labelled(columns, shifted=shifted)
    kept = counts.nonzero().flatten()
    if not len(kept):
        raise InputError(
            f"{listed[0]} has no label other than {IGNORED} in its first rows", hint="label what is to be predicted"
        )
    # Whole rows, with no more predictions than asked for; but the first whatever it has.
    kept = kept[: max(1, int((counts[kept].cumsum(0) <= predictions).sum()))]
    columns = {name: column[kept].contiguous() for name, column in columns.items()}
    return Examples(listed[0], columns, int(counts[kept].sum()), _digest(columns), tuple(files))


def labelled(columns: Mapping[str, Tensor], *, shifted: bool) -> Tensor:
    """Predictions in each row, shape (rows,)."""
    labels = columns.get("labels")
    if labels is None:
        return torch.ones(len(next(iter(columns.values()))), dtype=torch.int64)
    return _counts(labels, shifted=shifted)


def _counts(labels: Tensor, *, shifted: bool) -> Tensor:
    counted = labels[:, 1:] if shifted and labels.dim() == 2 else labels
    return (counted != IGNORED).reshape(len(labels), -1).sum(1)


def _read(path: Path, limit: int, shifted: bool, encode: Encode | None) -> tuple[str, dict[str, Tensor]]:
    """What a file was recognised as, and the columns of its first rows."""
    if path.suffix == ".safetensors" and path.is_file():
        columns = {name: _typed(name, tensor, path) for name, tensor in leading(path, limit).items()}
        return "safetensors", _seen_whole([_causal(columns, path) if shifted else columns])[0]
    if not path.exists():
        raise InputError(f"{path} is no file of examples", hint="give a .safetensors or a table with named columns")
    table = open_table(path)
    if table is None:
        raise InputError(
            f"{path} holds no named columns (input_ids, pixel_values, labels, ...)",
            hint="this loss takes examples: give them as .safetensors, .jsonl, .parquet or save_to_disk's",
        )
    return table.kind, _stacked(_seen_whole(_rows(table, limit, shifted, encode)), path)


def _rows(table: Table, limit: int, shifted: bool, encode: Encode | None) -> list[dict[str, Tensor]]:
    """Rows of numbers until they hold more predictions than the limit, or are as many."""
    path, names = table.path, table.names()
    texts = encode is not None and "text" in names and "input_ids" not in names
    wanted = [name for name in names if name in _TEXTS] if texts else _numbers(table, names)
    found: list[Row] = []
    counted = size = 0
    with closing(table.rows(wanted)) as rows:
        for number, row in enumerate(rows, 1):
            odd = next((name for name in wanted if row.get(name) is None), None)
            if odd is not None:
                raise InputError(
                    f"row {number} of {path}: column {odd} is not in every row", hint="give all rows all columns"
                )
            if not texts:
                row = {name: _value(name, value, path) for name, value in row.items()}
                row = _causal(row, path) if shifted else row
            found.append(row)
            counted += 1 if texts or "labels" not in row else int(_counts(row["labels"][None], shifted=shifted))
            # Rows without labels cost memory and no predictions. Text counts by the tokens that it makes at least.
            size += sum(len(v) // 16 if isinstance(v, str) else v.numel() for v in row.values() if _is_ids(v))
            if size > MOST:
                raise InputError(
                    f"the first {number:,} rows of {path} hold {size:,} ids and {counted:,} predictions",
                    hint="cut the rows, or ask for fewer --tokens",
                )
            # One row beyond the predictions wanted tells that there is more. Where rows have none, as many rows are enough.
            if counted > limit or number == limit:
                break
    if not found:
        raise InputError(f"{path} has no examples", hint="give one row an example")
    if encode is None:
        return found
    return [
        {name: v if isinstance(v, Tensor) else _value(name, v, path) for name, v in row.items()} for row in encode(found)
    ]


def _numbers(table: Table, names: Sequence[str]) -> list[str]:
    """The columns that hold numbers, by the first row: text beside ids or pixels is for people."""
    if not CHATS.isdisjoint(names) and "input_ids" not in names:
        raise chat(table.path)
    if not any(name in names for name in ("input_ids", "pixel_values")):
        return list(names)
    with closing(table.rows(names)) as rows:
        first = next(rows, {})

    def kept(name: str) -> bool:
        if name in ("labels", "pixel_values", "attention_mask", *_COUNTED, *_PACKED) or name.endswith("input_ids"):
            return True
        try:
            return np.asarray(first.get(name)).dtype.kind in "iufb"
        except (ValueError, OverflowError):
            return False

    return [name for name in names if kept(name)]


def _is_ids(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Tensor) and not value.is_floating_point())


def _value(name: str, value: Any, path: Path) -> Tensor:
    """One row's numbers of a column."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"column {name} of {path} has rows of unequal shapes", hint="only lists of ids may differ"
        ) from error
    if array.dtype.kind not in "iufb":
        raise InputError(
            f"column {name} of {path} holds no numbers",
            hint="give token ids, pixels and labels as numbers: text is tokenised for classifiers alone, as text and label",
        )
    floats = array.dtype.kind == "f" and array.size > 0  # an empty list has no type of its own
    return _typed(name, torch.from_numpy(array.astype(np.float32 if floats else np.int64)), path)


def _stacked(rows: list[dict[str, Tensor]], path: Path) -> dict[str, Tensor]:
    """Rows as columns, lists of ids padded to the longest."""
    columns = {name: _column(name, [row[name] for row in rows], path) for name in rows[0]}
    lengths = [len(row["input_ids"]) for row in rows if "input_ids" in row and row["input_ids"].dim() == 1]
    if len(set(lengths)) > 1 and "attention_mask" not in columns and "position_ids" not in columns:
        places = torch.arange(max(lengths))
        columns["attention_mask"] = (places < torch.tensor(lengths)[:, None]).to(torch.int64)
    return columns


def _column(name: str, values: list[Tensor], path: Path) -> Tensor:
    if all(value.dim() == 1 and not value.is_floating_point() for value in values):
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=_blank(name))
    if len({value.shape for value in values}) > 1:
        raise InputError(f"column {name} of {path} has rows of unequal shapes", hint="only lists of ids may differ")
    # JSON writes 1.0 as 1: some rows of a column of floats look whole.
    if len({value.dtype for value in values}) > 1:
        values = [value.float() for value in values]
    return torch.stack(values)


def _blank(name: str) -> int:
    return IGNORED if name == "labels" else 0


def _causal(columns: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Labels and positions of a causal language model's rows, as trainers make them: of one row, or of all.

    Ids are their own labels, but for padding and for the first token of a document, which nothing comes before.
    `completion_mask` and `assistant_masks` say which labels count; `seq_lengths` which documents a row was packed of.
    """
    found = dict(columns)
    ids = found.get("input_ids")
    if ids is None or ids.is_floating_point():
        return found
    packed = found.pop("seq_lengths", None)
    if packed is not None:
        if packed.dim() != 1 or ids.dim() != 1 or (packed < 0).any() or int(packed.sum()) != len(ids):
            raise InputError(
                f"seq_lengths of {path} do not add up to the row's ids",
                hint="give position_ids that begin at 0 in each document",
            )
        found["position_ids"] = torch.cat([torch.arange(n) for n in packed.tolist()])
    masks = {name: found.pop(name) for name in _COUNTED if name in found}
    # Labels that were given say by themselves what counts; padding in them is -100 already.
    if "labels" not in found and "attention_mask" in found:
        masks["attention_mask"] = found["attention_mask"]
    if ("labels" not in found or packed is not None) and "position_ids" in found:
        # Position 0 is a document's first token.
        masks["position_ids"] = found["position_ids"]
    labels = found.get("labels", ids)
    for name, mask in masks.items():
        if mask.shape != labels.shape:
            raise InputError(
                f"{name} of {path} has shape {tuple(mask.shape)}, its ids or labels {tuple(labels.shape)}",
                hint="give one number for each id",
            )
        labels = labels.masked_fill(mask == 0, IGNORED)
    return {**found, "labels": _behind_padding(labels, found.get("attention_mask"))}


def _behind_padding(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Labels without the first id behind padding at the left: what predicts it is a place that may attend to nothing.

    There eager attention is uniform whatever the weights are, and autograd's derivative of it is not: no loss has that as
    its gradient. Trainers count that prediction, one of a row, and make it of whatever their kernel gives there.
    """
    if mask is None or mask.shape != labels.shape:
        return labels
    blind = (mask != 0).cumsum(-1) == 0  # (..., length): nothing up to here is attended to
    after = nn.functional.pad(blind[..., :-1], (1, 0), value=False)
    return labels.masked_fill(after, IGNORED)


def _seen_whole(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Without masks of ones beside positions: given one, transformers does not look where documents begin."""
    if all("position_ids" in row and bool((row.get("attention_mask", torch.ones(1)) != 0).all()) for row in rows):
        return [{name: value for name, value in row.items() if name != "attention_mask"} for row in rows]
    return rows


def _joined(parts: list[dict[str, Tensor]], files: list[tuple[Path, str]]) -> dict[str, Tensor]:
    """Columns of several files as one, ids padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    widths = {part["input_ids"].shape[1:] for part in parts if "input_ids" in part}
    # What is padded here to the width of another file must not be attended to.
    if any("attention_mask" in part for part in parts) or (len(widths) > 1 and "position_ids" not in parts[0]):
        parts = [{"attention_mask": torch.ones_like(part["input_ids"]), **part} for part in parts if "input_ids" in part]
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        odd = next((path for part, (path, _) in zip(parts, files, strict=False) if part.keys() != parts[0].keys()), None)
        if odd is not None:
            raise InputError(f"{odd} has other columns than {files[0][0]}", hint="give all files the same columns")
        columns = [part[name] for part in parts]
        if all(column.dim() == 2 and not column.is_floating_point() for column in columns):
            width = max(column.shape[1] for column in columns)
            columns = [nn.functional.pad(c, (0, width - c.shape[1]), value=_blank(name)) for c in columns]
        elif len({(column.shape[1:], column.dtype) for column in columns}) > 1:
            raise InputError(f"column {name} has another shape in some files", hint="give files whose rows have one shape")
        joined[name] = torch.cat(columns)
    return joined


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}", hint="check the file and its permissions"
        ) from error


def _typed(name: str, tensor: Tensor, path: Path) -> Tensor:
    if tensor.is_complex():
        raise InputError(f"column {name} of {path} is complex", hint="give integers or floats")
    return tensor.float() if tensor.is_floating_point() else tensor.to(torch.int64)


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
        if ids and not column.numel():
            raise InputError(f"column {name} of {path} is empty in every row read", hint="check how the file was made")
        if column.is_floating_point() and not bool(torch.isfinite(column).all()):
            raise InputError(f"column {name} of {path} holds NaN or inf", hint="check how the file was made")
    mask, ids_column = columns.get("attention_mask"), columns.get("input_ids")
    if mask is not None and ids_column is not None and (mask.shape != ids_column.shape or bool((mask > 1).any())):
        # Four dimensions replace the model's own causal and sliding masks: another function. A 2 is a second document.
        raise InputError(
            f"attention_mask of {path} is {[*mask.shape]} with values to {mask.max()}, input_ids {[*ids_column.shape]}",
            hint="give one 0 or 1 for each id; where it counts documents, position_ids that begin at 0 in each, without it",
        )


def _digest(columns: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        # The shape as well: the same bytes cut into other rows are other examples.
        digest.update(f"{name} {columns[name].dtype} {tuple(columns[name].shape)}\n".encode())
        digest.update(columns[name].numpy().tobytes())
    return digest.hexdigest()
