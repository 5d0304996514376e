"""Logits and entropy of attention, against what networks say themselves and against attention written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

from curvcli.models.attention import Attention, attention
from curvcli.models.blocks import find_blocks

SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def _vit() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=16)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
    "vit": _vit,
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=4)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.05)
    ),
}


def _built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model: Any = NETWORKS[name]()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)  # away from attention that is all but even
    batch = {"pixel_values": torch.randn(3, 3, 8, 8)} if name == "vit" else {"input_ids": torch.randint(32, (3, 7))}
    return model.eval(), batch


@pytest.mark.parametrize("name", NETWORKS)
def test_entropy_is_that_of_the_probabilities_that_the_network_gives(name: str) -> None:
    model, batch = _built(name)
    blocks = find_blocks(model)
    assert blocks is not None
    found = attention(blocks.modules, lambda: model(**batch))
    with torch.no_grad():
        told = model(**batch, output_attentions=True).attentions
    assert len(found) == len(told) == 2
    for one, chances in zip(found, told, strict=True):
        wanted = -(chances * chances.clamp(min=1e-30).log()).sum(-1).mean()
        assert one.entropy == pytest.approx(float(wanted), rel=1e-4)
        # Two logits of a query differ by the log of the ratio of their chances; the largest is half that at least.
        open_ = chances.clamp(min=1e-30).log().masked_fill(chances == 0, torch.nan)
        spread = float((open_.nan_to_num(-torch.inf).amax(-1) - open_.nan_to_num(torch.inf).amin(-1)).max())
        assert one.logit is not None
        assert spread / 2 - 1e-4 <= one.logit < 1e3
    if name == "gemma2":
        assert max(one.logit or 1 for one in found) <= 0.05, "capped, as softmax takes them"


def test_largest_logit_of_gpt2_by_hand() -> None:
    model, batch = _built("gpt2")
    seen: list[Tensor] = []
    for block in model.transformer.h:  # type: ignore[union-attr, operator]
        block.attn.c_attn.register_forward_hook(lambda module, args, out: seen.append(out))
    blocks = find_blocks(model)
    assert blocks is not None
    found = attention(blocks.modules, lambda: model(**batch))
    for one, out in zip(found, seen, strict=True):
        q, k, _ = (part.view(3, 7, 4, 4).transpose(1, 2) for part in out.detach().chunk(3, dim=-1))
        logits = q @ k.mT / 2
        past = torch.ones(7, 7, dtype=torch.bool).tril()
        assert one.logit == pytest.approx(float(logits.abs()[..., past].max()), rel=1e-5)
        assert float(logits.abs()[..., ~past].max()) != one.logit


def test_padding_is_masked_and_a_query_without_keys_does_not_count() -> None:
    one = Attention()
    logits = torch.tensor([[[[2.0, -5.0, -1e4], [1.0, 1.0, -1e9], [torch.finfo(torch.float32).min] * 3]]])
    one.add(logits)
    first = torch.tensor([2.0, -5.0]).softmax(0)
    wanted = float(-(first * first.log()).sum()) + float(torch.tensor(2.0).log())
    assert one.logit == 5
    assert one.queries == 2
    assert one.entropy == pytest.approx(wanted / 2)


class _Own(nn.Module):
    """Attention of torch's own function."""

    def __init__(self, *, causal: bool, groups: bool, mask: Tensor | None) -> None:
        super().__init__()
        self.causal, self.groups, self.mask = causal, groups, mask

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            q, k, k, attn_mask=self.mask, is_causal=self.causal, enable_gqa=self.groups, scale=0.5
        )


@pytest.mark.parametrize("kind", ["plain", "causal", "groups", "boolean", "added"])
def test_torchs_own_attention(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=generator)
    k = torch.randn(2, 2 if kind == "groups" else 4, 5, 8, generator=generator)
    mask = {"boolean": torch.rand(5, 5, generator=generator) > 0.3, "added": torch.randn(5, 5, generator=generator)}.get(
        kind
    )
    layer = _Own(causal=kind == "causal", groups=kind == "groups", mask=mask)
    (found,) = attention([layer], lambda: layer(q, k))
    keys = k.repeat_interleave(2, dim=1) if kind == "groups" else k
    wanted = torch.einsum("bhqd,bhkd->bhqk", q, keys) * 0.5
    open_ = torch.ones(5, 5).tril().bool() if kind == "causal" else torch.ones(5, 5).bool()
    if mask is not None:
        open_, wanted = (mask, wanted) if kind == "boolean" else (open_, wanted + mask)
    chances = wanted.masked_fill(~open_, -torch.inf).softmax(-1)
    assert found.logit == pytest.approx(float(wanted.abs()[..., open_].max()), rel=1e-5)
    assert found.entropy == pytest.approx(float(torch.special.entr(chances).sum(-1).mean()), rel=1e-5)


def test_where_there_is_no_attention_there_is_no_number() -> None:
    layer = nn.Linear(3, 3)
    (found,) = attention([layer], lambda: layer(torch.ones(2, 3)).softmax(-1))
    assert (found.logit, found.entropy) == (None, None)
    bad = _Own(causal=False, groups=False, mask=None)
    (found,) = attention([bad], lambda: bad(torch.full((1, 1, 2, 4), torch.inf), torch.ones(1, 1, 2, 4)))
    assert (found.logit, found.entropy) == (None, None), "not finite"
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
