"""Old pytorch_model.bin in shards, and one file of weights given as the path itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import CHECKPOINTS, _llama
from real import analyzed, inspected, refusal
from refusals import Evil, one_line
from safetensors.torch import load_file, save_file
from tiny import build
from torch import nn
from transformers import AutoModelForCausalLM

from curvcli.checkpoints import open_checkpoint
from curvcli.errors import InputError
from curvcli.models.architecture import named

FEW = ("--tokens", "64", "--sequence-length", "16")
INDEX = "pytorch_model.bin.index.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    for name, place in {"pytorch_model.bin in shards": "shards", "transformers Trainer": "trainer"}.items():
        CHECKPOINTS[name](path / place)
    CHECKPOINTS["transformers, pytorch_model.bin"](path / "bin")
    np.save(path / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    return path


@pytest.fixture
def shards(root: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(root / "shards", tmp_path / "shards"))


def same(found: nn.Module, expected: nn.Module) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def moments(path: Path) -> None:
    """The second moments are those that were saved."""
    checkpoint = open_checkpoint(path)
    assert checkpoint.optimizer is not None
    model, optimizer = _llama()
    view = checkpoint.optimizer.view(checkpoint.model())
    for name, parameter in model.named_parameters():
        assert torch.equal(view.state[name]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])


def test_old_shards_are_what_transformers_loads(root: Path, tmp_path: Path) -> None:
    path = root / "shards"
    assert len(list(path.glob("pytorch_model-0000*-of-0000*.bin"))) > 2
    own = AutoModelForCausalLM.from_pretrained(path)
    same(open_checkpoint(path).model(), own)
    moments(path)
    # The Trainer saves a network of one's own without a config.json.
    copy = shutil.copytree(path, tmp_path / "checkpoint-3")
    (copy / "config.json").rename(tmp_path / "net.json")
    same(open_checkpoint(copy, named(str(tmp_path / "net.json"))).model(), own)
    with pytest.raises(InputError, match="--model"):
        open_checkpoint(copy)


def _outside(path: Path) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../other.bin"
    (path / INDEX).write_text(json.dumps(index))


def _unlisted(path: Path) -> None:
    shard = next(path.glob("*-00001-of-*.bin"))
    torch.save({"other": torch.ones(2)}, shard)


DAMAGE = {
    "missing": (lambda p: next(p.glob("*-00001-of-*.bin")).unlink(), "is named in pytorch_model.bin.index.json and missing"),
    "truncated": (lambda p: (f := next(p.glob("*-00001-of-*.bin"))).write_bytes(f.read_bytes()[:900]), "torch file"),
    "outside": (_outside, "leads outside its directory"),
    "another": (_unlisted, "and in no shard"),
    "no map": (lambda p: (p / INDEX).write_text("[]"), "has no weight_map"),
    "a list": (lambda p: torch.save([1], next(p.glob("*-00001-of-*.bin"))), "holds no weights by name"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_shards(case: str, shards: Path, root: Path) -> None:
    damage, said = DAMAGE[case]
    damage(shards)
    assert said in one_line([str(shards), "--data", str(root / "ids.npy")])


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_nothing_in_a_shard_is_executed(form: str, shards: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    shard = next(shards.glob("*-00001-of-*.bin"))
    torch.save({"a": Evil(trap)}, shard, _use_new_zipfile_serialization=form == "zip")
    assert "system" in one_line([str(shards)])
    assert not trap.exists()


@pytest.mark.parametrize("file", ["trainer/model.safetensors", "bin/pytorch_model.bin"])
def test_a_checkpoints_only_file_is_the_checkpoint(file: str, root: Path) -> None:
    """With its optimizer and log: nothing that lies beside it is left out in silence."""
    checkpoint = open_checkpoint(root / file)
    assert (checkpoint.path, checkpoint.format) == ((root / file).parent, "trainer")
    moments(root / file)


def test_one_safetensors_file(root: Path, tmp_path: Path) -> None:
    source = root / "trainer"
    own = AutoModelForCausalLM.from_pretrained(source)
    file = Path(shutil.copy(source / "model.safetensors", tmp_path / "soup_step-70.safetensors"))
    listed = open_checkpoint(file)
    assert (listed.format, listed.step, listed.optimizer, len(listed.tensors)) == ("safetensors", 70, None, 21)
    with pytest.raises(InputError, match="--model"):
        listed.model()
    same(open_checkpoint(file, named(str(source))).model(), own)
    shutil.copy(source / "config.json", tmp_path)
    same(open_checkpoint(file).model(), own)
    save_file({name: t for name, t in load_file(file).items() if "norm" not in name}, file)
    with pytest.raises(InputError, match="5 weights of the model are not stored"):
        open_checkpoint(file).model()
    save_file({name: t for name, t in own.state_dict().items() if name != "model.norm.weight"}, file)
    with pytest.raises(InputError, match="1 weight of the model is not stored"):
        open_checkpoint(file).model()


def test_one_of_two_forms_is_the_one_named(root: Path, tmp_path: Path) -> None:
    """Where model.safetensors lies beside, pytorch_model.bin is read because it was asked for."""
    shutil.copytree(root / "bin", tmp_path / "both")
    other = {name: t + 1 for name, t in load_file(root / "trainer" / "model.safetensors").items()}
    save_file(other, tmp_path / "both" / "model.safetensors", metadata={"format": "pt"})
    weights = dict(open_checkpoint(tmp_path / "both" / "pytorch_model.bin").model().named_parameters())
    assert torch.equal(weights["lm_head.weight"] + 1, other["lm_head.weight"])


def test_one_shard_is_refused(root: Path) -> None:
    shard = sorted((root / "shards").glob("*.bin"))[0]
    assert "give its directory" in one_line([str(shard)])


@pytest.mark.slow
def test_the_command(root: Path, tmp_path: Path) -> None:
    found = inspected(root / "shards")
    assert (found["format"], found["optimizer"]["parameters with state"]) == ("trainer", 21)
    assert analyzed(root / "shards", root / "ids.npy", *FEW)["optimizer"]["preconditioner"] == "checkpoint"
    assert (
        analyzed(root / "bin" / "pytorch_model.bin", root / "ids.npy", *FEW)["optimizer"]["preconditioner"] == "checkpoint"
    )
    file = shutil.copy(root / "trainer" / "model.safetensors", tmp_path / "a.safetensors")
    assert inspected(file)["parameters"] > 0
    assert "--model" in refusal("analyze", file, "--data", root / "ids.npy", "--quiet", *FEW)
    report = analyzed(file, root / "ids.npy", "--model", root / "trainer", *FEW)
    assert report["checkpoint"]["format"] == "safetensors"


def test_weights_under_another_name_are_pointed_to_and_read(tmp_path: Path) -> None:
    """torchtune's name of all there is; the optimizer's state is no weights."""
    model = build()
    model.save_pretrained(tmp_path)
    other = tmp_path / "ft-model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors").rename(other)
    torch.save({}, tmp_path / "optimizer.pt")
    with pytest.raises(InputError) as told:
        open_checkpoint(tmp_path)
    assert told.value.hint == f"give the file that has them by its own path ({other.name})"
    found = dict(open_checkpoint(other).model().named_parameters())
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())
