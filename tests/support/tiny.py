"""The Llama that tests train for three steps."""

from __future__ import annotations

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
