"""Rows of text with a label, as classifiers are trained on, turned into ids by the checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curvcli.checkpoints.base import Checkpoint
from curvcli.data.tokens import load_tokenizer
from curvcli.errors import InputError
from curvcli.files.safe import read_json

Row = dict[str, Any]


def encoded(rows: list[Row], checkpoint: Checkpoint, path: Path) -> list[Row]:
    """The rows as a classifier takes them: `label` is called labels, and `text` (with `text_pair`) becomes ids.

    The tokenizer adds what it adds in training ([CLS], [SEP]), cuts at the model's context and pads with its own token.
    Other columns of rows of text are left out.

    Raises:
        InputError: no tokenizer lies beside the checkpoint, it cannot pad, or a label is none of the model's.
    """
    rows = [{("labels" if k == "label" and "labels" not in row else k): v for k, v in row.items()} for row in rows]
    if "text" not in rows[0] or "input_ids" in rows[0]:
        return rows
    labels = [_label(row.get("labels"), checkpoint, path) for row in rows]
    columns = _tokenised(rows, checkpoint, path)
    return [{"labels": label, **{k: c[i] for k, c in columns.items()}} for i, label in enumerate(labels)]


def _tokenised(rows: list[Row], checkpoint: Checkpoint, path: Path) -> dict[str, list[list[int]]]:
    texts = [[row[name] for row in rows] for name in ("text", "text_pair") if name in rows[0]]
    if not all(isinstance(text, str) for column in texts for text in column):
        raise InputError(f"column text of {path} holds more than text", hint='give {"text": "...", "label": 0} a line')
    tokenizer = load_tokenizer(checkpoint, path)
    most = min(n for n in (checkpoint.context, tokenizer.model_max_length) if n is not None)
    try:
        # Below 2**31 the tokenizers library takes it as a length; transformers says "none" with a larger one.
        found = tokenizer(*texts, truncation=most < 2**31, max_length=most if most < 2**31 else None, verbose=False)
        if len({len(ids) for ids in found["input_ids"]}) > 1:
            found = tokenizer.pad(found)
    except Exception as error:  # no token to pad with, most often
        reason = next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"the tokenizer in {checkpoint.tokenizer} cannot make rows of {path}: {reason}",
            hint="save it with a padding token, or give input_ids and labels",
        ) from error
    # Models that take types of tokens take 0 for them where there are none; others refuse the column.
    return {k: v for k, v in found.items() if k != "token_type_ids" or any(map(any, v))}


def _label(value: Any, checkpoint: Checkpoint, path: Path) -> int:
    """A class by its number, or by its name in config.json."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    known: Any = None
    if isinstance(value, str) and checkpoint.tokenizer is not None and (checkpoint.tokenizer / "config.json").is_file():
        config = read_json(checkpoint.tokenizer / "config.json")
        names = config.get("label2id") if isinstance(config, dict) else None
        known = names.get(value) if isinstance(names, dict) else None
    if not isinstance(known, int):
        raise InputError(
            f"a label of {path} is {value!r:.60}, no class of the model's",
            hint="give the class's number, or its name in label2id of config.json; one label a text",
        )
    return known
