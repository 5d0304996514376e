"""Readers on files that real trainers wrote, and shards in every form."""

from __future__ import annotations

import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny import run_of
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from curvcli.analysis.checkpoint import Options, analyze_checkpoint, open_for_analysis
from curvcli.analysis.config import find_config
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.base import Checkpoint
from curvcli.data.shards import read_shard
from curvcli.data.tasks import causal_loss
from curvcli.errors import CurvError, InputError, UsageError
from curvcli.models.blocks import find_blocks


def _gradients(checkpoint: Checkpoint, samples: Path) -> tuple[dict, dict]:
    model = checkpoint.model()
    shard = read_shard(samples / "data/shard.bin", checkpoint, tokens=8192, sequence_length=64)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(causal_loss(model, shard.windows), list(parameters.values()))
    assert checkpoint.optimizer is not None
    return dict(zip(parameters, gradients, strict=True)), dict(checkpoint.optimizer.view(model).state)


@pytest.mark.parametrize("name", ["calm/checkpoint-10", "hot/checkpoint-60", "calm/checkpoint-600", "nanogpt/ckpt.pt"])
def test_moments_belong_to_their_parameters(name: str, samples: Path) -> None:
    """sqrt(v) follows |g| entry by entry under the right map, and not under one with two layers swapped."""
    gradients, state = _gradients(open_checkpoint(samples / name), samples)
    assert set(state) == set(gradients)

    def fit(a: str, b: str) -> float:
        pair = torch.stack([gradients[a].abs().flatten(), state[b]["exp_avg_sq"].sqrt().flatten()])
        return float(torch.corrcoef(pair)[0, 1])

    layers = [n for n in gradients if (".0." in n) and gradients[n].dim() == 2]
    right = np.mean([fit(n, n) for n in layers])
    swapped = np.mean([fit(n, n.replace(".0.", ".1.")) for n in layers])
    assert right > 0.3
    assert right > swapped + 0.1


@pytest.mark.parametrize("counted", [-5, True, 2**60, "7"])
def test_nanogpts_count_is_a_count_or_not_known(counted: object, samples: Path, tmp_path: Path) -> None:
    document = torch.load(samples / "nanogpt/ckpt.pt", weights_only=True)
    del document["optimizer"]
    torch.save({**document, "iter_num": counted}, tmp_path / "ckpt.pt")
    assert open_checkpoint(tmp_path / "ckpt.pt").step is None


def test_nanogpt_is_the_same_function(samples: Path) -> None:
    """transformers' GPT-2 with the converted weights against nanoGPT's own model."""
    gpt = runpy.run_path(str(samples / "build.py"))["GPT"]
    document = torch.load(samples / "nanogpt/ckpt.pt", weights_only=True)
    theirs = gpt(256, 64, 4, 2, 32)
    theirs.load_state_dict(document["model"])
    ours = open_checkpoint(samples / "nanogpt").model()
    ids = torch.randint(256, (3, 64), generator=torch.Generator().manual_seed(0))
    assert float((theirs(ids) - ours(input_ids=ids).logits).abs().max()) < 1e-5
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == len(list(theirs.parameters()))
    assert not any(n.endswith("bias") for n in trained)


@pytest.mark.slow
def test_loss_is_what_the_trainer_logged(samples: Path) -> None:
    report = analyze_checkpoint(
        samples / "calm" / "checkpoint-10", Options(tokens=256, max_hvps=3, depths=False, mode="kept")
    )
    assert report.data.loss == pytest.approx(5.40, abs=0.2)
    assert report.optimizer.lr == pytest.approx(3e-4)
    assert report.optimizer.step == 10


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="10KB")
    return tmp_path / "model"


@pytest.mark.slow
def test_plain_sharded_directory_estimates_the_second_moment(llama: Path) -> None:
    assert (llama / "model.safetensors.index.json").exists()
    np.save(llama / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    options = Options(data=llama / "ids.npy", tokens=64, sequence_length=16, depths=False, mode="kept")
    report = analyze_checkpoint(llama, replace(options, max_hvps=3))
    assert report.checkpoint.format == "pretrained"
    assert report.optimizer.preconditioner == "estimated"
    assert (report.full.rho, report.verdict) == (None, "unresolved")
    codes = [f.code for f in report.findings]
    assert "no-threshold" in codes
    assert "estimated-preconditioner" in codes
    with_lr = analyze_checkpoint(llama, replace(options, lr=1e-3))
    assert with_lr.full.eigenvalue >= report.full.eigenvalue > 0  # of which three products are a lower bound
    assert with_lr.full.rho == pytest.approx(with_lr.full.eigenvalue / 38e3)
    # That rho's scale is the batch size's: it decides nothing.
    assert (with_lr.verdict, with_lr.findings[0].code) == ("unresolved", "unresolved-estimate")
    assert with_lr.generalisation.rho_high is None


def test_sgd_without_state(llama: Path) -> None:
    np.save(llama / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    options = Options(data=llama / "ids.npy", tokens=64, sequence_length=16, optimizer="sgd", lr=0.1, momentum=0.9)
    report = analyze_checkpoint(llama, replace(options, max_hvps=3, depths=False, mode="kept"))
    assert (report.optimizer.preconditioner, report.optimizer.threshold) == ("none", pytest.approx(38))


def test_bf16_weights_are_measured_in_float32(llama: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    model = open_checkpoint(tmp_path / "half").model()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


SHARDS = {
    "bin": lambda p, ids: ids.astype("<u2").tofile(p / "s.bin"),
    "npy": lambda p, ids: np.save(p / "s.npy", ids),
    "safetensors": lambda p, ids: save_file({"input_ids": ids.astype(np.int32)}, p / "s.safetensors"),
}


@pytest.mark.parametrize("form", SHARDS)
def test_stream_forms_give_the_same_windows(form: str, samples: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 256, 1000)
    SHARDS[form](tmp_path, ids)
    checkpoint = open_checkpoint(samples / "calm")
    shard = read_shard(tmp_path / f"s.{form}", checkpoint, tokens=330, sequence_length=32)
    assert shard.tokens == 320
    assert shard.windows.shape == (10, 33)
    assert torch.equal(shard.windows.flatten(), torch.from_numpy(ids[:330]))
    whole = read_shard(tmp_path / f"s.{form}", checkpoint, tokens=10**6, sequence_length=32)
    assert whole.tokens == 1000 // 33 * 32


def test_rows_stay_rows(samples: Path, tmp_path: Path) -> None:
    ids = np.arange(60).reshape(4, 15)
    np.save(tmp_path / "rows.npy", ids)
    checkpoint = open_checkpoint(samples / "calm")
    assert torch.equal(
        read_shard(tmp_path / "rows.npy", checkpoint, tokens=99, sequence_length=None).windows, torch.tensor(ids)
    )
    cut = read_shard(tmp_path / "rows.npy", checkpoint, tokens=99, sequence_length=6).windows
    assert torch.equal(cut[:2].flatten(), torch.arange(14))
    assert cut.shape == (8, 7)


def test_text_needs_and_uses_the_tokenizer(llama: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    text = tmp_path / "text.txt"
    text.write_text("the whale and the sea " * 200)
    checkpoint = open_checkpoint(llama)
    with pytest.raises(InputError, match="no tokenizer"):
        read_shard(text, checkpoint, tokens=64, sequence_length=8)
    words = Tokenizer(models.WordLevel({"the": 3, "whale": 4, "and": 5, "sea": 6, "[UNK]": 0}, unk_token="[UNK]"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(llama)
    shard = read_shard(text, open_checkpoint(llama), tokens=64, sequence_length=8)
    assert shard.windows[0].tolist() == [3, 4, 5, 3, 6, 3, 4, 5, 3]


def test_config_is_found_upward_and_flags_win(
    samples: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a configuration from elsewhere names nothing outside its own directory
    config, file = find_config(run)
    assert file is not None
    assert (config.tokens, config.data) == (256, (file.parent / "data/shard.bin",))
    (run.parent / "pyproject.toml").write_text('[tool.curv]\ntokens = 128\ndata = "shard.bin"\n')
    shutil.copy(tmp_path / "data" / "shard.bin", run.parent)
    assert find_config(run)[0].tokens == 128
    read = open_for_analysis(run, Options(tokens=192, sequence_length=32)).read
    assert (read.tokens, read.sequence_length) == (192, 32)


def test_one_batch_of_a_file_is_not_all_of_the_data(tmp_path: Path) -> None:
    """Nothing can be held out of one window: 64 tokens of the calm run once read as unstable."""
    report = analyze_checkpoint(run_of(tmp_path, 20), Options(tokens=16, depths=False, mode="kept"))
    assert report.generalisation.held_out is None
    assert report.verdict == "unresolved"
    assert report.findings[0].code == "unresolved-tokens"
    assert "nothing could be held out" in report.findings[0].message
    assert "no-held-out" not in [f.code for f in report.findings]


@pytest.mark.slow
def test_a_layer_that_never_moved_is_empty_not_safe(tmp_path: Path) -> None:
    run = run_of(tmp_path, 9) / "checkpoint-9"
    names = [n for n, _ in open_checkpoint(run).model().named_parameters()]
    document = torch.load(run / "optimizer.pt", weights_only=True)
    matrices, vectors = ([n for n in names if ("norm" in n) is norm] for norm in (False, True))
    for index, name in enumerate(matrices + vectors):
        if ".layers.1." in name:
            document["state"][index]["exp_avg_sq"].zero_()
            document["state"][index]["exp_avg"].zero_()
    torch.save(document, run / "optimizer.pt")
    report = analyze_checkpoint(run, Options(tokens=64, sequence_length=16, depths=False, mode="kept"))
    assert (report.layers[1].status, report.layers[1].eigenvalue) == ("empty", None)
    assert report.layers[0].status == "converged"
    assert "frozen-tensors" in [f.code for f in report.findings]


def test_no_data_names_the_remedy(samples: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(samples / "calm/checkpoint-10", tmp_path / "checkpoint-10")
    with pytest.raises(UsageError, match="--data"):
        analyze_checkpoint(tmp_path, Options())


@pytest.mark.slow
def test_lr_zero_falls_back_to_the_log(tmp_path: Path) -> None:
    run = run_of(tmp_path, 9) / "checkpoint-9"
    document = torch.load(run / "optimizer.pt", weights_only=True)
    for group in document["param_groups"]:
        group["lr"] = 0.0
    torch.save(document, run / "optimizer.pt")
    few = Options(tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    report = analyze_checkpoint(run, few)
    assert report.optimizer.lr_source == "log"
    assert report.optimizer.lr == pytest.approx(1e-3)
    assert "lr-from-log" in [f.code for f in report.findings]
    assert analyze_checkpoint(run, replace(few, lr=2e-3)).optimizer.lr_source == "option"


def test_blocks_are_found(samples: Path) -> None:
    blocks = find_blocks(open_checkpoint(samples / "calm").model())
    assert blocks is not None
    assert (blocks.prefix, len(blocks.modules)) == ("model.layers", 8)
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2), 3, enable_nested_tensor=False)
    found = find_blocks(torch.nn.Sequential(torch.nn.Embedding(4, 8), encoder))
    assert found is not None
    assert (found.prefix, len(found.modules)) == ("1.layers", 3)
    assert find_blocks(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))) is None


def test_every_error_is_one_line() -> None:
    assert str(CurvError("two\nlines", hint="do\nthis")) == "two lines; do this"
