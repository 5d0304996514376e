"""What weights are for, on networks of transformers as they are built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from curvcli.curvature.problem import Problem
from curvcli.models.roles import Roles
from curvcli.models.rows import row_kinds

SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def _roles(model: nn.Module) -> Roles:
    problem = Problem.create(model.eval(), lambda m, b: m(b).logits.sum(), [torch.randint(32, (2, 6))])
    return Roles(model, row_kinds(problem))


def _kinds(model: nn.Module) -> dict[str, str]:
    roles = _roles(model)
    return {name: roles.kind(name, p) for name, p in model.named_parameters()}


def _llama(**more: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, **more}))


def test_llama() -> None:
    kinds = _kinds(_llama())
    last = {name.split(".")[-2]: kind for name, kind in kinds.items()}
    assert last == {
        "embed_tokens": "embedding", "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate",
        "up_proj": "up", "down_proj": "down", "input_layernorm": "norm", "post_attention_layernorm": "norm", "norm": "norm",
        "lm_head": "head",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=4, n_positions=16)),
            {
                "wte.weight": "embedding (tied to the head)", "wpe.weight": "positions", "attn.c_attn.weight": "attention",
                "attn.c_proj.weight": "o", "mlp.c_fc.weight": "up", "mlp.c_proj.bias": "down", "ln_f.weight": "norm",
            },
        ),
        (
            lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
            {
                "attention.self.query.weight": "q", "attention.self.key.bias": "k", "attention.self.value.weight": "v",
                "attention.output.dense.weight": "o", "intermediate.dense.weight": "up", "0.output.dense.weight": "down",
                "attention.output.LayerNorm.bias": "norm", "position_embeddings.weight": "positions",
                "predictions.transform.dense.weight": "other",
            },
        ),
        (
            lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)),
            {
                "attention.query_key_value.weight": "qkv", "attention.dense.weight": "o", "dense_h_to_4h.weight": "up",
                "dense_4h_to_h.bias": "down",
            },
        ),
        (
            lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)),
            {"experts.gate_up_proj": "gate, up", "experts.down_proj": "down", "self_attn.k_proj.weight": "k"},
        ),
        (
            lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
            {"q_norm.weight": "norm", "q_proj.weight": "q"},
        ),
    ],
)  # fmt: skip
def test_other_networks(build: Any, wanted: dict[str, str]) -> None:
    kinds = _kinds(build())
    for end, kind in wanted.items():
        found = {k for name, k in kinds.items() if name.endswith(end)}
        assert found == {kind}, end


def _squares(p: Tensor) -> Tensor:
    return torch.rand(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_heads_of_queries_and_of_keys_where_there_are_fewer() -> None:
    model = _llama(num_key_value_heads=2)
    roles, named = _roles(model), dict(model.named_parameters())

    def share(name: str) -> tuple[Any, Tensor]:
        full = f"model.layers.0.self_attn.{name}.weight"
        squares = _squares(named[full])
        (found,) = roles.shares(full, named[full], squares)
        assert found.mass == pytest.approx(float(squares.sum()))
        return found, squares

    q, squares = share("q_proj")
    assert q.heads == pytest.approx([float(squares[4 * h : 4 * h + 4].sum()) for h in range(4)])
    k, squares = share("k_proj")
    assert k.heads == pytest.approx([float(squares[4 * h : 4 * h + 4].sum()) for h in range(2)])
    o, squares = share("o_proj")
    assert o.heads == pytest.approx([float(squares[:, 4 * h : 4 * h + 4].sum()) for h in range(4)])
    assert (q.heads_of, k.heads_of, o.heads_of) == ("query", "key-value", "query")
    name = "model.layers.0.mlp.up_proj.weight"
    assert roles.shares(name, named[name], _squares(named[name]))[0].heads is None


def test_fused_queries_keys_and_values_in_turn() -> None:
    """GPT-2 keeps (inputs, outputs), the thirds side by side."""
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=4, n_positions=16))
    roles, name = _roles(model), "transformer.h.0.attn.c_attn.weight"
    weight = dict(model.named_parameters())[name]
    squares = _squares(weight)
    found = roles.shares(name, weight, squares)
    assert [part.kind for part in found] == ["q", "k", "v"]
    assert found[1].heads == pytest.approx([float(squares[:, 16 + 4 * h : 20 + 4 * h].sum()) for h in range(4)])
    bias = dict(model.named_parameters())[name := "transformer.h.0.attn.c_attn.bias"]
    value = roles.shares(name, bias, _squares(bias))[2]
    assert value.heads == pytest.approx([float(_squares(bias)[32 + 4 * h : 36 + 4 * h].sum()) for h in range(4)])
    out = roles.shares("transformer.h.0.attn.c_proj.weight", torch.empty(16, 16), square := _squares(torch.empty(16, 16)))
    assert out[0].heads == pytest.approx([float(square[4 * h : 4 * h + 4].sum()) for h in range(4)])


def test_heads_that_do_not_fit_are_not_made_up() -> None:
    """A low-rank half of an adapter has no heads along the axis of its rank; nor has a matrix of another size."""
    roles = _roles(_llama())
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    (found,) = roles.shares(name, torch.empty(8, 16), torch.ones(8, 16))
    assert (found.kind, found.heads) == ("q", None)
