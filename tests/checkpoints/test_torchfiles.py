"""Files of torch.save, Lightning's checkpoints, weights in every form, and optimizer.safetensors of our own."""

from __future__ import annotations

import argparse
import json
import pathlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_runs import Lit, fit, grouped
from refusals import one_line
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved import NET, is_the_run, train
from tiny import STEPS, build, config
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import curvcli
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.analysis.inspection import inspect_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.errors import CurvError, InputError, UnsupportedError, UsageError
from curvcli.models.base import Architecture

DOCUMENTS: dict[str, tuple[Callable[[nn.Module, Any], dict], int | None]] = {
    "model, optimizer, step": (lambda m, o: {"model": m.state_dict(), "optimizer": o.state_dict(), "step": 7}, 7),
    "names of the tutorial": (
        lambda m, o: {"model_state_dict": m.state_dict(), "optimizer_state_dict": o.state_dict(), "epoch": 5}, None,
    ),
    "state_dict": (lambda m, o: {"state_dict": m.state_dict(), "optimizer": o.state_dict(), "iteration": 9}, 9),
    "a step that is a tensor": (
        lambda m, o: {"model": m.state_dict(), "optimizer": o.state_dict(), "iter_num": torch.tensor(11)}, 11,
    ),
    "compiled and parallel": (
        lambda m, o: {
            "model": {f"module._orig_mod.{n}": t for n, t in m.state_dict().items()}, "optimizer": o.state_dict(),
        }, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("order", ["one group", "matrices first"])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_scripts_own_file(document: str, order: str, tmp_path: Path) -> None:
    model = build()
    groups = model.parameters() if order == "one group" else grouped(model)
    optimizer = train(model, torch.optim.AdamW(groups, lr=1e-2))  # type: ignore[arg-type]
    make, step = DOCUMENTS[document]
    torch.save(make(model, optimizer), tmp_path / "last.pt")
    is_the_run(tmp_path / "last.pt", model, optimizer)
    checkpoint = open_checkpoint(tmp_path / "last.pt", NET)
    assert (checkpoint.format, checkpoint.step) == ("torch", step)


def test_a_file_is_analyzed_with_the_configuration_beside_it(tmp_path: Path) -> None:
    model = build()
    optimizer = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt_3.pt")
    config().save_pretrained(tmp_path)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    options = Options(data=tmp_path / "ids.npy", tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    report = analyze_checkpoint(tmp_path / "ckpt_3.pt", options)
    assert (report.checkpoint.format, report.checkpoint.step, report.optimizer.lr) == ("torch", 3, pytest.approx(1e-2))
    assert report.optimizer.preconditioner == "checkpoint"


def test_a_bare_state_dict_has_no_optimizer(tmp_path: Path) -> None:
    torch.save(build().state_dict(), tmp_path / "weights.pth")
    checkpoint = open_checkpoint(tmp_path / "weights.pth", NET)
    assert checkpoint.optimizer is None
    assert torch.equal(checkpoint.model().state_dict()["lm_head.weight"], build().lm_head.weight)


@pytest.mark.parametrize("keyed", ["param_names", "names alone"])
def test_names_in_the_file_win_over_any_order(keyed: str, tmp_path: Path) -> None:
    """An order that no rule knows: the parameters backwards."""
    model = build()
    backwards = list(model.named_parameters())[::-1]
    optimizer = train(model, torch.optim.AdamW(backwards, lr=1e-2))
    document = optimizer.state_dict()
    assert "param_names" in document["param_groups"][0]
    if keyed == "names alone":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        document = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))  # type: ignore[assignment]
        assert "lm_head.weight" in document["state"]
    torch.save({"model": model.state_dict(), "optimizer": document}, tmp_path / "a.pt")
    is_the_run(tmp_path / "a.pt", model, optimizer)


class Reordered(nn.Module):
    """Two layers of one shape, in either order of registration."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        for name in (first, second):
            setattr(self, name, nn.Linear(3, 3))


def test_positions_mean_nothing_in_a_model_of_another_order(tmp_path: Path) -> None:
    model = Reordered("a", "b")
    optimizer = torch.optim.AdamW(model.parameters())
    (model.a.weight.sum() + model.b.weight.square().sum() + model.a.bias.sum() + model.b.bias.sum()).backward()  # type: ignore[union-attr,operator]
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    is_the_run(tmp_path / "a.pt", model, optimizer, Architecture("same", lambda: Reordered("a", "b")))
    checkpoint = open_checkpoint(tmp_path / "a.pt", Architecture("other", lambda: Reordered("b", "a")))
    assert checkpoint.optimizer is not None
    with pytest.raises(InputError, match=r"a\.weight where the model has b\.weight"):
        checkpoint.optimizer.view(checkpoint.model())


def test_tied_weights(tmp_path: Path) -> None:
    model = build(tied=True)
    optimizer = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    is_the_run(tmp_path / "a.pt", model, optimizer, Architecture("tied", lambda: build(tied=True)))


def test_several_optimizers(tmp_path: Path) -> None:
    """modded-nanogpt's layout: the code as text. Muon beside an Adam is read (test_normalised_files), and no other pair."""
    model = build()
    rest = train(model, torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1]))
    document = {"step": 3, "code": "import torch", "model": model.state_dict()}
    torch.save({**document, "optimizers": [rest.state_dict()] * 2}, tmp_path / "state_step000003.pt")
    checkpoint = open_checkpoint(tmp_path / "state_step000003.pt", NET)
    assert checkpoint.step == 3
    assert checkpoint.optimizer is not None
    assert checkpoint.optimizer.summary() == {"optimizers": 2}
    with pytest.raises(UnsupportedError, match="2 optimizers"):
        checkpoint.optimizer.view(checkpoint.model())
    with pytest.raises(InputError, match="--model"):
        open_checkpoint(tmp_path / "state_step000003.pt").model()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}}, "under model and state_dict"),
        ({"model": argparse.Namespace()}, "no weights by name"),
        ({"model": {"w": 3}}, "no weights by name"),
        ({"epoch": 3}, "no weights by name"),
        ([torch.ones(2)], "no weights by name"),
        (torch.ones(2), "no weights by name"),
        ({}, "no weights by name"),
        ({3: torch.ones(2)}, "no weights by name"),
        ({"model": {"w": torch.ones(1)}, "step": -1}, "do not fit the model"),
    ],
)
def test_what_is_no_checkpoint(document: Any, said: str, tmp_path: Path) -> None:
    torch.save(document, tmp_path / "a.pt")
    with pytest.raises(InputError, match=said):
        open_checkpoint(tmp_path / "a.pt", NET).model()


@pytest.mark.parametrize("named", [False, True])
def test_lightning(named: bool, tmp_path: Path) -> None:
    """With hyperparameters of classes that torch refuses to load."""
    arguments = argparse.Namespace(lr=1e-2, where=pathlib.Path("/data"), inner=types.SimpleNamespace(depth=2))
    module = Lit(arguments, named)
    path = tmp_path / "epoch=0-step=2.ckpt"
    trainer = fit(module, path)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path)
    checkpoint = open_checkpoint(tmp_path, NET)
    assert (checkpoint.path, checkpoint.format, checkpoint.step) == (path, "lightning", 2)
    assert checkpoint.tensors[0].name.startswith("net.")
    is_the_run(path, module.net, trainer.optimizers[0])


def test_lightning_with_another_module_is_refused(tmp_path: Path) -> None:
    fit(Lit(extra=nn.Linear(2, 2)), tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="stored weights are none of the model's"):
        open_checkpoint(tmp_path / "a.ckpt", NET).model()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    """A model of save_pretrained with our optimizer file beside it."""
    model = build()
    optimizer = train(model, torch.optim.AdamW(grouped(model), lr=1e-2, betas=(0.9, 0.95), amsgrad=True))
    model.save_pretrained(tmp_path / "model")
    file = curvcli.save_optimizer(tmp_path / "model", optimizer, model)
    assert file == tmp_path / "model" / "optimizer.safetensors"
    return tmp_path / "model", model, optimizer


@pytest.mark.slow
def test_our_own_file(saved: tuple, tmp_path: Path) -> None:
    path, model, optimizer = saved
    view = is_the_run(path, model, optimizer)
    assert (view.name, view.step, view.groups[0].betas) == ("AdamW", STEPS, (0.9, 0.95))
    assert {"exp_avg.lm_head.weight", "exp_avg_sq.lm_head.weight"} <= set(load_file(path / "optimizer.safetensors"))
    found = inspect_checkpoint(path)["optimizer"]
    assert (found["parameters with state"], found["groups"], found["lr"]) == (21, 2, 1e-2)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    options = Options(data=tmp_path / "ids.npy", tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    mine = analyze_checkpoint(path, options)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    assert mine.full.eigenvalue == analyze_checkpoint(path, options).full.eigenvalue
    assert mine.optimizer.step == STEPS


@pytest.mark.slow
def test_wrappers_are_dropped_and_another_model_is_refused(tmp_path: Path) -> None:
    model = build()
    optimizer = train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    model.save_pretrained(tmp_path)
    curvcli.save_optimizer(tmp_path, optimizer, torch.compile(model))  # type: ignore[arg-type]
    view = is_the_run(tmp_path, model, optimizer)
    assert view.name == "SGD"
    with pytest.raises(UsageError, match="does not have"):
        curvcli.save_optimizer(tmp_path, optimizer, build())
    with pytest.raises(InputError, match="cannot write"):
        curvcli.save_optimizer(tmp_path / "nowhere", optimizer, model)
    assert sorted(f.name for f in tmp_path.iterdir() if "optim" in f.name or f.name[0] == ".") == ["optimizer.safetensors"]


def test_an_unknown_order_is_mended_by_doing_what_the_refusal_says(tmp_path: Path) -> None:
    """The names beside one file that has the weights would help nothing."""
    model = build()
    optimizer = train(model, torch.optim.AdamW([*model.parameters()][::-1], lr=1e-2))
    model.config.save_pretrained(tmp_path)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    checkpoint = open_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint.optimizer is not None
    with pytest.raises(InputError) as told:
        checkpoint.optimizer.view(checkpoint.model())
    steps = ["model.save_pretrained(DIR)", "curvcli.save_optimizer(DIR, optimizer, model)", "then give DIR"]
    assert [step for step in steps if step in (told.value.hint or "")] == steps
    model.save_pretrained(tmp_path / "DIR")
    curvcli.save_optimizer(tmp_path / "DIR", optimizer, model)
    is_the_run(tmp_path / "DIR", model, optimizer)


def _metadata(file: Path, change: Callable[[dict[str, str]], object]) -> None:
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    change(metadata)
    save_file(tensors, file, metadata=metadata)


def _json(change: Callable[[dict], object]) -> Callable[[dict[str, str]], object]:
    def apply(metadata: dict[str, str]) -> None:
        said = json.loads(metadata["optimizer"])
        change(said)
        metadata["optimizer"] = json.dumps(said)

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.clear(), "not written by"),
        (lambda m: m.update(optimizer="{"), "damaged metadata"),
        (lambda m: m.update(optimizer="[" * 10**5), "damaged metadata"),
        (lambda m: m.update(optimizer="[]"), "damaged metadata"),
        (_json(lambda d: d.update(groups=3)), "damaged metadata"),
        (_json(lambda d: d.update(groups=[])), "no torch optimizer state"),
        (_json(lambda d: d.update(numbers={"a": 3})), "damaged metadata"),
        (_json(lambda d: d["groups"][0]["names"].append("other.weight")), "other.weight"),
        (_json(lambda d: d["groups"][0]["names"].append("model.norm.weight")), "stands in it twice"),
        (_json(lambda d: d["groups"].pop()), "has state and no group"),
        (_json(lambda d: d.update(name="Lion")), "Lion"),
    ],
)
def test_a_damaged_file_of_ours(change: Callable, said: str, saved: tuple) -> None:
    path, *_ = saved
    _metadata(path / "optimizer.safetensors", change)
    np.save(path / "ids.npy", np.zeros(2000, dtype=np.int64))
    options = Options(data=path / "ids.npy", tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    with pytest.raises(CurvError, match=said):
        analyze_checkpoint(path, options)


@pytest.mark.parametrize(
    ("files", "at", "kind"),
    [
        (("latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"), ".", "Megatron-LM"),
        (("iter_0000010/mp_rank_00_000/model_optim_rng.pt",), "iter_0000010", "Megatron-LM"),
        (("latest_checkpointed_iteration.txt", "iter_0000010/common.pt"), ".", "Megatron-LM"),
        (("iter_0000010/.metadata", "iter_0000010/metadata.json"), ".", "Megatron-LM"),
        (("run/weights/.metadata", "run/context/io.json"), "run", "NeMo"),
        (("model.nemo",), "model.nemo", "NeMo"),
    ],
)
def test_megatron_and_nemo_are_sent_to_their_converters(files: tuple[str, ...], at: str, kind: str, tmp_path: Path) -> None:
    """By the names of files alone: nothing in them is read."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"sharded_backend": "torch_dist"}' if name.endswith(".json") else "10")
    line = one_line([str(tmp_path / at)])
    assert f"checkpoint of {kind}" in line
    assert "export_ckpt" in line


@pytest.mark.parametrize(
    "form", ["safetensors", "bf16", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sharded", "bin"))]
)
def test_every_form_of_weights_in_a_trainers_checkpoint(form: str, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    ).to(torch.bfloat16 if form == "bf16" else torch.float32)  # type: ignore[arg-type]
    optimizer = train(model, torch.optim.AdamW(grouped(model), lr=1e-2))
    path = tmp_path / "checkpoint-3"
    model.save_pretrained(path, max_shard_size="10KB" if form == "sharded" else "1GB")
    assert (path / "model.safetensors.index.json").exists() == (form == "sharded")
    if form == "bin":
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": []}))
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    options = Options(data=tmp_path / "ids.npy", tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    report = analyze_checkpoint(tmp_path, options)
    assert (report.checkpoint.format, report.checkpoint.step) == ("trainer", 3)
    checkpoint = open_checkpoint(tmp_path)
    found = checkpoint.model()
    assert checkpoint.optimizer is not None
    view = checkpoint.optimizer.view(found)
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(found.named_parameters())[name], parameter.float())
        assert torch.equal(view.state[name]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])
