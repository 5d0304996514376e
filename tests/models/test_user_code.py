"""Networks and losses of the user's own, by the command, and what is wrong with them in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import CASES, VOCABULARY
from real import curv
from safetensors.torch import save_file
from tasks import analyze, converged, refused, saved

from curvcli.models.architecture import named

OWN = '''
import torch
from torch import nn

class Net(nn.Module):
    """Takes ids by a name of its own and returns a tensor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(19, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 19)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)

def tiny():
    return Net().half()

def broken():
    raise ValueError("no such\\nsize")

def text():
    return "a network"

class Raising(Net):
    def forward(self, tokens):
        raise KeyError("width")

def small():
    net = Net()
    net.head = nn.Linear(8, 12)
    return net

def double_loss(model, batch):
    return 2 * nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

def no_loss(model, batch):
    return 3.0

def rowwise(model, batch):
    return model(batch[:, :-1]).mean(dim=(1, 2))

def failing(model, batch):
    return batch["labels"]

constant = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the user's own module, weights of its network, and tokens."""
    (tmp_path / "mynets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    model = named("mynets:tiny").build()
    save_file(model.state_dict(), tmp_path / "weights/model.safetensors")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(1, VOCABULARY, 2000))
    sys.modules.pop("mynets")
    return tmp_path


FEW = ("--max-hvps", "3", "--no-depths")
DATA = ("--data", "ids.npy", "--tokens", 64, "--sequence-length", 8, "--optimizer", "none")


@pytest.mark.slow
def test_a_factory_of_ones_own(own: Path) -> None:
    assert "--model" in refused("weights", *DATA)
    assert "mynets" not in sys.modules
    report = analyze("weights", *DATA, "--model", "mynets:tiny")
    converged(report, 2)
    double = analyze("weights", *DATA, "--model", "mynets:tiny", "--loss", "mynets:double_loss")
    assert double["full"]["eigenvalue"] == pytest.approx(2 * report["full"]["eigenvalue"], rel=1e-2)
    assert double["data"]["loss"] == pytest.approx(2 * report["data"]["loss"], rel=1e-5)


def test_inspect_names_the_task_and_builds_nothing(own: Path) -> None:
    done = curv("inspect", "weights", "--json", "--model", "mynets:broken")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["architecture"], facts["task"], facts["tensors"]) == ("mynets:broken", "causal-lm", 11)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "mynets"], "neither a directory with a config.json nor package.module:factory"),
        (["--model", "mynets:"], "package.module:name"),
        (["--model", "nowhere.nets:tiny"], "no module nowhere"),
        (["--model", "mynets:absent"], "has no absent"),
        (["--model", "mynets:constant"], "is a int"),
        (["--model", "mynets:broken"], "ValueError: no such size"),
        (["--model", "mynets:text"], "gave a str"),
        (["--model", "mynets:Raising"], "the forward pass of mynets:Raising failed: KeyError: 'width'"),
        (["--model", "mynets:small"], "head.weight has shape (19, 8)"),
        (["--model", "mynets:nn.Identity"], "none of the model's"),
        (["--model", "mynets:tiny", "--loss", "mynets:no_loss"], "returned a float"),
        (["--model", "mynets:tiny", "--loss", "mynets:rowwise"], "return the mean loss"),
        (["--model", "mynets:tiny", "--loss", "mynets:failing"], "--loss mynets:failing failed: IndexError"),
        (["--model", "mynets:tiny", "--loss", "hinge"], "unknown loss"),
        (["--model", "mynets:tiny", "--loss", "masked-lm"], "mask"),
        (["--model", "mynets:tiny", "--loss", "classification"], "named columns"),
    ],
)
def test_what_is_wrong_with_ones_own_code_is_one_line(arguments: list[str], said: str, own: Path) -> None:
    assert said in refused("weights", *DATA, *arguments)


def test_ids_beyond_a_factorys_embedding(own: Path) -> None:
    np.save("ids.npy", np.full(500, VOCABULARY))
    assert f"id {VOCABULARY}, the model's vocabulary has {VOCABULARY}" in refused("weights", *DATA, "--model", "mynets:tiny")


def test_a_module_that_fails_itself_is_blamed(own: Path) -> None:
    (own / "mynets2.py").write_text("import absent_dependency\n")
    assert "ModuleNotFoundError: No module named 'absent_dependency'" in refused("weights", *DATA, "--model", "mynets2:tiny")


@pytest.mark.slow
def test_modules_of_the_working_directory(own: Path) -> None:
    """In a process of its own, whose path does not begin with the working directory, as that of `curv` does not."""

    words = ["analyze", "weights", "-q", *map(str, DATA), *FEW, "--model", "mynets:tiny"]
    command = [sys.executable, "-P", "-c", "from curvcli.cli import main; main()", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_traceback_on_request(own: Path) -> None:
    done = curv("analyze", "weights", "-q", *DATA, *FEW, "--model", "mynets:broken", CURV_TRACEBACK="1")
    assert 'raise ValueError("no such' in done.stderr


@pytest.mark.slow
def test_a_configuration_for_weights_without_one(tmp_path: Path) -> None:
    model, data = saved(CASES["mixtral"](), tmp_path)
    arguments = ("--data", data, "--tokens", 64, "--sequence-length", 8, "--optimizer", "none", "--mode", "kept", *FEW)
    report = analyze(model, *arguments)
    (model / "config.json").rename(tmp_path / "config_of_mine.json")
    again = analyze(model, *arguments, "--model", tmp_path / "config_of_mine.json")
    assert again["full"]["eigenvalue"] == report["full"]["eigenvalue"]
    CASES["mixtral"]().build(num_hidden_layers=1).config.save_pretrained(tmp_path / "shallow")
    assert "none of the model's" in refused(model, *arguments, "--model", tmp_path / "shallow")
    CASES["mixtral"]().build(num_hidden_layers=3).config.save_pretrained(tmp_path / "deep")
    assert "missing" in refused(model, *arguments, "--model", tmp_path / "deep")
