"""torch.distributed.checkpoint in every layout, read from files that torch wrote in the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcp_runs import LAYOUTS, same_view, same_weights
from fsdp_runs import save, train
from tiny import STEPS, build, config
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.analysis.inspection import inspect_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.formats.dcp_files import read_metadata
from curvcli.checkpoints.state.mapping import map_named
from curvcli.errors import InputError
from curvcli.models.base import Architecture


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_trainers_checkpoint(layout: str, trained: SimpleNamespace) -> None:
    reference = open_checkpoint(trained.trainer)
    model = reference.model()
    checkpoint = open_checkpoint(trained.paths[layout].parent)
    assert (checkpoint.format, checkpoint.step) == ("dcp", STEPS)
    assert {t.name: t.shape for t in checkpoint.tensors} == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    same_weights(checkpoint.model(), model)
    assert checkpoint.optimizer is not None
    assert reference.optimizer is not None
    expected = reference.optimizer.view(model)
    view = checkpoint.optimizer.view(checkpoint.model())
    same_view(view, expected)
    assert sorted(len(group.names) for group in view.groups) == [5, 16]
    assert checkpoint.optimizer.summary()["betas"] == (0.9, 0.95)


@pytest.mark.slow
def test_curvature_is_the_trainers(trained: SimpleNamespace) -> None:
    options = Options(data=trained.root / "ids.npy", tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    reports = [analyze_checkpoint(path, options) for path in (trained.trainer, trained.paths["flattened"])]
    assert reports[0].full.eigenvalue == reports[1].full.eigenvalue
    assert reports[0].optimizer.threshold == reports[1].optimizer.threshold


def test_without_a_network_it_is_listed_and_not_measured(nested: Path, trained: SimpleNamespace) -> None:
    (nested / "config.json").unlink()
    found = inspect_checkpoint(nested)
    assert found["parameters"] == sum(p.numel() for p in trained.model.parameters())
    assert found["optimizer"]["parameters with state"] == 21
    with pytest.raises(InputError, match="--model"):
        open_checkpoint(nested).model()
    same_weights(open_checkpoint(nested, Architecture("ours", build)).model(), trained.model)
    with pytest.raises(InputError, match="do not fit"):
        open_checkpoint(nested, Architecture("other", lambda: nn.Linear(3, 3))).model()


def test_tied_weights_and_frozen_parameters(tmp_path: Path) -> None:
    model = build(tied=True)
    model.model.norm.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    dcp.save({"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    config(tied=True).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.optimizer is not None
    found = checkpoint.model()
    view = checkpoint.optimizer.view(found)
    assert set(view.state) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert found.lm_head.weight is found.model.embed_tokens.weight


class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.net(**inputs)


def test_a_prefix_that_weights_and_moments_share(trained: SimpleNamespace, tmp_path: Path) -> None:
    outer = Wrapper(build())
    save(outer, train(outer), "nested", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.optimizer is not None
    assert checkpoint.tensors[0].name.startswith("net.model.")
    model = checkpoint.model()
    same_weights(model, trained.model)
    assert set(checkpoint.optimizer.view(model).state) == {n for n, _ in trained.model.named_parameters()}


def test_either_name_of_a_tied_weight_means_it(tmp_path: Path) -> None:
    model = build(tied=True)
    document: dict[str, Any] = {"state": {}, "param_groups": [{"lr": 1.0, "params": ["lm_head.weight"]}]}
    assert map_named(document, model, {}, path="x").groups[0].names == ("model.embed_tokens.weight",)
    document["param_groups"].append({"lr": 2.0, "params": ["model.embed_tokens.weight"]})
    with pytest.raises(InputError, match="twice"):
        map_named(document, model, {}, path="x")


def test_reading_is_lazy(trained: SimpleNamespace, nested: Path) -> None:
    """Moments that nobody looks at are not read: damage to them shows when they are."""
    checkpoint = open_checkpoint(nested)
    assert checkpoint.optimizer is not None
    model = checkpoint.model()
    view = checkpoint.optimizer.view(model)
    entry = next(e for e in read_metadata(nested) if e.path[-2:] == ("model.norm.weight", "exp_avg_sq"))
    with (nested / "__0_0.distcp").open("r+b") as file:
        file.seek(entry.chunks[0].offset)
        file.write(bytes(entry.chunks[0].length))
    state = view.state["model.norm.weight"]
    assert torch.equal(state["exp_avg"], trained.optimizer.state[trained.model.model.norm.weight]["exp_avg"])
    with pytest.raises(InputError, match=r"__0_0\.distcp \(optim\.state.model.norm.weight.exp_avg_sq\)"):
        state["exp_avg_sq"]


def test_hugging_face_storage_writer(trained: SimpleNamespace, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    weights = get_model_state_dict(trained.model)
    path, ranks = tmp_path / "step-7", tmp_path / "step-8"
    dcp.save(weights, storage_writer=HuggingFaceStorageWriter(path=str(path)))
    dcp.save(weights, storage_writer=HuggingFaceStorageWriter(path=str(ranks), save_distributed=True))
    checkpoint = open_checkpoint(path, Architecture("ours", build))
    assert (checkpoint.format, checkpoint.step, checkpoint.optimizer) == ("dcp-safetensors", 7, None)
    same_weights(checkpoint.model(), trained.model)
    with pytest.raises(InputError, match="enable_consolidation"):
        open_checkpoint(ranks)


# Names in the file, but not this model's.
DOCUMENTS: dict[str, tuple[Callable[[dict], object], str]] = {
    "unknown name": (lambda d: d["param_groups"][0]["params"].append("zorro"), "zorro is no trained parameter"),
    "a position among names": (lambda d: d["param_groups"][0]["params"].append(3), "3 is no trained parameter"),
    "twice": (lambda d: d["param_groups"][1]["params"].append(d["param_groups"][0]["params"][0]), "stands in it twice"),
    "state without a group": (lambda d: d["param_groups"][0]["params"].pop(), "has state and no group"),
    "unknown state": (lambda d: d["state"].update(zorro={}), "zorro has state and is no trained parameter"),
    "shape": (lambda d: d["state"]["model.norm.weight"].update(exp_avg=torch.zeros(3)), "has shape (3,)"),
    "no groups": (lambda d: d.pop("param_groups"), "holds no torch optimizer state"),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_named_state_that_does_not_fit(case: str, trained: SimpleNamespace) -> None:
    document = get_optimizer_state_dict(trained.model, trained.optimizer)
    document = {"state": {k: dict(v) for k, v in document["state"].items()}, "param_groups": document["param_groups"]}  # type: ignore[arg-type]
    names = {n: n for n, _ in trained.model.named_parameters()}
    assert len(map_named(document, trained.model, names, path="x").state) == 21
    change, said = DOCUMENTS[case]
    change(document)
    with pytest.raises(InputError) as error:
        map_named(document, trained.model, names, path="x")
    assert said in str(error.value)
