"""Examples in named columns: both forms, padding, batches, and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import CASES, VOCABULARY
from safetensors.torch import save_file
from tasks import IDS, jsonl, raw, rows, save
from torch import Tensor

from curvcli.curvature.problem import Problem
from curvcli.data.examples import holds_examples, read_examples
from curvcli.data.tasks import labelled_loss, predictions
from curvcli.errors import InputError


def test_both_forms_give_the_same_examples(tmp_path: Path) -> None:
    ids, labels = torch.randint(19, (6, 5)), torch.randint(19, (6, 4))
    labels[2] = -100
    save_file({"input_ids": ids.int(), "labels": labels}, tmp_path / "e.safetensors")
    rows = [{"input_ids": i, "labels": j} for i, j in zip(ids.tolist(), labels.tolist(), strict=True)]
    one = read_examples(tmp_path / "e.safetensors", predictions=1000)
    two = read_examples(jsonl(tmp_path / "e.jsonl", rows), predictions=1000)
    kept = [0, 1, 3, 4, 5]  # the row without labels is left out
    assert torch.equal(one.columns["input_ids"], ids[kept])
    assert one.columns["input_ids"].dtype == torch.int64
    assert (one.sha256, one.tokens) == (two.sha256, 20)
    assert [len(b["labels"]) for b in one.batches(2)] == [2, 2, 1]
    assert read_examples(tmp_path / "e.jsonl", predictions=9).rows == 2
    assert read_examples(tmp_path / "e.jsonl", predictions=1).rows == 1
    assert read_examples(tmp_path / "e.jsonl", predictions=9).sha256 != one.sha256


def test_lists_of_unequal_length_are_padded_and_masked(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [1]}, {"input_ids": [8], "labels": [2, 3]}]
    examples = read_examples(jsonl(tmp_path / "e.jsonl", rows), predictions=100)
    assert examples.columns["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert examples.columns["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert examples.columns["labels"].tolist() == [[1, -100], [2, 3]]
    assert examples.tokens == 3


def test_padding_does_not_change_the_loss(tmp_path: Path) -> None:
    case = CASES["t5"]()
    model = case.build()
    rows = [{"input_ids": [5, 6, 7], "labels": [1]}, {"input_ids": [8], "labels": [2, 3]}]
    both = read_examples(jsonl(tmp_path / "e.jsonl", rows), predictions=100).columns
    shift = model.prepare_decoder_input_ids_from_labels

    def loss(columns: dict[str, Tensor]) -> float:
        return labelled_loss(model, {**columns, "decoder_input_ids": shift(labels=columns["labels"])}).item()

    alone = [{name: torch.tensor([values]) for name, values in row.items()} for row in rows]
    assert loss(dict(both)) == pytest.approx((loss(alone[0]) + 2 * loss(alone[1])) / 3, rel=1e-5)


def test_batches_count_by_their_labels(tmp_path: Path) -> None:
    """One label in the first row and four in the second: the mean over batches is the mean over labels."""
    case = CASES["bert"]()
    ids = torch.randint(1, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 1:] = -100
    examples = read_examples(save(input_ids=ids, labels=labels)(tmp_path), predictions=100)
    batches = examples.batches(1)
    problem = Problem.create(case.build(), labelled_loss, batches, [predictions(b, "masked-lm") for b in batches])
    assert problem.mean_loss() == pytest.approx(labelled_loss(problem.model, examples.columns).item(), rel=1e-6)


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unequal rows": (save(input_ids=IDS, labels=IDS[:3]), "unequal length"),
    "no labels": (save(input_ids=IDS, labels=IDS * 0 - 100), "no label other than -100"),
    "float labels": (save(input_ids=IDS, labels=torch.ones(4)), "--loss package.module:function"),
    "float ids": (save(input_ids=IDS.float(), labels=IDS), "floats, not ids"),
    "NaN": (save(pixel_values=torch.full((4, 2), float("nan")), labels=IDS[:, 0]), "NaN"),
    "mask of four dimensions": (save(input_ids=IDS, attention_mask=IDS[:, None, None], labels=IDS), "attention_mask"),
    "scalar": (save(input_ids=IDS, labels=torch.tensor(1)), "no rows in labels"),
    "empty column": (save(input_ids=IDS[:0], labels=IDS[:0]), "no rows"),
    "rows without an id": (rows({"input_ids": [], "labels": 1}, {"input_ids": [], "labels": 0}), "empty in every row"),
    "text": (rows({"input_ids": "the whale", "labels": 1}), "tokenised for classifiers alone"),
    "column missing in a row": (rows({"input_ids": [1], "labels": 1}, {"input_ids": [1]}), "row 2"),
    "ragged pixels": (rows(*({"pixel_values": [[0.1] * n], "labels": 1} for n in (2, 3))), "unequal shapes"),
    "huge integer": (rows({"input_ids": [2**70], "labels": 1}), "holds no numbers"),
    "no JSON": (raw(b"{'a': 1}\n"), "line 1"),
    "no object": (raw(b"[1, 2]\n"), "no object"),
    "complex": (save(pixel_values=torch.ones(4, 2) * 1j, labels=IDS[:, 0]), "is complex"),
    "a line without end": (raw(b" " * 2**26 + b"1"), "longer than 64 MiB"),
    "no text at all": (raw(b"\xff\xfe\n"), "line 1"),
    "depth": (raw(b"[" * 200_000), "line 1"),
    "empty": (raw(b""), "no examples"),
    "truncated": (lambda p: (p / "e.safetensors").write_bytes(b"\x10\0\0") and p / "e.safetensors", "cannot be read"),  # type: ignore[dict-item, return-value]
    "not named columns": (lambda p: (p / "e.bin").write_bytes(b"ab") and p / "e.bin", "named columns"),  # type: ignore[dict-item, return-value]
    "missing": (lambda p: p / "nowhere.jsonl", "no file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_examples(case: str, tmp_path: Path) -> None:
    write, said = BAD[case]
    with pytest.raises(InputError, match=said) as caught:
        read_examples(write(tmp_path), predictions=100)
    assert ";" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_are_told_from_examples(tmp_path: Path) -> None:
    assert not holds_examples(save(input_ids=IDS)(tmp_path))
    assert holds_examples(save(input_ids=IDS, labels=IDS)(tmp_path))
    assert not holds_examples(rows({"text": "whale"})(tmp_path))
    assert holds_examples(rows({"pixel_values": [1.0], "labels": 2})(tmp_path))
