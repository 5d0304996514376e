"""Saved models of every task, examples for them, and what the command measures of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import VOCABULARY, Case
from real import curv
from refusals import one_line
from safetensors.torch import save_file
from torch import Tensor


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def apart(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory."""
    return {name: column.clone().contiguous() for name, column in columns.items()}


def save(**columns: Tensor) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file(apart(columns), folder / "e.safetensors")
        return folder / "e.safetensors"

    return write


def rows(*rows: Any) -> Callable[[Path], Path]:
    return lambda folder: jsonl(folder / "e.jsonl", list(rows))


def raw(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "e.jsonl").write_bytes(content)
        return folder / "e.jsonl"

    return write


IDS = torch.ones(4, 3, dtype=torch.int64)


def saved(case: Case, folder: Path, **columns: Tensor) -> tuple[Path, Path]:
    """A save_pretrained directory, and examples or a stream of tokens beside it."""
    case.build().save_pretrained(folder / "model")
    if columns:
        save_file(apart(columns), folder / "data.safetensors")
        return folder / "model", folder / "data.safetensors"
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(1, VOCABULARY, 2000))
    return folder / "model", folder / "ids.npy"


def tokenizer(model: Path, mask: int) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)} | {"[MASK]": mask}
    words = {k: v for k, v in words.items() if v != mask or k == "[MASK]"}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106
    PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]").save_pretrained(model)  # noqa: S106


def analyze(*arguments: object) -> dict[str, Any]:
    """The report that `curv analyze` writes."""
    done = curv("analyze", "--quiet", "--format", "json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def refused(*arguments: object) -> str:
    """Its one line of an error."""
    return one_line([str(argument) for argument in arguments])


def converged(report: dict[str, Any], layers: int) -> None:
    assert report["full"]["status"] == "converged"
    assert [e["status"] for e in report["layers"]] == ["converged"] * layers
    for curve in report["cumulative"].values():
        assert [e["status"] for e in curve] == ["converged"] * (layers + 1)
