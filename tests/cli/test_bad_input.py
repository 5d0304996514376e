"""Whatever is wrong with the input: exit code 2, one line that names it and the remedy, nothing written."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import Evil, one_line, truncate
from safetensors.torch import load_file, save_file

FIRED = "fired.txt"


def _weight(run: Path, name: str, value: float) -> None:
    tensors = load_file(run / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})


def _state(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = torch.load(run / "optimizer.pt", weights_only=True)
    change(document)
    torch.save(document, run / "optimizer.pt")


def _config(run: Path, **changes: object) -> None:
    config = json.loads((run / "config.json").read_text())
    config.update(changes)
    (run / "config.json").write_text(json.dumps(config))


def _no_weights(run: Path) -> None:
    (run / "model.safetensors").unlink()


def _drop_tensor(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})


def _escape(run: Path) -> None:
    names = list(load_file(run / "model.safetensors"))
    (run / "model.safetensors").rename(run.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../model.safetensors")}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))


def _compress(run: Path) -> None:
    with zipfile.ZipFile(run / "optimizer.pt") as archive:
        contents = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(run / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def _swap(document: dict) -> None:
    document["state"][0], document["state"][2] = document["state"][2], document["state"][0]


def _factored(document: dict) -> None:
    """Adafactor's state, but that vectors, whose second moment is whole, have factors too."""
    for entry in document["state"].values():
        v = entry.pop("exp_avg_sq")
        entry.update({"exp_avg_sq_row": v.mean(-1), "exp_avg_sq_col": v.mean(0), "RMS": 1.0})


def _shard(run: Path) -> Path:
    return run.parents[1] / "data" / "shard.bin"


# What is done to a copy of a sample checkpoint, and what the one line must then say.
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated safetensors": (lambda r: truncate(r / "model.safetensors"), "model.safetensors cannot be read"),
    "truncated optimizer": (lambda r: truncate(r / "optimizer.pt"), "optimizer.pt"),
    "empty weights": (lambda r: (r / "model.safetensors").write_bytes(b""), "is empty"),
    "lfs pointer": (
        lambda r: (r / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "no weights": (_no_weights, "no weights"),
    "weights with a key that is no name": (
        lambda r: (_no_weights(r), torch.save({("a", 1): torch.ones(2), "b": torch.ones(2)}, r / "pytorch_model.bin")),
        "no weights by name",
    ),
    "missing tensor": (_drop_tensor, "model.layers.3.mlp.up_proj.weight"),
    "path out of the directory": (_escape, "outside its directory"),
    "compressed zip": (_compress, "compressed records"),
    "NaN weight": (
        lambda r: _weight(r, "model.layers.2.mlp.up_proj.weight", float("nan")),
        "model.layers.2.mlp.up_proj.weight",
    ),
    "inf weight": (lambda r: _weight(r, "lm_head.weight", float("inf")), "lm_head.weight"),
    "NaN moment": (
        lambda r: _state(r, lambda d: d["state"][1]["exp_avg_sq"].view(-1).__setitem__(0, float("nan"))),
        "holds NaN or inf",
    ),
    "negative moment": (lambda r: _state(r, lambda d: d["state"][1]["exp_avg_sq"].sub_(1)), "negative entries"),
    "all moments zero": (
        lambda r: _state(r, lambda d: [s[k].zero_() for s in d["state"].values() for k in ("exp_avg", "exp_avg_sq")]),
        "second moment of every weight is 0",
    ),
    "second moments zero": (
        lambda r: _state(r, lambda d: [s["exp_avg_sq"].zero_() for s in d["state"].values()]),
        "first moment that no gradients",
    ),
    "state of another order": (lambda r: _state(r, _swap), "does not fit the model"),
    "state of another model": (
        lambda r: _state(r, lambda d: d["param_groups"][0]["params"].pop()),
        "does not fit the model",
    ),
    "factors of vectors": (lambda r: _state(r, _factored), "is no factor of the parameter's"),
    "state with a key that is no name": (
        lambda r: _state(r, lambda d: d["state"][1].__setitem__(("exp", 1), 1.0)),
        "no torch optimizer state",
    ),
    "no optimizer document": (lambda r: torch.save({"lr": 1.0}, r / "optimizer.pt"), "no torch optimizer state"),
    "zero lr, no log": (
        lambda r: (
            [g.__setitem__("lr", 0.0) for d in [torch.load(r / "optimizer.pt")] for g in d["param_groups"]]
            and _state(r, lambda d: [g.__setitem__("lr", 0.0) for g in d["param_groups"]]),
            (r / "trainer_state.json").write_text("{}"),
        ),
        "--lr",
    ),
    "unknown architecture": (lambda r: _config(r, model_type="zorro", architectures=["Zorro"]), "zorro"),
    "no loss known": (lambda r: _config(r, architectures=["LlamaForQuestionAnswering"]), "no loss is known"),
    "class of another task": (lambda r: _config(r, architectures=["LlamaForSequenceClassification"]), "examples"),
    "code of its own": (
        lambda r: _config(r, model_type="zorro", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        "cannot build",
    ),
    "config is no JSON": (lambda r: (r / "config.json").write_text("{"), "config.json is not readable JSON"),
    "config of absurd depth": (lambda r: (r / "config.json").write_text("[" * 200_000), "config.json is not readable JSON"),
    "ids beyond the vocabulary": (lambda r: np.full(4096, 300, "<u2").tofile(_shard(r)), "token id 300"),
    "uint32 shard": (lambda r: np.arange(4096, dtype="<u4").tofile(_shard(r)), "uint32"),
    "short shard": (lambda r: np.arange(60, dtype="<u2").tofile(_shard(r)), "one sequence"),
    "odd shard": (lambda r: _shard(r).write_bytes(b"abc"), "uint16"),
    "missing shard": (lambda r: _shard(r).unlink(), "does not exist"),
    "unknown key in curv.toml": (lambda r: (r.parents[1] / "curv.toml").write_text("tokenz = 3"), "tokenz"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage(case: str, run: Path, tmp_path: Path) -> None:
    damage, said = CASES[case]
    damage(run)
    output, plot = tmp_path / "report.json", tmp_path / "plot.png"
    assert said in one_line([str(run), "-o", str(output), "--plot", str(plot)])
    assert not output.exists()
    assert not plot.exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("where", ["optimizer.pt", "pytorch_model.bin", "nanogpt"])
def test_a_pickle_that_would_run_code_is_not_run(protocol: str, where: str, run: Path, tmp_path: Path) -> None:
    fired = tmp_path / FIRED
    target = tmp_path / "nanogpt" / "ckpt.pt" if where == "nanogpt" else run / where
    if where == "pytorch_model.bin":
        _no_weights(run)
    document = {"model": Evil(fired), "state": Evil(fired)}
    if protocol == "plain":
        target.write_bytes(pickle.dumps(document))
    else:
        torch.save(document, target, _use_new_zipfile_serialization=protocol == "zip")
    line = one_line([str(target if where == "nanogpt" else run)])
    assert target.name in line
    assert not fired.exists()
    with contextlib.suppress(Exception):
        torch.load(target, weights_only=False)
    assert fired.exists() or protocol == "plain", "the sample is no live pickle"


def test_missing_and_empty(tmp_path: Path) -> None:
    assert "does not exist" in one_line([str(tmp_path / "nowhere")])
    assert "holds no checkpoint" in one_line([str(tmp_path)])
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x")
    assert "no known checkpoint format" in one_line([str(file)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "/nonexistent/report.json"], "cannot write"),
        (["-o", "."], "cannot write"),
        (["--plot", "picture.bmp"], ".png"),
        (["--betas", "0.9"], "--betas"),
        (["--optimizer", "sophia"], "unknown optimizer"),
        (["--optimizer", "asgd"], "unknown optimizer"),
        (["--sequence-length", "4096"], "context"),
        (["--tokens", "10"], "one sequence"),
        (["--device", "cuda:7"], "--device cpu"),
        (["--device", "abacus"], "--device cpu"),
        (["--tolerance", "0"], "tolerance"),
        (["--optimizer", "none", "--lr", "0.1"], "none"),
    ],
)
def test_bad_options(arguments: list[str], said: str, run: Path) -> None:
    assert said in one_line([str(run), *arguments])
