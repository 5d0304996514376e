"""A run in torchtitan's layout, as examples/torchtitan saves it: a fused matrix, the job's config.json, a folder between."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from places import ROOT
from torch import nn

from curvcli.analysis.doctor import examine
from curvcli.checkpoints import find_checkpoints, open_checkpoint
from curvcli.checkpoints.base import UNNAMED
from curvcli.errors import InputError
from curvcli.models.architecture import fill
from curvcli.models.base import Architecture


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """examples/torchtitan/train.py, and its network as `nets`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "torchtitan"))
        for name in ("nets", "train"):
            patch.delitem(sys.modules, name, raising=False)
        return importlib.import_module("train")


@pytest.fixture(scope="module")
def run(job: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("outputs")
    (path / "config.json").write_text(json.dumps({"training": {"seq_len": 64}}))
    model = job.llama()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for step in (1, 2):
        job.loss_of(model, torch.arange(34).view(2, 17)).backward()
        optimizer.step()
        scheduler.step()
        job.save(path / "checkpoint", model, optimizer, scheduler, step)
    return SimpleNamespace(path=path, model=model, optimizer=optimizer)


def test_weights_and_moments_of_a_matrix_stored_in_parts(job: ModuleType, run: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(run.path, Architecture("nets:llama", job.llama))
    assert (checkpoint.path.name, checkpoint.step) == ("step-2", 2)
    assert "layers.0.attention.qkv_linear.wq.weight" in {t.name for t in checkpoint.tensors}
    found = checkpoint.model()
    view = checkpoint.optimizer.view(found)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(view.state[name][key], run.optimizer.state[parameter][key]), (name, key)


def test_the_jobs_configuration_is_no_network(run: SimpleNamespace) -> None:
    assert [path.name for path in find_checkpoints(run.path)] == ["step-1", "step-2"]
    assert open_checkpoint(run.path).architecture == UNNAMED
    done = examine(run.path)
    (network,) = [check for check in done.checkpoint if check.what == "network"]
    assert (network.status, done.able) == ("error", False)
    assert all("--model package.module:factory" in c for c in done.commands if c.startswith("curv analyze"))


def test_a_save_that_did_not_finish_in_the_folder_between(run: SimpleNamespace) -> None:
    (run.path / "checkpoint" / "step-3").mkdir()
    try:
        assert [f.code for f in open_checkpoint(run.path).findings] == ["skipped-checkpoint"]
    finally:
        (run.path / "checkpoint" / "step-3").rmdir()


class OneWay(nn.Module):
    """Stores the two rows of its matrix apart, and takes them back only if told how."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.both = nn.Linear(3, 2, bias=False)
        self.register_state_dict_post_hook(self.apart)
        if back:
            self.register_load_state_dict_pre_hook(self.together)

    @staticmethod
    def apart(module: nn.Module, state: dict, prefix: str, *_: object) -> None:
        state[f"{prefix}a"], state[f"{prefix}b"] = state.pop(f"{prefix}both.weight").clone()

    @staticmethod
    def together(module: nn.Module, state: dict, prefix: str, *_: object) -> None:
        state[f"{prefix}both.weight"] = torch.stack([state.pop(f"{prefix}a"), state.pop(f"{prefix}b")])


def test_what_a_network_stores_and_does_not_take_back_is_refused() -> None:
    """It would be measured with the weights that it was made with."""
    stored = {"a": torch.ones(3), "b": torch.zeros(3)}
    fill(there := OneWay(back=True), stored, "x")
    assert torch.equal(there.both.weight, torch.stack([stored["a"], stored["b"]]))
    with pytest.raises(InputError, match="does not take it"):
        fill(OneWay(back=False), stored, "x")
