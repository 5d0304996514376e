"""Checkpoints of FullyShardedDataParallel (FSDP1) on two gloo ranks without a GPU, for test_fsdp1 and test_lightning."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tiny import STEPS, build
from torch import nn


def on_the_cpu() -> None:
    """Let FSDP1 gather where it already is.

    Gathering "to the CPU", which accelerate and Lightning always ask for, makes a copy on a GPU run. From CPU to CPU torch
    2.13 makes none: of weights it frees the memory that it goes on to read, and dies with SIGSEGV; of moments it gives
    two that lie in one buffer, so that exp_avg comes out as exp_avg_sq.
    """
    from torch.distributed.fsdp import _optim_utils
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    @contextmanager
    def to_cpu(self: FlatParamHandle) -> Iterator[None]:
        yield

    FlatParamHandle.to_cpu = to_cpu  # type: ignore[method-assign]
    gather = _optim_utils._allgather_orig_param_states
    _optim_utils._allgather_orig_param_states = lambda *given: gather(*given[:-1], False)  # type: ignore[call-arg]  # cpu_offload, the last


def layers() -> set[type[nn.Module]]:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return {LlamaDecoderLayer}


def wrapped(*, original: bool) -> Any:
    """The network under FSDP1, whose flat parameters keep their `original` names and shapes or do not."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    device = torch.device("cpu")
    return FullyShardedDataParallel(
        build(), auto_wrap_policy=ModuleWrapPolicy(layers()), device_id=device, use_orig_params=original
    )


def train(model: nn.Module, *, grouped: bool) -> torch.optim.AdamW:
    """Three steps. Norms decay less, by name: under FSDP1 every parameter has one dimension."""
    groups = [{"params": [p for n, p in model.named_parameters() if ("norm" in n) is norm]} for norm in (False, True)]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(groups if grouped else model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for step in range(STEPS):
        ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def plugin(kind: str) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=1, state_dict_type=kind, sync_module_states=False, cpu_ram_efficient_loading=False
    )


def write(rank: int, path: Path) -> None:
    """One rank's part: torch's own saves, and accelerate's."""
    from accelerate.state import PartialState
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    on_the_cpu()
    PartialState(cpu=True)  # accelerate's logger asks for it
    ranks = SimpleNamespace(process_index=rank, num_processes=2)
    for original in (True, False):
        model = wrapped(original=original)
        optimizer = train(model, grouped=original)
        home = path / ("names" if original else "flat")
        for kind in (StateDictType.SHARDED_STATE_DICT, StateDictType.FULL_STATE_DICT):
            with FullyShardedDataParallel.state_dict_type(model, kind):
                moments = FullyShardedDataParallel.optim_state_dict(model, optimizer)
                document = {"model": model.state_dict(), "optim": moments}
            dcp.save(document, checkpoint_id=home / f"dcp-{kind.name}" / "step-3")
        if rank == 0:
            torch.save(document, home / "live.pt")
        for name in ("FULL_STATE_DICT", "SHARDED_STATE_DICT", "LOCAL_STATE_DICT"):
            save_fsdp_model(plugin(name), ranks, model, home / name)
            save_fsdp_optimizer(plugin(name), ranks, optimizer, model, home / name)


def write_trainer(rank: int, path: Path) -> None:
    """One rank's part of two runs of the Trainer."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainingArguments

    on_the_cpu()
    ids = torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        settings = {
            "version": 1, "fsdp_version": 1, "state_dict_type": kind, "sync_module_states": False,
            "cpu_ram_efficient_loading": False, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        }  # fmt: skip
        arguments = TrainingArguments(
            output_dir=str(path / kind), max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
            learning_rate=1e-2, warmup_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            fsdp="full_shard", fsdp_config=settings,
        )  # fmt: skip
        # accelerate keeps FSDP to accelerators, and numbers the CPU as one. Behind these two answers all is its own.
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._shared_state["device"] = torch.device("cpu")
        trainer = Trainer(model=build(), args=arguments, train_dataset=data)
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "FullyShardedDataParallel"
