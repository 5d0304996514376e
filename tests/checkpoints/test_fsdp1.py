"""FSDP1 (FullyShardedDataParallel), from files that torch, accelerate and the Trainer wrote in the test (fsdp1_runs.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsdp1_runs import write, write_trainer
from ranks import launch
from real import analyzed, inspected
from tiny import STEPS, build, config
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import LlamaForCausalLM

from curvcli.checkpoints import open_checkpoint
from curvcli.errors import InputError
from curvcli.models.base import Architecture

pytest.importorskip("accelerate", reason="writes the checkpoints")
pytestmark = pytest.mark.slow  # two processes that import torch and transformers
FEW = ("--tokens", "256", "--sequence-length", "16")
NET = Architecture("Llama", build, vocabulary=64)
LAYOUTS = ("dcp-SHARDED_STATE_DICT", "dcp-FULL_STATE_DICT", "SHARDED_STATE_DICT", "FULL_STATE_DICT")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fsdp1")
    launch(write, path)
    config().save_pretrained(path / "net")
    np.save(path / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    return path


def is_the_state(path: Path, weights: dict[str, Any], state: dict[str, Any]) -> None:
    """Weights, moments, steps and groups are those, bit by bit; groups are named."""
    checkpoint = open_checkpoint(path, NET)
    model = checkpoint.model()
    own = model.state_dict()
    assert set(own) == set(weights)
    for name, value in weights.items():
        assert torch.equal(own[name], value), name
    assert checkpoint.optimizer is not None
    view = checkpoint.optimizer.view(model)
    assert set(view.state) == set(state["state"])
    for name, entry in state["state"].items():
        assert {"exp_avg", "exp_avg_sq", "step"} <= set(entry)
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(view.state[name][key]), torch.as_tensor(value)), (name, key)
    decay = {name: group.number("weight_decay") for group in view.groups for name in group.names}
    assert decay == {name: g["weight_decay"] for g in state["param_groups"] for name in g["params"]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["names", "flat"])
def test_files_are_the_running_state(form: str, layout: str, runs: Path) -> None:
    """Flat parameters too: what is saved has each parameter's own name and shape."""
    live = torch.load(runs / form / "live.pt", weights_only=True)
    assert len(live["optim"]["param_groups"]) == (2 if form == "names" else 1)
    is_the_state(runs / form / layout, live["model"], live["optim"])
    if layout != "FULL_STATE_DICT":
        assert open_checkpoint(runs / form / layout, NET).step == STEPS


@pytest.mark.parametrize("form", ["names", "flat"])
def test_files_are_what_torch_loads(form: str, runs: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(runs / form / "dcp-SHARDED_STATE_DICT" / "step-3", tmp_path / "own.pt")
    loaded = torch.load(tmp_path / "own.pt", weights_only=True)
    is_the_state(runs / form / "dcp-SHARDED_STATE_DICT", loaded["model"], loaded["optim"])


def test_local_pieces_are_refused_with_the_remedy(runs: Path) -> None:
    with pytest.raises(InputError, match="FULL_STATE_DICT"):
        open_checkpoint(runs / "flat" / "LOCAL_STATE_DICT")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command(layout: str, runs: Path) -> None:
    path = runs / "flat" / layout
    assert inspected(path)["optimizer"]["parameters with state"] == 21
    report = analyzed(path, runs / "ids.npy", "--model", runs / "net", *FEW)
    assert report["optimizer"]["preconditioner"] == "checkpoint"


def test_trainer(tmp_path: Path) -> None:
    launch(write_trainer, tmp_path)
    full = tmp_path / "FULL_STATE_DICT" / "checkpoint-4"
    weights = LlamaForCausalLM.from_pretrained(full).state_dict()
    state = torch.load(full / "optimizer.bin", weights_only=True)
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        is_the_state(tmp_path / kind, weights, state)
        checkpoint = open_checkpoint(tmp_path / kind, NET)
        assert (checkpoint.step, checkpoint.last_lr) == (4, pytest.approx(1e-2 / 3))
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    report = analyzed(tmp_path / "FULL_STATE_DICT", tmp_path / "ids.npy", *FEW)
    assert (report["checkpoint"]["format"], report["checkpoint"]["step"]) == ("fsdp-full", 4)
    found = inspected(tmp_path / "SHARDED_STATE_DICT")
    assert (found["format"], found["step"]) == ("fsdp-sharded", 4)
