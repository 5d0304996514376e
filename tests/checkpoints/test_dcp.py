"""torch.distributed.checkpoint and FSDP, read from files that torch, accelerate and the Trainer wrote in the test."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from damage import damaged_checkpoint, damages, read_everything
from formats import RANKED, master
from fsdp_runs import Odd, save, train, write
from ranks import launch
from test_bad_input import Evil, _one_line
from tiny import STEPS, build, config
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from transformers import LlamaForCausalLM

from curvcli.analysis.checkpoint import Options, analyze_checkpoint, inspect_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.formats.dcp_files import read_metadata
from curvcli.checkpoints.state.mapping import map_named
from curvcli.errors import InputError
from curvcli.models.base import Architecture
from curvcli.optimizers.base import OptimizerView

LAYOUTS = ("nested", "flattened", "torchtitan", "by position", "inside an application")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run saved in every layout, and as the Trainer would have saved it."""
    root, model = tmp_path_factory.mktemp("dcp"), build()
    optimizer = train(model)
    (root / "checkpoint-3").mkdir()
    model.save_pretrained(root / "checkpoint-3")
    torch.save(optimizer.state_dict(), root / "checkpoint-3" / "optimizer.pt")
    paths = {layout: save(model, optimizer, layout, root / layout / "step-3") for layout in LAYOUTS}
    np.save(root / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    return SimpleNamespace(root=root, model=model, optimizer=optimizer, paths=paths, trainer=root / "checkpoint-3")


@pytest.fixture
def nested(trained: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained.paths["nested"], tmp_path / "step-3"))


def same_view(found: OptimizerView, expected: OptimizerView) -> None:
    def grouped(view: OptimizerView) -> dict[str, dict]:
        return {name: dict(group.options) for group in view.groups for name in group.names}

    assert grouped(found) == grouped(expected)
    assert set(found.state) == set(expected.state)
    for name, entry in expected.state.items():
        assert set(found.state[name]) == set(entry)
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(found.state[name][key]), torch.as_tensor(value)), (name, key)


def same_weights(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


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


def test_curvature_is_the_trainers(trained: SimpleNamespace) -> None:
    options = Options(data=trained.root / "ids.npy", tokens=256, sequence_length=16, max_hvps=4)
    reports = [analyze_checkpoint(path, options) for path in (trained.trainer, trained.paths["flattened"])]
    assert reports[0].full.eigenvalue == reports[1].full.eigenvalue
    assert reports[0].optimizer.threshold == reports[1].optimizer.threshold


def test_without_a_network_it_is_listed_and_not_measured(nested: Path, trained: SimpleNamespace) -> None:
    (nested / "config.json").unlink()
    found = inspect_checkpoint(nested)
    assert found["values"] == sum(p.numel() for p in trained.model.parameters())
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
    document = {"state": {}, "param_groups": [{"lr": 1.0, "params": ["lm_head.weight"]}]}
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
    document = {"state": {k: dict(v) for k, v in document["state"].items()}, "param_groups": document["param_groups"]}
    names = {n: n for n, _ in trained.model.named_parameters()}
    assert len(map_named(document, trained.model, names, path="x").state) == 21
    change, said = DOCUMENTS[case]
    change(document)
    with pytest.raises(InputError) as error:
        map_named(document, trained.model, names, path="x")
    assert said in str(error.value)


# What is wrong with `.metadata` or the files beside it.


def _edit(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        document = pickle.loads((path / ".metadata").read_bytes())
        change(document)
        (path / ".metadata").write_bytes(pickle.dumps(document))

    return damage


def _place(document: Any, key: str = "model.model.norm.weight") -> Any:
    return next(place for index, place in document.storage_data.items() if index.fqn == key)


def _bigger(document: Any) -> None:
    described = document.state_dict_metadata["model.model.norm.weight"]
    described.size = described.chunks[0].sizes = torch.Size([2**50])


def _other(document: Any) -> None:
    """The norm's weight is said to lie where another of its shape does not."""
    source = _place(document, "model.model.embed_tokens.weight")
    target = _place(document)
    target.offset, target.length = source.offset, source.length


def _overlap(document: Any) -> None:
    described = document.state_dict_metadata["model.model.norm.weight"]
    chunk = described.chunks[0]
    described.chunks = [chunk, chunk]
    described.size = torch.Size([32])


def _link(path: Path) -> None:
    (path / "__0_0.distcp").rename(path.parent / "elsewhere.distcp")
    (path / "__0_0.distcp").symlink_to(path.parent / "elsewhere.distcp")


def _write(data: bytes) -> Callable[[Path], object]:
    return lambda path: (path / ".metadata").write_bytes(data)


def _truncate(name: str, keep: int) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:keep])


def _disks(path: Path) -> None:
    """The zip around the first hyperparameter says that it spans nine disks."""
    with (path / "__0_0.distcp").open("r+b") as file:
        file.seek(file.read(4096).index(b"PK\x06\x07") + 16)
        file.write(struct.pack("<I", 9))


_NESTED_KEY = b"\x80\x04}" + b"K\x01\x85" + b"2\x86" * 200 + b"K\x01s."
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is named in .metadata and missing"),
    "truncated file": (_truncate("__0_0.distcp", 90_000), "__0_0.distcp has 90000 bytes"),
    "zip of several disks": (_disks, "is a damaged zip: zipfiles that span"),
    "empty file": (_truncate("__0_0.distcp", 0), "__0_0.distcp has 0 bytes"),
    "truncated metadata": (_truncate(".metadata", 9_000), ".metadata is a damaged pickle"),
    "empty metadata": (_truncate(".metadata", 0), ".metadata is a damaged pickle"),
    "metadata is a list": (_write(pickle.dumps([1, 2])), ".metadata is not a checkpoint's metadata"),
    "parent directory": (_edit(lambda d: setattr(_place(d), "relative_path", "../x.distcp")), "outside its directory"),
    "absolute path": (_edit(lambda d: setattr(_place(d), "relative_path", "/etc/hostname")), "outside its directory"),
    "directory": (_edit(lambda d: setattr(_place(d), "relative_path", ".")), "outside its directory"),
    "link": (_link, "outside its directory"),
    "path is no name": (_edit(lambda d: setattr(_place(d), "relative_path", 3)), ".metadata is not a checkpoint's metadata"),
    "negative offset": (_edit(lambda d: setattr(_place(d), "offset", -9)), ".metadata is not a checkpoint's metadata"),
    "petabytes": (_edit(_bigger), "claims 4503599627370496 bytes"),
    "entry of another tensor": (_edit(_other), "(model.model.norm.weight) has shape (64, 16)"),
    "the same piece twice": (_edit(_overlap), "overlap"),
    "piece left out": (_edit(lambda d: d.state_dict_metadata["model.model.norm.weight"].chunks.clear()), "0 of its 16"),
    "outside": (
        _edit(lambda d: setattr(d.state_dict_metadata["model.model.norm.weight"], "size", torch.Size([4]))),
        "outside its shape",
    ),
    "entry not stored": (_edit(lambda d: d.storage_data.clear()), "does not say where"),
    "compressed": (_edit(lambda d: setattr(_place(d), "transform_descriptors", ["stream.zstd/1"])), "stored compressed"),
    # The three that take memory or forever in Python's own C unpickler or a plain one.
    "memo of 32 GiB": (_write(b"\x80\x04Nr" + struct.pack("<I", 2**31) + b"."), ".metadata is a damaged pickle"),
    "bytearray of 1 TiB": (_write(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."), "damaged pickle (ValueError)"),
    "key that is never hashed": (_write(_NESTED_KEY), "damaged pickle (ValueError)"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case: str, nested: Path, trained: SimpleNamespace) -> None:
    damage, said = DAMAGE[case]
    damage(nested)
    assert said in _one_line(
        [str(nested), "--data", str(trained.root / "ids.npy"), "--tokens", "64", "--sequence-length", "16"]
    )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_that_would_run_code_is_not_run(protocol: int, nested: Path, tmp_path: Path) -> None:
    fired, data = tmp_path / "fired", {}
    data["whole"] = pickle.dumps(Evil(fired), protocol=protocol)
    document = pickle.loads((nested / ".metadata").read_bytes())
    document.planner_data["model.model.norm.weight"] = Evil(fired)
    data["inside"] = pickle.dumps(document, protocol=max(2, protocol))
    for content in data.values():
        (nested / ".metadata").write_bytes(content)
        line = _one_line([str(nested)])
        assert "posix.system" in line or "system" in line
        assert not fired.exists()
    pickle.loads(data["whole"])
    assert fired.exists(), "the sample is no live pickle"


def test_metadata_may_name_no_other_class(nested: Path) -> None:
    for target in (os.path.join, torch.compile, torch.nn.Linear, pickle.loads):
        (nested / ".metadata").write_bytes(pickle.dumps(target))
        with pytest.raises(InputError, match="nothing in it was run"):
            open_checkpoint(nested)


def test_a_hyperparameter_that_would_run_code_is_not_run(trained: SimpleNamespace, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    state = get_optimizer_state_dict(trained.model, trained.optimizer)
    state["param_groups"][1]["lr"] = Evil(fired)
    dcp.save({"model": get_model_state_dict(trained.model), "optim": state}, checkpoint_id=tmp_path / "step-3")
    checkpoint = open_checkpoint(tmp_path / "step-3", Architecture("ours", build))
    assert checkpoint.optimizer is not None
    for read in (checkpoint.optimizer.summary, lambda: checkpoint.optimizer.view(checkpoint.model())):
        with pytest.raises(InputError, match=r"posix\.system"):
            read()
    assert not fired.exists()


def test_two_optimizers_and_two_models_are_not_guessed_between(trained: SimpleNamespace, tmp_path: Path) -> None:
    weights, state = get_model_state_dict(trained.model), get_optimizer_state_dict(trained.model, trained.optimizer)
    dcp.save({"model": weights, "optim": state, "second": state}, checkpoint_id=tmp_path / "a")
    with pytest.raises(InputError, match="2 optimizers"):
        open_checkpoint(tmp_path / "a")
    dcp.save({"teacher": weights, "student": weights}, checkpoint_id=tmp_path / "b")
    with pytest.raises(InputError, match="several places"):
        open_checkpoint(tmp_path / "b")


# Several ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "fsdp"
    path.mkdir()
    launch(write, path)
    return path


@pytest.mark.parametrize("layout", ["nested", "torchtitan", "FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_two_ranks_are_the_gathered_state(layout: str, ranks: Path) -> None:
    gathered = torch.load(ranks / "gathered.pt", weights_only=True)
    checkpoint = open_checkpoint(ranks / layout, Architecture("ours", build))
    expected = build()
    expected.load_state_dict(gathered["model"])
    model = checkpoint.model()
    same_weights(model, expected)
    assert checkpoint.optimizer is not None
    names = {n: n for n, _ in model.named_parameters()}
    same_view(checkpoint.optimizer.view(model), map_named(gathered["optimizer"], model, names, path="gathered"))
    if layout != "FULL_STATE_DICT":
        assert checkpoint.step == STEPS


def test_pieces_that_ranks_cannot_halve(ranks: Path) -> None:
    entries = read_metadata(ranks / "odd")
    assert {entry.key: len(entry.chunks) for entry in entries} == {
        "body.weight": 2, "body.bias": 2, "head.weight": 1, "head.bias": 1
    }  # fmt: skip
    expected = Odd().state_dict()
    assert {entry.key for entry in entries} == set(expected)
    for entry in entries:
        assert torch.equal(entry.read(), expected[entry.key])


def test_a_rank_that_was_not_copied(ranks: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(ranks / "SHARDED_STATE_DICT", tmp_path / "checkpoint-3")
    (copy / "optimizer_0" / "__1_0.distcp").unlink()
    with pytest.raises(InputError, match=r"__1_0\.distcp is named in \.metadata and missing"):
        open_checkpoint(copy)
    (copy / "pytorch_model_fsdp_0" / ".metadata").unlink()
    with pytest.raises(InputError, match="did not finish"):
        open_checkpoint(copy)


def test_pieces_by_rank_are_refused_with_the_remedy(ranks: Path, tmp_path: Path) -> None:
    assert sorted(p.name for p in (ranks / "per rank").glob("*model*")) == [
        "pytorch_model_fsdp_0_rank0.bin",
        "pytorch_model_fsdp_0_rank1.bin",
    ]
    with pytest.raises(InputError, match=r"pytorch_model_fsdp_0_rank0\.bin.*FULL_STATE_DICT"):
        open_checkpoint(ranks / "per rank")
    mixed = shutil.copytree(ranks / "SHARDED_STATE_DICT", tmp_path / "mixed")
    shutil.rmtree(mixed / "optimizer_0")
    assert open_checkpoint(mixed).optimizer is None
    shutil.copy(ranks / "per rank" / "optimizer_0_rank0.bin", mixed)
    with pytest.raises(InputError, match=r"optimizer_0_rank0\.bin.*FULL_STATE_DICT"):
        open_checkpoint(mixed)


def _trainer(rank: int, path: Path) -> None:
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        arguments = TrainingArguments(
            output_dir=str(path / kind), max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
            learning_rate=1e-2, warmup_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            fsdp="full_shard", fsdp_config={"version": 2, "fsdp_version": 2, "state_dict_type": kind, **wrap},
        )  # fmt: skip
        # accelerate keeps FSDP to accelerators. Everything behind this one question works on gloo too.
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        trainer = Trainer(model=build(), args=arguments, train_dataset=data)
        trainer.train()
        assert trainer.is_fsdp_enabled


@pytest.mark.slow
def test_trainer_under_fsdp(tmp_path: Path) -> None:
    launch(_trainer, tmp_path)
    full = open_checkpoint(tmp_path / "FULL_STATE_DICT")
    sharded = open_checkpoint(tmp_path / "SHARDED_STATE_DICT", Architecture("ours", build))
    assert (full.format, sharded.format) == ("fsdp-full", "fsdp-sharded")
    assert full.step == sharded.step == 4
    assert full.path.name == sharded.path.name == "checkpoint-4"
    assert full.last_lr == sharded.last_lr == pytest.approx(1e-2 / 3)
    model = full.model()
    same_weights(sharded.model(), model)
    same_weights(LlamaForCausalLM.from_pretrained(full.path), model)
    assert full.optimizer is not None
    assert sharded.optimizer is not None
    same_view(sharded.optimizer.view(model), full.optimizer.view(model))
    # The Trainer writes no config.json beside sharded weights: the network is named, or lies above.
    assert not list(sharded.path.rglob("config.json"))
    (tmp_path / "SHARDED_STATE_DICT" / "config.json").write_text(json.dumps(config().to_dict()))
    same_weights(open_checkpoint(sharded.path).model(), model)


@pytest.mark.parametrize("name", [name for name in RANKED if name.startswith("FSDP")])
def test_damaged_at_random(name: str, ranks: Path, tmp_path: Path) -> None:
    """One of each damage; test_fuzz.py does many."""
    root = ranks.parent
    assert read_everything(master("checkpoint", name, root), name).word == "read"
    for kind in range(len(damages(name))):
        damaged_checkpoint(name, kind, kind, root, tmp_path / "copy")
