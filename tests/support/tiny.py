"""The Llama that tests train for three steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

STEPS = 3


def config(*, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, bos_token_id=None,
        max_position_embeddings=32, eos_token_id=None, tie_word_embeddings=tied, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def build(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config(tied=tied))


def run_of(place: Path, *steps: int) -> Path:
    """A Trainer's run with checkpoints at these steps, its data and a curv.toml: measured sooner than a sample."""
    tokens = np.random.default_rng(0).integers(0, 64, 4000) & np.random.default_rng(1).integers(0, 64, 4000)
    (place / "data").mkdir(parents=True)
    tokens.astype("<u2").tofile(place / "data" / "shard.bin")
    (place / "curv.toml").write_text('data = "data/shard.bin"\nsequence-length = 16\n')
    model = build()
    plain, norms = ([p for n, p in model.named_parameters() if ("norm" in n) is norm] for norm in (False, True))
    groups: list[dict[str, Any]] = [{"params": plain}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    log: list[dict[str, float]] = []
    for step in range(1, max(steps) + 1):
        ids = torch.from_numpy(tokens[68 * step % 3900 :][:68]).view(4, 17)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "loss": loss.item(), "learning_rate": 1e-3})
        if step in steps:
            checkpoint = place / "run" / f"checkpoint-{step}"
            model.save_pretrained(checkpoint)
            torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    return place / "run"
