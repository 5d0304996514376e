"""`curv analyze` on every task, by models that transformers saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import CASES, VOCABULARY
from safetensors.torch import save_file
from tasks import IDS, analyze, apart, converged, refused, saved, tokenizer

from curvcli.checkpoints import open_checkpoint
from curvcli.errors import UsageError
from curvcli.models.architecture import named


@pytest.mark.slow
def test_masked_lm(tmp_path: Path) -> None:
    model, data = saved(CASES["bert"](), tmp_path)
    arguments = (model, "--data", data, "--tokens", 120, "--sequence-length", 14, "--optimizer", "none")
    assert "which token is the mask" in refused(*arguments)
    tokenizer(model, 18)
    few = ("--max-hvps", 3, "--no-depths")
    report = analyze(*arguments, *few)
    assert report["data"]["tokens"] == 114  # 2 of 14 positions, in 57 windows of 15 tokens
    said = {f["code"]: f["message"] for f in report["findings"]}
    assert "114 of 798 positions" in said["masked-positions"]
    assert analyze(*arguments, "--seed", 1, *few)["data"]["loss"] != report["data"]["loss"]


@pytest.mark.slow
def test_seq2seq(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(1, VOCABULARY, (16, n), generator=draw) for n in (7, 5))
    labels[:8, 2:] = -100  # batches of unequal weight
    case = CASES["t5"]()
    model, data = saved(case, tmp_path, input_ids=ids, labels=labels)
    report = analyze(model, "--data", data, "--optimizer", "none")
    converged(report, 2)
    assert (report["data"]["tokens"], report["data"]["sequence_length"]) == (56, 7)
    with torch.no_grad():
        own = case.build()(input_ids=ids, labels=labels).loss.item()
    assert report["data"]["loss"] == pytest.approx(own, rel=1e-4)
    assert "other-stacks" in [f["code"] for f in report["findings"]]


@pytest.mark.slow
def test_a_decoder_without_a_start_token_needs_its_inputs(tmp_path: Path) -> None:
    model, data = saved(CASES["t5"](), tmp_path, input_ids=IDS, labels=IDS)
    config = json.loads((model / "config.json").read_text())
    del config["decoder_start_token_id"]
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").unlink(missing_ok=True)
    assert "no column decoder_input_ids" in refused(model, "--data", data)
    save_file(apart({"input_ids": IDS, "labels": IDS, "decoder_input_ids": IDS}), data)
    assert analyze(model, "--data", data, "--optimizer", "none", "--max-hvps", 3)["data"]["tokens"] == 12


def test_classification(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(16, 3, 8, 8, generator=draw), torch.arange(16) % 3
    model, data = saved(CASES["vit"](), tmp_path, pixel_values=pixels, labels=labels)
    report = analyze(model, "--data", data, "--optimizer", "none")
    converged(report, 2)
    assert (report["data"]["tokens"], report["data"]["sequence_length"]) == (16, None)
    save_file({"pixel_values": pixels, "labels": labels + 5}, data)
    assert "label 7 is none of the model's 3 classes" in refused(model, "--data", data)


@pytest.mark.slow
def test_experts(tmp_path: Path) -> None:
    model, data = saved(CASES["mixtral"](), tmp_path)
    built = open_checkpoint(model).model()
    assert (built.config._experts_implementation, built.config._attn_implementation) == ("eager", "eager")
    given = ("--data", data, "--tokens", 64, "--sequence-length", 8, "--optimizer", "none", "--mode", "forward")
    report = analyze(model, *given, "--max-hvps", 3, "--no-depths")
    assert report["full"]["eigenvalue"] > 0
    assert report["cost"]["mode"] == "forward"


def test_ids_of_examples_are_checked(tmp_path: Path) -> None:
    ids = torch.ones(8, 5, dtype=torch.int64)
    for name, columns, said in [
        ("input_ids", {"input_ids": ids * 40, "labels": ids}, "column input_ids"),
        ("labels", {"input_ids": ids, "labels": ids * 40}, "column labels"),
        ("decoder", {"input_ids": ids, "labels": ids, "decoder_input_ids": -ids}, "holds id -1"),
    ]:
        (tmp_path / name).mkdir()
        model, data = saved(CASES["t5"](), tmp_path / name, **columns)
        assert said in refused(model, "--data", data)
    case = CASES["bert"]()
    (tmp_path / "long").mkdir()
    model, data = saved(case, tmp_path / "long", input_ids=torch.ones(4, 17).long(), labels=torch.ones(4, 17).long())
    assert "context is 16" in refused(model, "--data", data)


def test_a_class_without_a_known_loss_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    BertForQuestionAnswering(BertConfig(**CASES["bert"]().options)).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.ones(500, dtype=np.int64))
    assert "no loss is known" in refused(tmp_path / "model", "--data", tmp_path / "ids.npy", "--sequence-length", 8)


def test_usage_of_a_sequence_length_with_examples(tmp_path: Path) -> None:
    model, data = saved(CASES["t5"](), tmp_path, input_ids=IDS, labels=IDS)
    assert "holds examples" in refused(model, "--data", data, "--sequence-length", 2)
    with pytest.raises(UsageError):
        named("no such thing")
