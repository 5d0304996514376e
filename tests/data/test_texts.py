"""Classifiers measured on rows of text, tokenised by the tokenizer that transformers saved beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from real import analyzed, refusal
from refusals import one_line
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from curvcli.checkpoints import open_checkpoint
from curvcli.data.tasks import LOSSES, read_data
from curvcli.errors import InputError

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "whale", "is", "white", "ship", "sinks")
TEXTS = ["the whale is white", "the ship", "whale", "the white ship sinks is the whale the whale the whale"]
ROWS = [{"id": f"r{i}", "text": text, "label": i % 2} for i, text in enumerate(TEXTS * 4)]


def tokenizer(*, bare: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bare:
        return PreTrainedTokenizerFast(tokenizer_object=inner)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        model_input_names=names,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    torch.manual_seed(0)
    bert = BertConfig(  # type: ignore[call-arg]
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8, num_labels=2, label2id={"dull": 0, "wet": 1}, id2label={0: "dull", 1: "wet"},
    )  # fmt: skip
    gpt2 = GPT2Config(  # type: ignore[call-arg]
        vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=2, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    for name, model in {"bert": BertForSequenceClassification(bert), "gpt2": GPT2ForSequenceClassification(gpt2)}.items():
        model.save_pretrained(path / name)
        tokenizer().save_pretrained(path / name)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(checkpoint: Path, rows: list[dict[str, Any]], tmp_path: Path) -> Any:
    found = open_checkpoint(checkpoint)
    return read_data(write(tmp_path / "rows.jsonl", rows), found, found.task, tokens=100, sequence_length=None)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_loss_is_transformers_own_on_its_own_tokens(kind: str, root: Path, tmp_path: Path) -> None:
    """Cut at the context of 8, padded by the tokenizer; GPT-2 finds each row's last token by the padding."""
    examples = read(root / kind, ROWS, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(root / kind).eval()
    context = {"bert": 8, "gpt2": 32}[kind]
    inputs = AutoTokenizer.from_pretrained(root / kind)(
        TEXTS * 4, padding=True, truncation=True, max_length=context, return_tensors="pt", return_token_type_ids=False
    )
    assert set(examples.columns) == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(examples.columns["input_ids"], inputs["input_ids"])
    assert torch.equal(examples.columns["attention_mask"], inputs["attention_mask"])
    with torch.no_grad():
        own = model(**inputs, labels=examples.columns["labels"]).loss
        assert LOSSES["classification"](model, examples.columns).item() == pytest.approx(own.item(), rel=1e-6)


def test_pairs_have_types_and_labels_may_be_names(root: Path, tmp_path: Path) -> None:
    rows = [{"text": "the whale", "text_pair": "is white", "labels": name} for name in ("wet", "dull")]
    columns = read(root / "bert", rows, tmp_path).columns
    assert columns["labels"].tolist() == [1, 0]
    assert columns["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]] * 2


def test_ids_may_have_a_label_too(root: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 4, 2], "label": 1}, {"input_ids": [1, 2], "label": 0}]
    columns = read(root / "bert", rows, tmp_path).columns
    assert columns["labels"].tolist() == [1, 0]
    assert columns["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "whale", "label": "blue"}], "'blue', no class"),
        ([{"text": "whale", "label": True}], "True, no class"),
        ([{"text": "whale", "label": [1, 0]}], "no class"),
        ([{"text": "whale"}], "None, no class"),
        ([{"text": 3, "label": 1}], "more than text"),
        ([{"text": "whale", "label": 7}], "label 7 is none of the model's 2 classes"),
    ],
)
def test_rows_that_are_refused(rows: list[dict[str, Any]], said: str, root: Path, tmp_path: Path) -> None:
    assert said in one_line([str(root / "bert"), "--data", str(write(tmp_path / "rows.jsonl", rows))])


def test_no_tokenizer_and_one_that_cannot_pad(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root / "bert", tmp_path / "bert"))
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        read(copy, ROWS, tmp_path)
    tokenizer(bare=True).save_pretrained(copy)
    with pytest.raises(InputError, match="padding token"):
        read(copy, ROWS, tmp_path)


def test_code_beside_the_tokenizer_is_not_run(root: Path, tmp_path: Path) -> None:
    copy, trap = Path(shutil.copytree(root / "bert", tmp_path / "bert")), tmp_path / "executed"
    (copy / "own.py").write_text(f"open({str(trap)!r}, 'w')\n")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "own.Tokenizer"]}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        read(copy, ROWS, tmp_path)
    except InputError as error:
        assert "tokenizer" in str(error)  # noqa: PT017 - either is right, running it is not
    assert not trap.exists()


@pytest.mark.slow
def test_the_command(root: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    report = analyzed(root / "bert", rows)
    assert report["data"]["tokens"] == len(ROWS)
    copy = Path(shutil.copytree(root / "gpt2", tmp_path / "gpt2"))
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "save the tokenizer beside" in refusal("analyze", copy, "--data", rows, "--quiet")
