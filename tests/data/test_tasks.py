"""Losses by task against the models' own, forms of output, masking."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES
from tasks import tokenizer
from torch import Tensor, nn

from curvcli.data.examples import Examples
from curvcli.data.shards import Shard
from curvcli.data.tasks import LOSSES, causal_loss, labelled_loss, mask_token, masked, predictions, unigram_loss
from curvcli.data.tokens import Source, load_tokenizer
from curvcli.errors import CurvError, InputError


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_loss_is_the_models_own_where_that_is_a_plain_mean(name: str) -> None:
    case = CASES[name]()
    model, batch = case.build(), case.batch()
    columns = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch
    with torch.no_grad():
        assert LOSSES[case.task](model, batch).item() == pytest.approx(model(**columns).loss.item(), rel=1e-5)


def test_labels_of_a_causal_model_are_shifted_and_ignored() -> None:
    case = CASES["llama"]()
    model, window = case.build(), case.batch()
    labels = window.clone()
    labels[:, :4] = -100  # a prompt
    columns = {"input_ids": window, "attention_mask": torch.ones_like(window), "labels": labels}
    with torch.no_grad():
        assert causal_loss(model, {**columns, "labels": window}).item() == pytest.approx(causal_loss(model, window).item())
        own = model(**columns).loss.item()
        assert causal_loss(model, columns).item() == pytest.approx(own, rel=1e-5)
    assert predictions(columns, "causal-lm") == 3 * 4
    assert predictions({**columns, "labels": window}, "causal-lm") == 3 * 7
    assert predictions(window, "causal-lm") == 3 * 7


@pytest.mark.parametrize(
    "form",
    [lambda x: x, lambda x: {"logits": x}, lambda x: (x, None), lambda x: type("Output", (), {"logits": x})()],
    ids=["tensor", "mapping", "tuple", "output"],
)
def test_forms_of_output(form: Callable[[Tensor], Any]) -> None:
    class Net(nn.Module):
        def forward(self, anything: Tensor) -> Any:
            return form(nn.functional.one_hot(anything, 5).float())

    window = torch.tensor([[0, 1, 1]])
    expected = nn.functional.cross_entropy(torch.eye(5)[:2], torch.tensor([1, 1]))
    assert causal_loss(Net(), window).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("output", "labels", "said"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.int64), "do not go with labels"),
        (torch.zeros(2, 3, 5), torch.tensor([[0, 1, 5], [0, 0, 0]]), "label 5 is none of the model's 5 classes"),
        (torch.zeros(2, 3, 5), torch.tensor([[0, 1, -1], [0, 0, 0]]), "label -1 is none"),
        ("text", torch.zeros(2, 3, dtype=torch.int64), "returned a str, not logits"),
        # Its cross-entropy is 0 whatever the weights are, which looked like a kernel without second derivative.
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), "one output, which transformers trains as a regression"),
    ],
)
def test_what_is_no_loss_is_said(output: Any, labels: Tensor, said: str) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output

    with pytest.raises(CurvError, match=said):
        labelled_loss(Net(), {"x": torch.zeros(2, 3), "labels": labels})


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification", "single_label_classification", None])
def test_classes_are_not_taken_for_another_problem(kind: str | None) -> None:
    class Net(nn.Module):
        config = SimpleNamespace(problem_type=kind)

        def forward(self, x: Tensor) -> Tensor:
            return x

    batch = {"x": torch.zeros(2, 3), "labels": torch.tensor([0, 2])}
    if kind in ("single_label_classification", None):
        assert labelled_loss(Net(), batch).item() == pytest.approx(np.log(3))
        return
    with pytest.raises(CurvError, match=f"problem_type {kind}.*--loss package.module:function"):
        labelled_loss(Net(), batch)


def test_entropy_of_the_targets() -> None:
    """Closed forms: three targets of four of one kind and one of another; all of them alike; none at all."""
    ids = torch.tensor([[9, 1, 1], [9, 1, 2]])
    shard = Shard(ids, (Source(Path("s"), "tokens", None, lambda n: ids.numpy()),), "first", np.arange(2))
    quarter = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert unigram_loss(shard, "causal-lm") == pytest.approx(quarter)
    labels = torch.tensor([[7, 1, 1], [7, 1, 2]])
    examples = Examples(Path("e"), {"input_ids": ids, "labels": labels}, 4, "")
    assert unigram_loss(examples, "causal-lm") == pytest.approx(quarter)
    masks = torch.tensor([[-100, 1, 1], [-100, 1, 2]])
    assert unigram_loss(Examples(Path("e"), {"labels": masks}, 4, ""), "masked-lm") == pytest.approx(quarter)
    for labels, found in ((torch.full((2, 3), 5), 0.0), (torch.full((2, 3), -100), None)):
        assert unigram_loss(Examples(Path("e"), {"labels": labels}, 4, ""), "masked-lm") == found
    assert unigram_loss(examples, "classification") is None
    assert unigram_loss(Examples(Path("e"), {"input_ids": ids}, 4, ""), "causal-lm") is None


def test_a_model_of_frequencies_has_that_loss() -> None:
    """The oracle is the loss itself, of a network that gives every position the logarithms of the counts."""

    class Net(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return logits.expand(*ids.shape, -1)

    windows = torch.randint(11, (20, 9), generator=torch.Generator().manual_seed(0)) ** 2 % 11
    logits = torch.bincount(windows[:, 1:].flatten(), minlength=11).log()
    shard = Shard(windows, (Source(Path("s"), "tokens", None, lambda n: windows.numpy()),), "first", np.arange(20))
    assert unigram_loss(shard, "causal-lm") == pytest.approx(causal_loss(Net(), windows).item(), rel=1e-5)


def test_masking() -> None:
    ids = torch.randint(19, (40, 21), generator=torch.Generator().manual_seed(0))
    shard = Shard(ids, (Source(Path("s"), "tokens", None, lambda n: ids.numpy()),), "first", np.arange(len(ids)))
    first, again, other = (masked(shard, 18, seed) for seed in (0, 0, 1))
    chosen = first.columns["labels"] != -100
    assert (chosen.sum(1) == 3).all()  # 15 % of 20
    assert first.tokens == 120
    assert torch.equal(first.columns["labels"][chosen], ids[:, :-1][chosen])
    assert (first.columns["input_ids"][chosen] == 18).all()
    assert torch.equal(first.columns["input_ids"][~chosen], ids[:, :-1][~chosen])
    assert torch.equal(first.columns["labels"], again.columns["labels"])
    assert not torch.equal(first.columns["labels"], other.columns["labels"])
    assert first.sha256 == shard.sha256


def test_a_tokenizer_that_cannot_be_built_is_told_of_in_one_way(tmp_path: Path) -> None:
    checkpoint: Any = SimpleNamespace(path=tmp_path, tokenizer=tmp_path, vocabulary=32)
    tokenizer(tmp_path, 3)
    assert mask_token(nn.Identity(), checkpoint) == 3
    assert load_tokenizer(checkpoint, tmp_path / "text.txt").mask_token_id == 3
    (tmp_path / "tokenizer.json").write_text("[1,\n2]")
    said = f"transformers cannot build the tokenizer in {re.escape(str(tmp_path))}: .*; give {{}} instead$"
    with pytest.raises(InputError, match=said.format("examples with masked input_ids and labels .*")):
        mask_token(nn.Identity(), checkpoint)
    with pytest.raises(InputError, match=said.format(r"tokens \(\.bin, .*")):
        load_tokenizer(checkpoint, tmp_path / "text.txt")
