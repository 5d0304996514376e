"""Files with an average of the weights: what is measured are the weights that the optimizer moved, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from saved import NET, is_the_run, train
from tiny import build, config
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel

from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.errors import InputError
from curvcli.models.base import Architecture

Trained = tuple[nn.Module, torch.optim.Optimizer, AveragedModel]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A model, its optimizer, and an average that is not it."""
    model = build()
    average = AveragedModel(model)
    optimizer = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    average.update_parameters(model)
    return model, optimizer, average


def named(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


# Written after the layouts of: Lightning's WeightAveraging, timm, DETR, a script with torch.optim.swa_utils, and a
# LightningModule with its average inside.
BOTH: dict[str, Callable[[dict, dict], dict]] = {
    "current_model_state": lambda w, a: {"state_dict": a, "current_model_state": w, "averaging_state": {}},
    "state_dict_ema": lambda w, a: {"state_dict": w, "state_dict_ema": a},
    "model_ema": lambda w, a: {"model": w, "model_ema": a},
    "ema before model": lambda w, a: {"ema": a, "model": w},
    "no model but None": lambda w, a: {"model_state_dict": w, "model": None, "swa_model": a},
    "a list": lambda w, a: {"model": w, "ema": {"shadow_params": list(a.values()), "decay": 0.9}},
    "AveragedModel": lambda w, a: {"model": w, "averaged_model": {**named("module.", a), "n_averaged": torch.tensor(1)}},
    "inside": lambda w, a: {
        "state_dict": {**named("ema.module.", a), "ema.n_averaged": torch.tensor(1), **named("model.", w)}
    },
    "inside, longer": lambda w, a: {"state_dict": {**named("network.", w), **named("network_ema.", a)}},
}


@pytest.mark.parametrize("layout", BOTH)
def test_the_trained_weights_are_taken(layout: str, trained: Trained, tmp_path: Path) -> None:
    model, optimizer, average = trained
    document = BOTH[layout](model.state_dict(), average.module.state_dict())
    torch.save({**document, "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    is_the_run(tmp_path / "last.pt", model, optimizer)
    assert "average" in open_checkpoint(tmp_path / "last.pt", NET).notes["averaged-weights"]


ALONE: dict[str, Callable[[dict, dict], dict]] = {
    "ema": lambda w, a: {"ema": a},
    "no model but None": lambda w, a: {"model": None, "ema": a},
    "AveragedModel": lambda w, a: {"model": {**named("module.", a), "n_averaged": torch.tensor(1)}},
    "names": lambda w, a: {"state_dict": named("model_ema.", a)},
}


@pytest.mark.parametrize("layout", ALONE)
def test_an_average_alone_is_not_measured_with_moments_of_others(layout: str, trained: Trained, tmp_path: Path) -> None:
    model, optimizer, average = trained
    document = ALONE[layout](model.state_dict(), average.module.state_dict())
    torch.save({**document, "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    checkpoint = open_checkpoint(tmp_path / "last.pt", NET)
    found = checkpoint.model()
    assert torch.equal(found.get_parameter("lm_head.weight"), average.module.get_parameter("lm_head.weight"))
    assert checkpoint.optimizer is not None
    with pytest.raises(InputError, match=r"average.*--optimizer none"):
        checkpoint.optimizer.view(found)
    assert [finding.code for finding in checkpoint.findings] == ["averaged-weights"]


@pytest.mark.parametrize(("name", "average"), [("epoch=0-step=3-EMA.ckpt", True), ("ema_loss=2.5-step=3.ckpt", False)])
def test_a_files_name_says_so_and_a_metrics_does_not(name: str, average: bool, trained: Trained, tmp_path: Path) -> None:
    model, optimizer, _ = trained
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name, NET)
    assert bool(checkpoint.findings) is average
    if not average:
        is_the_run(tmp_path / name, model, optimizer)


class WithTeacher(nn.Module):
    """A network that holds an average of its own, as a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.ema_teacher = nn.Linear(3, 3), nn.Linear(3, 3)


def test_an_average_that_is_part_of_the_network_is_loaded(tmp_path: Path) -> None:
    model = WithTeacher()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt", Architecture("WithTeacher", WithTeacher)).model()
    assert torch.equal(found.get_parameter("ema_teacher.weight"), model.ema_teacher.weight)


@pytest.mark.parametrize("both", [True, False])
def test_distributed_checkpoints(both: bool, trained: Trained, tmp_path: Path) -> None:
    model, optimizer, average = trained
    state = {"ema": average.module.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(
        {**state, **({"model": get_model_state_dict(model)} if both else {})}, checkpoint_id=tmp_path / "a", no_dist=True
    )
    checkpoint = open_checkpoint(tmp_path / "a", NET)
    if both:
        is_the_run(tmp_path / "a", model, optimizer)
        assert "ema" in checkpoint.notes["averaged-weights"]
    else:
        with pytest.raises(InputError, match="average"):
            checkpoint.optimizer.view(checkpoint.model())


def test_safetensors_of_an_averaged_model(trained: Trained, tmp_path: Path) -> None:
    _, optimizer, average = trained
    save_file({**average.state_dict(), "n_averaged": torch.tensor(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    config().save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(InputError, match="average"):
        checkpoint.optimizer.view(checkpoint.model())


def test_the_report_of_an_average_says_so(trained: Trained, tmp_path: Path) -> None:
    torch.save({"ema": trained[2].module.state_dict()}, tmp_path / "a.pt")
    config().save_pretrained(tmp_path)
    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    options = Options(data=tmp_path / "ids.npy", tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    report = analyze_checkpoint(tmp_path / "a.pt", options)
    assert "averaged-weights" in {finding.code for finding in report.findings}
    assert report.verdict == "unresolved"
