"""Checkpoints that Lightning writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from tiny import build
from torch import Tensor, nn
from torch.utils.data import DataLoader


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]


class Lit(lightning.LightningModule):
    def __init__(self, arguments: Any = None, named: bool = False, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["extra"])
        self.net = build()
        if extra is not None:
            self.extra = extra

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        return self.net(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.hparams["named"]:
            return torch.optim.AdamW(list(self.named_parameters())[::-1], lr=1e-2)
        return torch.optim.AdamW(grouped(self), lr=1e-2)


def fit(module: Lit, path: Path) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=path.parent, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randint(64, (8, 16)), batch_size=4))  # type: ignore[arg-type]
    trainer.save_checkpoint(path)
    return trainer
