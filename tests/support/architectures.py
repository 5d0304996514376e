"""Tiny models of every architecture that is claimed to work, their batches, and their stacks of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as tf
from torch import Tensor, nn

Task = Literal["causal-lm", "masked-lm", "seq2seq", "classification"]
VOCABULARY, LENGTH = 19, 7
_SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
_DEEP = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
_NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_TEXT = {**_SIZES, **_DEEP, **_NONE}
_MOE = {**_TEXT, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Case:
    """An architecture: what builds it, its task, where its layers are; `forward` is whether forward mode works on it."""

    model: type[Any]
    config: type[Any]
    options: dict[str, Any]
    layers: str
    count: int = 2
    task: Task = "causal-lm"
    forward: bool = True

    def build(self, **changes: Any) -> nn.Module:
        """As a user would: no implementation of attention or experts is asked for, and weights are larger than at birth."""
        torch.manual_seed(0)
        model = self.model(self.config(**{**self.options, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
        return model.eval()  # type: ignore[no-any-return]

    def batch(self, rows: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> Any:
        """A batch as the task makes them: windows of ids, or columns."""
        draw = torch.Generator().manual_seed(seed)

        def ids(*shape: int) -> Tensor:
            return torch.randint(1, VOCABULARY, shape, generator=draw)

        if self.task == "causal-lm":
            return ids(rows, LENGTH + 1)
        if self.task == "masked-lm":
            labels = torch.where(torch.rand(rows, LENGTH, generator=draw) < 0.4, ids(rows, LENGTH), -100)
            labels[:, 0] = 3
            return {"input_ids": torch.where(labels == -100, ids(rows, LENGTH), 2), "labels": labels}
        if self.task == "seq2seq":
            return {"input_ids": ids(rows, LENGTH), "decoder_input_ids": ids(rows, 5), "labels": ids(rows, 5)}
        pixels = torch.randn(rows, 3, 8, 8, generator=draw).to(dtype)
        return {"pixel_values": pixels, "labels": torch.randint(3, (rows,), generator=draw)}


def _case(
    kind: str, layers: str, options: dict[str, Any], *, head: str = "ForCausalLM", config: str = "", **more: Any
) -> Case:
    return Case(getattr(tf, f"{kind}{head}"), getattr(tf, config or f"{kind}Config"), options, layers, **more)


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Casts to float32 inside a model (softmax, RMSNorm, rotary angles) go to float64 within.

    Without it a model in float64 is good to 1e-7, and differences of its gradients to 1e-3. With it differences can be
    so short that no ReLU and no router flips between their two ends.
    """
    kept = torch.float32, torch.float, Tensor.float
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32, torch.float, Tensor.float = kept  # type: ignore[misc, method-assign]


_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, **_NONE}
_BERT = {**_SIZES, **_DEEP}
CASES: dict[str, Callable[[], Case]] = {
    "llama": lambda: _case("Llama", "model.layers", _TEXT),
    "llama tied": lambda: _case("Llama", "model.layers", {**_TEXT, "tie_word_embeddings": True}),
    "qwen2": lambda: _case("Qwen2", "model.layers", {**_MOE, "layer_types": ["full_attention"] * 2}),
    "qwen3": lambda: _case("Qwen3", "model.layers", {**_MOE, "head_dim": 4}),
    "mistral": lambda: _case("Mistral", "model.layers", {**_MOE, "sliding_window": 4}),
    "olmo2": lambda: _case("Olmo2", "model.layers", _TEXT),
    "phi3": lambda: _case("Phi3", "model.layers", _TEXT),
    "gemma2": lambda: _case(
        "Gemma2", "model.layers", {**_MOE, "head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4}
    ),
    "gemma3": lambda: _case(
        "Gemma3",
        "model.layers",
        {
            **_MOE,
            "head_dim": 4,
            "sliding_window": 4,
            "query_pre_attn_scalar": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        config="Gemma3TextConfig",
    ),
    "gpt2": lambda: _case("GPT2", "transformer.h", _GPT2, head="LMHeadModel"),
    "gpt_neox": lambda: _case("GPTNeoX", "gpt_neox.layers", _TEXT),
    "bert": lambda: _case("Bert", "bert.encoder.layer", _BERT, head="ForMaskedLM", task="masked-lm"),
    "albert": lambda: _case(
        "Albert",
        "albert.encoder.albert_layer_groups",
        {**_BERT, "embedding_size": 6, "num_hidden_layers": 3},
        head="ForMaskedLM",
        task="masked-lm",
        count=1,
    ),
    "modernbert": lambda: _case(
        "ModernBert",
        "model.layers",
        {
            **_TEXT,
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 1,
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
        },
        head="ForMaskedLM",
        task="masked-lm",
    ),
    "vit": lambda: _case(
        "ViT",
        "vit.layers",
        {**_DEEP, "image_size": 8, "patch_size": 4, "num_labels": 3},
        head="ForImageClassification",
        task="classification",
    ),
    "falcon": lambda: _case(
        "Falcon",
        "transformer.h",
        {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, **_NONE},
    ),
    "opt": lambda: _case(
        "OPT",
        "model.decoder.layers",
        {
            **_SIZES,
            "hidden_size": 8,
            "ffn_dim": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 8,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "t5": lambda: _case(
        "T5",
        "decoder.block",
        {
            "vocab_size": VOCABULARY,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        head="ForConditionalGeneration",
        task="seq2seq",
    ),
    "mamba": lambda: _case(
        "Mamba",
        "backbone.layers",
        {"vocab_size": VOCABULARY, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 2, **_NONE},
    ),
    "bloom": lambda: _case(
        "Bloom",
        "transformer.h",
        {"vocab_size": VOCABULARY, "hidden_size": 8, "n_layer": 2, "n_head": 2, **_NONE},
        forward=False,
    ),
    "mixtral": lambda: _case("Mixtral", "model.layers", {**_MOE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": lambda: _case(
        "Qwen2Moe",
        "model.layers",
        {
            **_MOE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    ),
    "qwen3_moe": lambda: _case(
        "Qwen3Moe",
        "model.layers",
        {**_MOE, "head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
}
