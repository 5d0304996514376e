"""A small training job with architecture warm-up, in a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from schedules import schedule
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from curvcli.documents import Schedule
from curvcli.training import ArchitectureWarmup

DEPTH, TOTAL = 4, 12
GROW = schedule(DEPTH, (0, [0, 1]), (4, [0, 1, 2]), (8, range(DEPTH)))
FREEZE = schedule(DEPTH, (0, [0, 1]), (4, [0, 1, 2]), (8, range(DEPTH)), mode="freeze")


def build(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=DEPTH, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(step: int, rows: int = 4) -> Tensor:
    return torch.randint(37, (rows, 12), generator=torch.Generator().manual_seed(step))


class Job:
    """A training job as a user writes it: AdamW, LambdaLR, clipping, checkpoints."""

    def __init__(self, plan: Schedule | Path | str = GROW, *, model: nn.Module | None = None, **adam: Any) -> None:
        self.model = build() if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1, **adam)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: min(1.0, (s + 1) / 4) * 0.98**s)
        self.warmup = ArchitectureWarmup(self.model, self.optimizer, plan)
        self.norms: list[float] = []

    def run(self, steps: Iterable[int], micro_batches: int = 1) -> Job:
        for step in steps:
            self.warmup.step(step)
            for ids in batch(step, 4 * micro_batches).chunk(micro_batches):
                (self.model(input_ids=ids, labels=ids).loss / micro_batches).backward()
            self.norms.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self

    def save(self, path: Path) -> None:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)

    def load(self, path: Path) -> Job:
        for name, state in torch.load(path, weights_only=True).items():
            getattr(self, name).load_state_dict(state)
        return self


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every weight and every tensor of optimizer state, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}: {key}"] = value.clone()
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def block_of(name: str) -> int | None:
    return int(name.split(".")[2]) if ".layers." in name else None


class Text(torch.utils.data.Dataset):
    """Seeded tokens, so that position n of the epoch is the same in every process."""

    def __len__(self) -> int:
        return 128

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(37, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}
