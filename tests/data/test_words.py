"""Token ids as text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from curvcli.checkpoints.base import Checkpoint
from curvcli.data import words


def _checkpoint(vocabulary: int | None, tokenizer: Path | None) -> Checkpoint:
    return Checkpoint(
        path=Path("c"), format="f", architecture="a", tensors=(), model=lambda: pytest.fail("no model is needed"),
        optimizer=None, step=None, vocabulary=vocabulary, context=None, tokenizer=tokenizer,
    )  # fmt: skip


def test_bytes_of_a_vocabulary_of_256() -> None:
    decode = words.words_of(_checkpoint(256, None))
    assert decode(list("naïve".encode())) == "naïve"
    assert decode([0xC3]) == "\ufffd", "half a letter"
    assert words.words_of(_checkpoint(257, None))([65]) is None
    assert words.words_of(_checkpoint(None, None))([65]) is None


def test_tokenizer_json_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of one's own code, named beside it, is not imported."""
    Tokenizer(WordLevel({"whale": 0, "ship": 1, "?": 2}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))  # noqa: S106
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    checkpoint = _checkpoint(3, tmp_path)
    decode = words.words_of(checkpoint)
    assert decode([1, 0]) == "ship whale"
    assert decode([-100, 1]) == "ship", "no prediction"
    assert decode([99]) is None
    monkeypatch.setattr(words, "_MOST", 10)
    assert words.words_of(checkpoint)([1]) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert words.words_of(replace(checkpoint))([1]) is None
