"""Rows are called tokens or positions by what they are used for: here every matrix has as many rows as the vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import models
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from curvcli.analysis.api import analyze
from curvcli.curvature.problem import Problem
from curvcli.data.tasks import causal_loss, labelled_loss
from curvcli.documents import Attribution
from curvcli.judge.findings import _shape
from curvcli.models.rows import lookups, row_kinds
from curvcli.render.html import report_page

SIZE = 16
Sizes = dict[str, Any]
IDS = torch.randint(SIZE, (4, SIZE), generator=torch.Generator().manual_seed(0))
NONE: Sizes = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def gpt2(kind: type[Any] = GPT2LMHeadModel, **options: Any) -> nn.Module:
    sizes: Sizes = {
        "vocab_size": SIZE,
        "n_positions": SIZE,
        "n_embd": SIZE,
        "n_layer": 1,
        "n_head": 2,
        "n_inner": SIZE,
    }
    torch.manual_seed(0)
    return kind(GPT2Config(**sizes, **NONE, **options)).eval()


def bert() -> nn.Module:
    sizes: Sizes = {
        "vocab_size": SIZE,
        "max_position_embeddings": SIZE,
        "hidden_size": SIZE,
        "intermediate_size": SIZE,
    }
    return BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, type_vocab_size=SIZE)).eval()


def t5() -> nn.Module:
    sizes: Sizes = {"vocab_size": SIZE, "d_model": SIZE, "d_ff": SIZE, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    sizes |= {"relative_attention_num_buckets": SIZE, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **NONE)).eval()


class Classifier(nn.Module):
    """As many classes as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))


class Windows(nn.Module):
    """A language model of one's own, its head not tied; positions are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(SIZE, SIZE), nn.Embedding(SIZE, SIZE)
        self.mix, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx) + self.places(torch.arange(idx.shape[1]))
        return self.head(torch.tanh(self.mix(x)))


BATCH = {"input_ids": IDS, "labels": IDS}
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, str]]] = {
    "gpt2": (gpt2, causal_loss, IDS, {"transformer.wte.weight": "tokens", "transformer.wpe.weight": "positions"}),
    "gpt2 untied": (
        lambda: gpt2(tie_word_embeddings=False),
        causal_loss,
        IDS,
        {"transformer.wte.weight": "tokens", "transformer.wpe.weight": "positions", "lm_head.weight": "tokens"},
    ),
    "gpt2 classes": (
        lambda: gpt2(GPT2ForSequenceClassification, num_labels=SIZE),
        labelled_loss,
        {"input_ids": IDS, "labels": IDS[:, 0]},
        {"transformer.wte.weight": "tokens", "transformer.wpe.weight": "positions"},
    ),
    "bert": (
        bert,
        labelled_loss,
        {**BATCH, "token_type_ids": IDS * 0 + 3},
        {
            "bert.embeddings.word_embeddings.weight": "tokens",
            "bert.embeddings.position_embeddings.weight": "positions",
        },
    ),
    "t5": (
        t5,
        labelled_loss,
        {**BATCH, "decoder_input_ids": IDS.flip(0)},
        {"shared.weight": "tokens"},
    ),
    "a classifier": (Classifier, labelled_loss, {"input_ids": IDS, "labels": IDS[:, 0]}, {"embed.weight": "tokens"}),
    "one's own": (
        Windows,
        causal_loss,
        IDS,
        {"tokens.weight": "tokens", "places.weight": "positions", "head.weight": "tokens"},
    ),
    "pairs": (models.Net, models.loss, models.data()[0], {"embed.weight": "tokens", "head.weight": "tokens"}),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_known_by_their_use(name: str) -> None:
    build, loss, batch, wanted = CASES[name]
    model = build()
    kinds = row_kinds(Problem.create(model, loss, [batch]))
    named = {n: kinds[id(p)] for n, p in model.named_parameters() if id(p) in kinds}
    assert named == wanted
    assert not any(m._forward_hooks for m in model.modules()), "nothing is left behind"


def test_the_report_says_which_rows_they_are() -> None:
    report = analyze(gpt2(), causal_loss, [IDS[:2], IDS[2:]], max_hvps=20, depths=False)
    rows = {mass.tensor: (mass.rows_of, mass.rows is not None) for mass in report.attribution}
    assert rows.pop("transformer.wte.weight") == ("tokens", True)
    assert rows.pop("transformer.wpe.weight") == ("positions", True)
    assert set(rows.values()) == {(None, False)}
    page = report_page(report)
    assert ">token " in page
    assert ">position " in page


@pytest.mark.parametrize(
    ("build", "tokens", "places"), [(gpt2, "transformer.wte", "transformer.wpe"), (Windows, "tokens", "places")]
)
def test_lookups_are_of_tokens(build: Callable[[], nn.Module], tokens: str, places: str) -> None:
    """A position is looked up once a batch at least, and is in every row of it: no rare row, few as its lookups are."""
    model, used = build(), IDS[:, :-1]  # the last token of a window is predicted only
    problem = Problem.create(model, causal_loss, [IDS[:2], IDS[2:]])
    _, found = lookups(problem)
    rows = Counter(used.flatten().tolist())
    rare = found.rare(problem.parameters[f"{tokens}.weight"], 4)
    assert rare is not None
    assert rare.tolist() == [rows[row] < 4 for row in range(SIZE)]
    assert rare.any()
    assert not rare.all()
    assert found.rare(problem.parameters[f"{places}.weight"], 4) is None


class Placed(nn.Module):
    """Positions are given, as of packed documents and of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(SIZE, SIZE), nn.Embedding(SIZE + 2, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, idx: Tensor, places: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(idx) + self.places(places)))


def placed(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["input_ids"], batch["position_ids"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


PLACES = {
    "packed": [[*range(7), *range(9)], [*range(4, 10), *range(10)]],
    "padded at the end": [list(range(2, 18)), [*range(2, 10), *[1] * 8]],
    "padded at the beginning": [[*[1] * 5, *range(11)], list(range(16))],
    "RoBERTa's, padded at the beginning": [[*[1] * 6, *range(2, 12)], [*[1] * 9, *range(2, 9)]],
}


@pytest.mark.parametrize("case", PLACES)
def test_positions_need_not_go_from_first_to_last(case: str) -> None:
    """A shard whose first batch shows it and whose second does not, and the other way round."""
    torch.manual_seed(0)
    model = Placed()
    straight = torch.arange(SIZE).expand(2, SIZE)
    batches = [
        {"input_ids": IDS[i : i + 2], "labels": IDS[i : i + 2], "position_ids": ids}
        for i, ids in ((0, torch.tensor(PLACES[case])), (2, straight))
    ]
    for shard in (batches, batches[::-1], batches[:1]):
        problem = Problem.create(model, placed, shard)
        _, found = lookups(problem)
        assert found.rare(model.places.weight, 10) is None
        assert found.rare(model.tokens.weight, 10) is not None
        assert row_kinds(problem)[id(model.places.weight)] == "positions"


@pytest.mark.parametrize("ids", [[[0, 0, 0, 1], [0, 0, 1, 1]], [[3, 4, 5, 7]], [[0, 1, 3, 2]], [[2, 2, 2, 2]]])
def test_other_numbers_are_rows_like_tokens(ids: list[list[int]]) -> None:
    model = Placed()
    rows = torch.tensor(ids)
    batch = {"input_ids": IDS[: len(rows), :4], "labels": IDS[: len(rows), :4], "position_ids": rows}
    _, found = lookups(Problem.create(model, placed, [batch]))
    rare = found.rare(model.places.weight, 1)
    assert rare is not None
    assert (~rare).nonzero().flatten().tolist() == rows.unique().tolist()


def test_a_position_is_no_rare_token() -> None:
    report = analyze(gpt2(), causal_loss, [IDS[:2], IDS[2:]], max_hvps=20, depths=False)
    cases: list[tuple[Literal["tokens", "positions"] | None, bool]] = [("tokens", True), ("positions", False), (None, False)]
    for kind, said in cases:
        mass = Attribution(tensor="w", mass=0.9, rows=[(3, 0.8)], rows_of=kind)
        codes = [finding.code for finding in _shape(report.full, report.parts, report.outside, [mass])]
        assert ("rare-tokens" in codes) == said


def test_a_network_of_convolutions_names_no_embedding() -> None:
    """transformers' ResNet and ConvNeXt raise where others name theirs: no row of theirs is a token."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes: Sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
    batch = {"pixel_values": torch.randn(2, 1, 8, 8), "labels": torch.tensor([0, 1])}
    assert row_kinds(Problem(model, labelled_loss, [batch], [2.0])) == {}
