"""Rows padded at the end have the curvature that each has alone, without its padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CASES
from tasks import jsonl

from curvcli import analyze
from curvcli.data.examples import read_examples
from curvcli.data.tasks import causal_loss, predictions

LENGTHS = (8, 3, 5, 6)
PROMPT = 2  # ids at the beginning of a row that are not predicted


def rows(*, padded: bool) -> list[dict[str, Any]]:
    """Rows of unequal length with a prompt, alone or padded to the longest as a collator does."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in LENGTHS:
        ids = torch.randint(1, 19, (length,), generator=generator).tolist()
        fill = max(LENGTHS) - length if padded else 0
        found.append(
            {
                "input_ids": ids + [0] * fill,
                "attention_mask": [1] * length + [0] * fill,
                "labels": [-100] * PROMPT + ids[PROMPT:] + [-100] * fill,
            }
        )
    return found


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("llama", True),
        ("bloom", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", False), ("gpt2", True))),
    ],
    ids=lambda value: str(value),
)
def test_padding_has_no_curvature(tmp_path: Path, name: str, written: bool) -> None:
    model = CASES[name]().build()
    examples = read_examples(jsonl(tmp_path / "rows.jsonl", rows(padded=written)), predictions=1000, shifted=True)
    batches = examples.batches(2)
    assert [b["input_ids"].shape[1] for b in batches] == [8, 8]
    alone = [{key: torch.tensor([value]) for key, value in row.items()} for row in rows(padded=False)]
    options: dict[str, Any] = {"depths": False, "max_hvps": 6, "mode": "kept"}  # of the same start: the same Krylov space
    found, truth = (
        analyze(model, causal_loss, part, weights=[predictions(b, "causal-lm") for b in part], **options)
        for part in (batches, alone)
    )
    assert found.full.hvps == truth.full.hvps == 6
    assert found.data.tokens == truth.data.tokens == sum(LENGTHS) - PROMPT * len(LENGTHS)
    assert found.full.eigenvalue == pytest.approx(truth.full.eigenvalue, rel=1e-5)
    assert found.full.most_negative == pytest.approx(truth.full.most_negative, rel=1e-3)
    assert found.data.loss == pytest.approx(truth.data.loss, rel=1e-6)
    assert [e.eigenvalue for e in found.layers] == pytest.approx([e.eigenvalue for e in truth.layers], rel=1e-4)


def test_padding_at_the_left_predicts_nothing(tmp_path: Path) -> None:
    """Its last place attends to nothing: eager attention is uniform there, and its derivative is not that of any loss.

    By relative positions the rows are those that each is alone.
    """
    written = []
    for row in rows(padded=False):
        ids = row["input_ids"]
        fill = [0] * (max(LENGTHS) - len(ids))
        written.append({"input_ids": fill + ids, "attention_mask": fill + [1] * len(ids)})
    model = CASES["llama"]().build()
    batches = read_examples(jsonl(tmp_path / "rows.jsonl", written), predictions=1000, shifted=True).batches(2)
    alone = [{"input_ids": i, "labels": i} for row in rows(padded=False) for i in [torch.tensor([row["input_ids"]])]]
    options: dict[str, Any] = {"depths": False, "max_hvps": 6, "mode": "kept"}
    found, truth = (
        analyze(model, causal_loss, part, weights=[predictions(b, "causal-lm") for b in part], **options)
        for part in (batches, alone)
    )
    assert found.data.tokens == truth.data.tokens == sum(LENGTHS) - len(LENGTHS)
    assert found.data.loss == pytest.approx(truth.data.loss, rel=1e-6)
    assert found.full.eigenvalue == pytest.approx(truth.full.eigenvalue, rel=1e-5)
    # Labels of their own do not bring the prediction back.
    for row in written:
        row["labels"] = [i if seen else -100 for i, seen in zip(row["input_ids"], row["attention_mask"], strict=True)]
    again = read_examples(jsonl(tmp_path / "labels.jsonl", written), predictions=1000, shifted=True).batches(2)
    assert sum(predictions(b, "causal-lm") for b in again) == found.data.tokens
