"""Checkpoints that torch.distributed.checkpoint and accelerate write, on one rank or on two gloo ranks under FSDP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from ranks import EARLIER
from tiny import STEPS, build, config
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict


def train(model: nn.Module, after: Callable[[int, torch.optim.AdamW], None] | None = None) -> torch.optim.AdamW:
    """Three steps; matrices decay, vectors do not, as the Trainer groups them. `after` is called behind each."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(STEPS):
        ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(step + 1, optimizer)
    return optimizer


def save(model: nn.Module, optimizer: torch.optim.Optimizer, layout: str, path: Path) -> Path:
    weights, flat = get_model_state_dict(model), StateDictOptions(flatten_optimizer_state_dict=True)
    match layout:
        case "nested":
            document: dict[str, Any] = {"model": weights, "optim": get_optimizer_state_dict(model, optimizer)}
        case "flattened":
            document = {**weights, **get_optimizer_state_dict(model, optimizer, options=flat), "step": torch.tensor(STEPS)}
        case "torchtitan":
            document = {
                **weights,
                "optimizer": get_optimizer_state_dict(model, optimizer, options=flat),
                "lr_scheduler": {"last_epoch": STEPS, "base_lrs": [1e-2]},
                "train_state": {"step": torch.tensor(STEPS, dtype=torch.int32), "ntokens_seen": torch.tensor(192)},
            }
        case "by position":
            document = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        case "inside an application":
            inner = {"model": weights, "optim": get_optimizer_state_dict(model, optimizer)}
            document = {"app": inner, "ema": weights, "epoch": 2}
    dcp.save(document, checkpoint_id=path)
    config().save_pretrained(path)
    return path


class Odd(nn.Module):
    """Sizes that two ranks cannot halve: one of them has nothing of the vector of one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(5, 3)
        self.head = nn.Linear(3, 1)


def plugin(kind: str) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind, reshard_after_forward=True)


def write(rank: int, path: Path) -> None:
    from accelerate.state import PartialState
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.fsdp import fully_shard

    def shard(model: nn.Module, parts: list[nn.Module]) -> nn.Module:
        for part in (*parts, model):
            fully_shard(part)
        return model

    odd = shard(Odd(), [])
    dcp.save(odd.state_dict(), checkpoint_id=path / "odd")
    model = build()
    shard(model, list(model.model.layers))
    ranks = SimpleNamespace(process_index=rank, num_processes=2)
    PartialState(cpu=True)  # accelerate's logger asks for it

    def keep(step: int, optimizer: torch.optim.AdamW) -> None:
        if step < STEPS - 1:
            return
        for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            place = path / (kind if step == STEPS else kind + EARLIER)
            save_fsdp_model(plugin(kind), ranks, model, place)
            save_fsdp_optimizer(plugin(kind), ranks, optimizer, model, place)

    optimizer = train(model, keep)
    save(model, optimizer, "nested", path / "nested" / "step-3")
    save(model, optimizer, "torchtitan", path / "torchtitan" / "step-3")
    per_rank = path / "per rank"
    save_fsdp_model(plugin("SHARDED_STATE_DICT"), ranks, model, per_rank, use_dcp=False)
    save_fsdp_optimizer(plugin("SHARDED_STATE_DICT"), ranks, optimizer, model, per_rank, use_dcp=False)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = {
        "model": get_model_state_dict(model, options=whole),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=whole),
    }
    if rank == 0:
        torch.save(gathered, path / "gathered.pt")
