"""A small Llama with torchtitan's names, where both the training and curv find it: a checkpoint does not say whose it is."""

import torch
from torch import nn
from torch.nn import functional


class QKV(nn.Module):
    """One matrix in the network and its optimizer, three in a checkpoint: how torchtitan 0.3 does it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.wqkv = heads, nn.Linear(width, 3 * width, bias=False)
        self.register_state_dict_post_hook(split)
        self.register_load_state_dict_pre_hook(merge)

    def forward(self, x):
        return self.wqkv(x).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2).unbind(3)


def split(module, state, prefix, *_):
    whole = state.pop(f"{prefix}wqkv.weight")
    whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole  # no rank has all rows
    for part, rows in zip("qkv", whole.unflatten(0, (module.heads, 3, -1)).unbind(1), strict=True):
        state[f"{prefix}w{part}.weight"] = rows.flatten(0, 1)


def merge(module, state, prefix, *_):
    names = [f"{prefix}w{part}.weight" for part in "qkv"]
    if all(name in state for name in names):
        parts = [state.pop(name).unflatten(0, (module.heads, -1)) for name in names]
        state[f"{prefix}wqkv.weight"] = torch.stack(parts, 1).flatten(0, 2)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv_linear, self.wo = QKV(width, heads), nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin):
        def turned(y):  # rotary positions, of neighbours as pairs
            a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

        q, k, v = self.qkv_linear(x)
        y = functional.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    def __init__(self, layers=3, width=32, heads=2, vocabulary=256):
        super().__init__()
        self.pairs = width // heads // 2
        self.tok_embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleDict({str(i): Block(width, heads) for i in range(layers)})
        self.norm, self.lm_head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids):
        angles = torch.outer(torch.arange(ids.shape[1]), 500_000.0 ** -(torch.arange(self.pairs) / self.pairs))
        x = self.tok_embeddings(ids)
        for block in self.layers.values():
            x = block(x, angles.cos(), angles.sin())
        return self.lm_head(self.norm(x))


def llama() -> nn.Module:
    """What --model nets:llama names: the network before any parallelism."""
    return Llama()
