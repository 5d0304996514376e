"""torch.distributed.checkpoint and FSDP on two ranks, from files that torch, accelerate and the Trainer wrote here."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from damage import damaged_checkpoint, damages, read_everything
from dcp_runs import same_view, same_weights
from formats import RANKED, master
from fsdp_runs import Odd, write
from ranks import launch
from tiny import STEPS, build, config
from transformers import LlamaForCausalLM

from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.formats.dcp_files import read_metadata
from curvcli.checkpoints.state.mapping import map_named
from curvcli.errors import InputError
from curvcli.models.base import Architecture

# Two real ranks write what all of it reads: seconds before the first test.
pytestmark = pytest.mark.slow


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
