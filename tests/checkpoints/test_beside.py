"""Optimizer state beside the weights, wrappers' prefixes and old buffers in any container, Composer's files."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import save_file
from saved import NET, is_the_run, train
from tiny import build, config
from torch import Tensor, nn

import curvcli
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.analysis.inspection import inspect_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.errors import CurvError, InputError, UnsupportedError
from curvcli.models.base import Architecture

Run = tuple[nn.Module, torch.optim.Optimizer]


@pytest.fixture(scope="module")
def run() -> Run:
    model = build()
    return model, train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_save_state(safe: bool, tmp_path: Path) -> None:
    """As accelerate itself writes it, with the configuration beside."""
    accelerator, model = Accelerator(cpu=True), build()
    made = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0)
    model, _, schedule = accelerator.prepare(model, made, schedule)
    train(model, made)
    accelerator.save_state(str(tmp_path / "step_3"), safe_serialization=safe)
    model.config.save_pretrained(tmp_path / "step_3")
    is_the_run(tmp_path / "step_3", model, made, None)
    checkpoint = open_checkpoint(tmp_path / "step_3")
    assert (checkpoint.format, checkpoint.step, checkpoint.findings) == ("accelerate", 3, ())


def weights(path: Path, model: nn.Module) -> Path:
    model.save_pretrained(path)
    return path


def test_several_optimizers_are_not_one(run: Run, tmp_path: Path) -> None:
    path = weights(tmp_path, run[0])
    for name in ("optimizer.bin", "optimizer_1.bin"):
        torch.save(run[1].state_dict(), path / name)
    checkpoint = open_checkpoint(path)
    assert checkpoint.optimizer is not None
    with pytest.raises(CurvError, match=r"2 optimizers \(optimizer.bin, optimizer_1.bin\)"):
        checkpoint.optimizer.view(checkpoint.model())


@pytest.mark.parametrize("name", ["optim.pt", "optimizer.pth", "optimizer_state.bin", "my-optimizer.pt", "optim_00003.pt"])
def test_the_only_optimizer_is_read_by_whatever_name(name: str, run: Run, tmp_path: Path) -> None:
    path = weights(tmp_path, run[0])
    torch.save({"optimizer": run[1].state_dict(), "epoch": 1} if "my" in name else run[1].state_dict(), path / name)
    is_the_run(path, *run, None)


@pytest.mark.slow
def test_a_form_that_is_not_known_is_an_error(run: Run, tmp_path: Path) -> None:
    path = weights(tmp_path, run[0])
    save_file({"a": torch.ones(2)}, path / "optim.safetensors")
    config().save_pretrained(path)
    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    options = Options(data=tmp_path / "ids.npy", tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    with pytest.raises(InputError, match=r"optim.safetensors has optimizer state in a form that is not known"):
        analyze_checkpoint(path, options)
    assert "not used" in inspect_checkpoint(path)["optimizer"]
    # The remedies of the message.
    assert analyze_checkpoint(path, Options(**{**vars(options), "optimizer": "none"})).optimizer.name == "none"
    curvcli.save_optimizer(path, run[1], run[0])
    assert analyze_checkpoint(path, options).optimizer.preconditioner == "checkpoint"


@pytest.mark.parametrize("file", [True, False])
def test_what_is_not_read_is_named(file: bool, run: Run, tmp_path: Path) -> None:
    if file:
        torch.save(run[0].state_dict(), tmp_path / "model_3.pt")
        torch.save(run[1].state_dict(), tmp_path / "optim_3.pt")
        found = open_checkpoint(tmp_path / "model_3.pt", NET)
    else:
        weights(tmp_path, run[0])
        torch.save(run[1].state_dict(), tmp_path / "optimizer.pt")
        torch.save(run[1].state_dict(), tmp_path / "optim_3.pt")
        found = open_checkpoint(tmp_path)
    assert [(f.code, f.severity, "optim_3.pt" in f.message) for f in found.findings] == [
        ("unread-optimizer", "warning", True)
    ]


@pytest.mark.parametrize("place", ["epoch_0", "recipe_state"])
def test_the_optimizer_in_torchtunes_state_is_named(place: str, run: Run, tmp_path: Path) -> None:
    """Beside the weights, and in newer ones beside the epochs' folders."""
    path = weights(tmp_path / "epoch_0", run[0])
    (tmp_path / place).mkdir(exist_ok=True)
    torch.save({"optimizer": run[1].state_dict(), "epochs_run": 1}, tmp_path / place / "recipe_state.pt")
    found = open_checkpoint(path).findings
    assert [(f.code, f.severity) for f in found] == [("unread-optimizer", "warning")]
    assert f"{place}/recipe_state.pt" in found[0].message


def test_an_optimizer_under_any_key_of_a_file(run: Run, tmp_path: Path) -> None:
    torch.save({"model": run[0].state_dict(), "opt": run[1].state_dict()}, tmp_path / "a.pt")
    is_the_run(tmp_path / "a.pt", *run)
    torch.save({"model": run[0].state_dict(), "adam": run[1].state_dict(), "sgd": run[1].state_dict()}, tmp_path / "b.pt")
    checkpoint = open_checkpoint(tmp_path / "b.pt", NET)
    with pytest.raises(UnsupportedError, match=r"2 optimizers \(adam, sgd\)"):
        checkpoint.optimizer.view(checkpoint.model())


def _sharded(path: Path, state: dict[str, Tensor]) -> None:
    import json

    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    for i, half in enumerate(halves):
        save_file(half, path / f"model-{i}.safetensors", {"format": "pt"})
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, half in enumerate(halves) for name in half}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


CONTAINERS: dict[str, Callable[[Path, dict[str, Tensor]], object]] = {
    "safetensors": lambda path, state: save_file(state, path / "model.safetensors", {"format": "pt"}),
    "shards": _sharded,
    "pytorch_model.bin": lambda path, state: torch.save(state, path / "pytorch_model.bin"),
}
PREFIXES = ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_do_not_count_beside_a_configuration(container: str, prefix: str, run: Run, tmp_path: Path) -> None:
    CONTAINERS[container](tmp_path, {prefix + n: t.contiguous() for n, t in run[0].state_dict().items()})
    config().save_pretrained(tmp_path)
    torch.save(run[1].state_dict(), tmp_path / "optimizer.pt")
    is_the_run(tmp_path, *run, None)


def test_a_layer_compiled_alone(run: Run, tmp_path: Path) -> None:
    state = {n.replace("layers.1.", "layers.1._orig_mod."): t.contiguous() for n, t in run[0].state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config().save_pretrained(tmp_path)
    torch.save(run[1].state_dict(), tmp_path / "optimizer.pt")
    is_the_run(tmp_path, *run, None)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_do_not_count_in_optimizers_names(prefix: str, tmp_path: Path) -> None:
    model = build()
    optimizer = train(model, torch.optim.AdamW([(prefix + n, p) for n, p in model.named_parameters()][::-1], lr=1e-2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    is_the_run(tmp_path / "a.pt", model, optimizer)
    torch.save(optimizer.state_dict(), weights(tmp_path / "dir", model) / "optimizer.pt")
    is_the_run(tmp_path / "dir", model, optimizer, None)


class Holder(nn.Module):
    """A network with a part that is called as a wrapper's is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Linear(3, 3)


def test_a_part_that_is_called_module(tmp_path: Path) -> None:
    model = Holder()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    model.module(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    is_the_run(tmp_path / "a.pt", model, optimizer, Architecture("Holder", Holder))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_do_not_count_in_distributed_checkpoints(prefix: str, run: Run, tmp_path: Path) -> None:
    state = {"model": {prefix + n: t for n, t in run[0].state_dict().items()}, "optimizer": run[1].state_dict()}
    dcp.save(state, checkpoint_id=tmp_path / "a", no_dist=True)
    is_the_run(tmp_path / "a", *run)


OLD = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    "h.0.attn.bias": (1, 1, 8, 8),
    "h.0.attn.masked_bias": (),
    "gpt_neox.layers.0.attention.bias": (1, 1, 8, 8),
    "embeddings.position_ids": (1, 8),
}


@pytest.mark.parametrize("name", OLD)
def test_buffers_that_old_versions_saved(name: str, run: Run, tmp_path: Path) -> None:
    document = {"model": {name: torch.ones(OLD[name]), **run[0].state_dict()}, "optimizer": run[1].state_dict()}
    torch.save(document, tmp_path / "a.pt")
    is_the_run(tmp_path / "a.pt", *run)


def test_a_bias_of_another_network_is_no_buffer(run: Run, tmp_path: Path) -> None:
    torch.save({**run[0].state_dict(), "model.layers.0.attn.bias": torch.ones(16)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"attn\.bias"):
        open_checkpoint(tmp_path / "a.pt", NET).model()


def composer(run: Run, *, named: bool = True, kind: str = "AdamW") -> dict:
    """composer/core/state.py: State.state_dict() of a HuggingFaceModel, whose network is its attribute `model`."""
    model, optimizer = run
    names = {id(p): f"model.{n}" for n, p in model.named_parameters()}
    order = [names[id(p)] for g in optimizer.param_groups for p in g["params"]]
    saved = optimizer.state_dict()
    if named:
        groups = [{**g, "params": [order[i] for i in g["params"]]} for g in saved["param_groups"]]
        saved = {"state": {order[i]: s for i, s in saved["state"].items()}, "param_groups": groups}
    clock = {"iteration": 0, "epoch": 0, "batch": 3, "sample": 12, "batch_in_epoch": 3}
    state = {
        "model": {f"model.{n}": t for n, t in model.state_dict().items()},
        "optimizers": {kind: saved},
        "schedulers": {},
        "timestamp": clock,
        "rank_zero_seed": 1,
    }
    return {
        "state": state,
        "rng": [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}],
    }


@pytest.mark.parametrize("named", [True, False])
def test_composer(named: bool, run: Run, tmp_path: Path) -> None:
    torch.save(composer(run, named=named), tmp_path / "ep0-ba3-rank0.pt")
    is_the_run(tmp_path / "ep0-ba3-rank0.pt", *run)
    checkpoint = open_checkpoint(tmp_path, NET)
    assert (checkpoint.format, checkpoint.step, checkpoint.path.name) == ("composer", 3, "ep0-ba3-rank0.pt")


def test_composers_decoupled_decay_is_adamws(run: Run, tmp_path: Path) -> None:
    """DecoupledAdamW decays a weight by lr / initial_lr * wd, torch's AdamW by lr * wd."""
    document = composer(run, kind="DecoupledAdamW")
    document["state"]["optimizers"]["DecoupledAdamW"]["param_groups"][0].update(lr=2e-3, initial_lr=1e-2, weight_decay=1e-5)
    torch.save(document, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt", NET)
    view = checkpoint.optimizer.view(checkpoint.model())
    assert view.name == "AdamW"
    lr, decay = (view.groups[0].number(key) for key in ("lr", "weight_decay"))
    assert lr * decay == pytest.approx(2e-3 / 1e-2 * 1e-5)
