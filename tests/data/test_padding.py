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
