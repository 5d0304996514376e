"""A locked block is exactly the identity on every architecture, and comes alive when it joins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from curvcli.curvature.problem import Blocks
from curvcli.errors import UnsupportedError
from curvcli.models.blocks import find_blocks
from curvcli.training.gates import Gate
from curvcli.training.locks import find_locks

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
EXPERTS = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "gpt2": ("GPT2", GPT2),
    "qwen2": ("Qwen2", SMALL),  # biases on q, k, v
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 8}),
    "mistral": ("Mistral", SMALL),
    "phi3": ("Phi3", SMALL),
    "olmo2": ("Olmo2", SMALL),  # norms behind the projections
    "gemma2": ("Gemma2", {**SMALL, "head_dim": 8}),  # and gains that are 1 + weight
    "gemma3": ("Gemma3", {**SMALL, "head_dim": 8}),
    "mixtral": ("Mixtral", EXPERTS),
    "qwen3_moe": (
        "Qwen3Moe",
        {**SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt_neox": ("GPTNeoX", SMALL),  # parallel attention and MLP
    "falcon": ("Falcon", {k: v for k, v in SMALL.items() if k != "intermediate_size"}),
    "bloom": ("Bloom", {"vocab_size": 61, "hidden_size": 16, "n_layer": 3, "n_head": 2}),
    "opt": ("OPT", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "mamba": ("Mamba", {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}),
}
NAMES = {"gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "gpt2": ("GPT2Config", "GPT2LMHeadModel")}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    stem, options = ARCHITECTURES[name]
    config_name, model_name = NAMES.get(name, (f"{stem}Config", f"{stem}ForCausalLM"))
    config = getattr(transformers, config_name)(**options)
    model = getattr(transformers, model_name)._from_config(config, attn_implementation="eager") if name != "mamba" else None
    model = model or getattr(transformers, model_name)(config)
    return model.train()


IDS = torch.arange(2 * 12).reshape(2, 12) % 61


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def blocks_of(model: nn.Module) -> Blocks:
    blocks = find_blocks(model)
    assert blocks is not None
    return blocks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_locked_is_bit_equal_to_the_shallow_model(name: str) -> None:
    model = build(name).eval()
    blocks = blocks_of(model)
    locks = find_locks(blocks)
    norms = {n: p.clone() for n, p in model.named_parameters() if p.dim() == 1}
    for lock in locks[1:]:
        lock.close()
    with torch.no_grad():
        deep = logits(model)
        with blocks.truncated(1):
            shallow = logits(model)
    assert torch.equal(deep, shallow)
    at_rest = {id(p) for lock in locks for _, p, _ in lock.resting}
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in norms and id(parameter) not in at_rest:
            assert torch.equal(parameter, norms[parameter_name])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gate_that_is_shut_leaves_the_block_out_and_an_open_one_changes_nothing(name: str) -> None:
    model = build(name).eval()
    blocks = blocks_of(model)
    gates = [Gate(i, block) for i, block in enumerate(blocks.modules) if i]
    with torch.no_grad():
        for gate in gates:
            gate.set(0.0)
        shut = logits(model)
        for gate in gates:
            gate.set(1.0)
        wide = logits(model)
        for gate in gates:
            gate.set(0.5)
        half = logits(model)
        for gate in gates:
            gate.remove()
        whole = logits(model)
        with blocks.truncated(1):
            shallow = logits(model)
    assert torch.equal(shut, shallow)
    assert torch.equal(wide, whole)
    assert not torch.equal(half, whole)
    assert not torch.equal(shut, whole)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_that_joins_comes_alive(name: str) -> None:
    """Three SGD steps after the unlock every output has moved and the gradient has come through."""
    model = build(name)
    lock = find_locks(blocks_of(model))[1]
    lock.close()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(model).flatten(0, 1), IDS.flatten()).backward()
        # Nothing explodes at the unlock: the lock's Jacobian was the identity.
        norms = [float(p.grad.norm()) for p in lock.parameters.values() if p.grad is not None]
        assert max(norms) < 100, (step, norms)
        optimizer.step()
    assert lock.moved()
    inner = [p for n, p in lock.parameters.items() if p.dim() >= 2 and n not in {r for r, _, _ in lock.resting}]
    assert all(p.grad is not None and bool(p.grad.any()) for p in inner if p.dim() == 2)


def test_post_norm_blocks_rest_at_the_gain_that_gives_zero() -> None:
    for name, value in (("olmo2", 0.0), ("gemma2", -1.0)):
        for lock in find_locks(blocks_of(build(name))):
            assert {n.split(".")[0] for n, _, _ in lock.resting} == {
                "post_attention_layernorm",
                "post_feedforward_layernorm",
            }
            assert {v for _, _, v in lock.resting} == {value}


def test_zero_projections_under_a_post_norm_would_explode() -> None:
    """The trap behind the rule: RMSNorm at 0 has a derivative of weight / sqrt(eps)."""
    grown = {}
    for wrong in (False, True):
        model = build("olmo2")
        blocks = blocks_of(model)
        outputs = ["self_attn.o_proj", "mlp.down_proj"] if wrong else None
        lock = find_locks(blocks, outputs)[1]
        lock.close()
        nn.functional.cross_entropy(logits(model).flatten(0, 1), IDS.flatten()).backward()
        grown[wrong] = max(float(p.grad.norm()) for _, p, _ in lock.resting if p.grad is not None)
    assert grown[True] > 30 * grown[False]


def test_unknown_blocks_are_refused_until_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.leaving = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.leaving(torch.tanh(self.inside(x)))

    model = nn.Sequential(nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(2))}))
    blocks = blocks_of(model)
    with pytest.raises(UnsupportedError, match="no output projection is known in block 0"):
        find_locks(blocks)
    with pytest.raises(UnsupportedError, match="no parameter under 'exit'"):
        find_locks(blocks, ["exit"])
    locks = find_locks(blocks, ["leaving"])
    locks[0].close()
    x = torch.randn(3, 4)
    assert torch.equal(blocks.modules[0](x), x)
    assert not torch.equal(blocks.modules[1](x), x)
    assert locks[1].moved() == ["leaving.weight", "leaving.bias"]
