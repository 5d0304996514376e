"""Small real runs that end well, wrecked or collapsed: 150 steps on a chain of tokens, saved as a Trainer saves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

SEQUENCE, ROWS, TOKENS = 32, 8, 64


def prenorm(width: int = 16, layers: int = 2) -> PreTrainedModel:
    """A Llama."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
            architectures=["LlamaForCausalLM"],
        )
    )  # fmt: skip


def postnorm(width: int = 16, layers: int = 4) -> PreTrainedModel:
    """An OPT whose norms stand after the sums, as in the original Transformer."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=TOKENS, hidden_size=width, ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=width, do_layer_norm_before=False, dropout=0.0,
            bos_token_id=None, eos_token_id=None, pad_token_id=None, architectures=["OPTForCausalLM"],
        )
    )  # fmt: skip


def chain(length: int = 60_000) -> np.ndarray:
    """Tokens each of which follows from the one before nine times in ten: about 0.9 nats with context, 4.1 without."""
    random = np.random.default_rng(0)
    jumps, luck = random.integers(0, TOKENS, length), random.random(length)
    found = np.zeros(length, dtype=np.int64)
    for i in range(1, length):
        found[i] = (5 * found[i - 1] + 7) % TOKENS if luck[i] < 0.9 else jumps[i]
    return found


def train(place: Path, model: PreTrainedModel, rate: Callable[[int], float], *, steps: int, save: Sequence[int]) -> Path:
    """Train with AdamW at `rate(steps taken)`, and save at some; returns the run's directory."""
    text = chain()
    (place / "data").mkdir(parents=True, exist_ok=True)
    text[:4096].astype("<u2").tofile(place / "data" / "shard.bin")
    (place / "curv.toml").write_text(f'data = "data/shard.bin"\nsequence-length = {SEQUENCE}\n')
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate(0), betas=(0.9, 0.99), weight_decay=0.0)
    stream = torch.from_numpy(text)
    log: list[dict[str, float]] = []
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step - 1)
        starts = torch.randint(len(stream) - SEQUENCE - 1, (ROWS,), generator=generator)
        ids = torch.stack([stream[start : start + SEQUENCE + 1] for start in starts])
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append({"step": step, "loss": loss.item(), "learning_rate": rate(step - 1)})
        if step in save:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            checkpoint = place / "run" / f"checkpoint-{step}"
            model.save_pretrained(checkpoint)
            torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    return place / "run"


def cosine(lr: float, warmup: int, steps: int) -> Callable[[int], float]:
    """Rising over the warm-up, and falling to 0 as a cosine."""

    def rate(step: int) -> float:
        if step < warmup:
            return lr * step / warmup
        return lr * 0.5 * (1 + cos(pi * (step - warmup) / (steps - warmup)))

    return rate


def wrecking(sane: float, lr: float, at: int, steps: int) -> Callable[[int], float]:
    """A sane rate up to a step, and there a cosine that begins far too high and ends at 0."""
    late = cosine(lr, 5, steps - at)
    return lambda step: sane * min(1.0, step / 10) if step < at else late(step - at)
