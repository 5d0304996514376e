"""Directories that Lightning writes under FSDPStrategy and DeepSpeedStrategy, on two gloo ranks, for test_lightning.

Lightning keeps both strategies to GPUs. What is replaced here is that check and the device; what trains, gathers and
writes is Lightning's, torch's and DeepSpeed's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning
import torch
from fsdp1_runs import layers, on_the_cpu
from tiny import STEPS, build
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Lit(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": 1e-2})
        self.net = build()

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        return self.net(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Two groups that take turns in the model's order."""
        groups = [[p for n, p in self.named_parameters() if ("norm" in n) is norm] for norm in (False, True)]
        return torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-2)  # type: ignore[arg-type]


def fit(strategy: Any, path: Path) -> lightning.Trainer:
    """A run of three steps, saved."""
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=path.parent, enable_checkpointing=False,
    )  # fmt: skip
    ids = torch.randint(64, (16, 16), generator=torch.Generator().manual_seed(0))
    trainer.fit(Lit(), DataLoader(ids, batch_size=2))  # type: ignore[arg-type]
    trainer.save_checkpoint(path)
    return trainer


def write_fsdp(rank: int, path: Path) -> None:
    from lightning.pytorch.strategies import FSDPStrategy
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Strategy(FSDPStrategy):
        def _setup_model(self, model: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(
                model, device_id=torch.device("cpu"), cpu_offload=self.cpu_offload,
                mixed_precision=self.mixed_precision_config, sharding_strategy=self.sharding_strategy, **self.kwargs,
            )  # fmt: skip

    os.environ["NODE_RANK"] = "0"
    on_the_cpu()
    for kind in ("full", "sharded"):
        strategy = Strategy(state_dict_type=kind, auto_wrap_policy=layers(), process_group_backend="gloo")
        trainer = fit(strategy, path / kind / "epoch=0-step=3.ckpt")
    # Of the second run, which is the first one again.
    whole = FullyShardedDataParallel.full_optim_state_dict(trainer.strategy.model, trainer.optimizers[0])
    if rank == 0:
        torch.save(whole, path / "live.pt")


def write_deepspeed(rank: int, path: Path) -> None:
    from deepspeed_runs import prepared
    from lightning.pytorch.strategies import DeepSpeedStrategy

    prepared()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    class Strategy(DeepSpeedStrategy):
        root_device = torch.device("cpu", 0)

        def setup_environment(self) -> None:
            self.accelerator.setup_device(self.root_device)
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    os.environ["NODE_RANK"] = "0"
    for stage in (2, 3):
        settings = {
            "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        home = path / f"stage{stage}"
        trainer = fit(Strategy(config=settings), home / "epoch=0-step=3.ckpt")
        if stage == 2:  # as in deepspeed_runs
            trainer.optimizers[0]._hp_optimizer_states_linked = False  # type: ignore[attr-defined]
            trainer.optimizers[0]._lazy_init_hp_params_optimizer_state()  # type: ignore[attr-defined]
        live = {
            name.removeprefix("net."): {"fp32": safe_get_full_fp32_param(p).clone()}
            | {key: safe_get_full_optimizer_state(p, key).clone() for key in ("exp_avg", "exp_avg_sq")}
            for name, p in trainer.lightning_module.named_parameters()
        }
        if rank == 0:
            torch.save(live, home / "live.pt")
