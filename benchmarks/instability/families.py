"""Families of small networks that break when their learning rate is raised: model, data, loss and optimizer of each.

Text is Moby-Dick as bytes (`runs.py`), images and regression targets are made by seed. One thread and seeded throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import runs
import torch
from torch import Tensor, nn

WIDTH, LENGTH, CLASSES = 32, 24, 10
Draw = Callable[[int, torch.Generator], Any]  # (rows, generator) -> batch


@dataclass(frozen=True)
class Family:
    """What a run's name stands for.

    Args:
        optimizer: its name in torch.optim, and what it is called with beside the learning rate.
        rates: learning rates from calm to one that most do not survive; the ramp begins at the first.
        rows: of a training batch; 0 is the whole of the data, always the same.
        held_out: not looked at before the coefficients are fitted.
        clip: largest norm of a gradient; infinite clips nothing, as of full batches.
        ramps_only: nothing else is trained: it is there for the learning rate at which it breaks.
    """

    name: str
    network: str
    optimizer: str
    options: dict[str, Any]
    rates: tuple[float, ...]
    rows: int = 8
    held_out: bool = False
    clip: float = 1.0
    ramps_only: bool = False

    @property
    def group(self) -> str:
        """Whose coefficients it shares."""
        return "sgd" if self.optimizer == "SGD" else "adaptive"


# The first is where ramps begin.
ADAM_RATES = (3e-4, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SGD_RATES = (0.01, 0.05, 0.2, 0.6, 2.0, 6.0)
_DECAYED = {"betas": (0.9, 0.99), "weight_decay": 0.1}

FAMILIES = {
    f.name: f
    for f in (
        *(
            Family(f"mlp-full-batch-{b2}", "mlp", "Adam", {"betas": (0.9, b2)}, ADAM_RATES, rows=0)
            for b2 in (0.9, 0.95, 0.99, 0.999)
        ),
        Family("mlp-sgd", "images-mlp", "SGD", {"momentum": 0.9}, SGD_RATES),
        Family("conv-sgd", "images-conv", "SGD", {"momentum": 0.9}, SGD_RATES),
        Family("gru-sgd", "gru", "SGD", {"momentum": 0.9}, SGD_RATES, held_out=True),
        Family("gru-adam", "gru", "Adam", {}, ADAM_RATES),
        Family("post-norm", "post-norm", "AdamW", _DECAYED, ADAM_RATES),
        Family("pre-norm-deep", "pre-norm-deep", "AdamW", _DECAYED, ADAM_RATES),
        Family("pre-norm-sgd", "pre-norm", "SGD", {"momentum": 0.9}, SGD_RATES),
        Family("llama", "llama", "AdamW", _DECAYED, ADAM_RATES),
        Family("llama-z-loss", "llama-z", "AdamW", _DECAYED, ADAM_RATES),
        Family("qk-norm", "qwen3", "AdamW", _DECAYED, ADAM_RATES),
        Family("llama-999", "llama", "AdamW", {"betas": (0.9, 0.999), "weight_decay": 0.01}, ADAM_RATES),
        Family("experts", "experts", "AdamW", _DECAYED, ADAM_RATES, held_out=True),
        Family("gpt2-adam", "gpt2", "Adam", {"betas": (0.9, 0.95)}, ADAM_RATES, held_out=True),
        Family("vit-adam", "vit", "Adam", {}, ADAM_RATES, rows=16),
        Family("vit-rmsprop", "vit", "RMSprop", {}, tuple(r / 3 for r in ADAM_RATES), rows=16),
        Family("llama-rmsprop", "llama", "RMSprop", {}, tuple(r / 3 for r in ADAM_RATES), held_out=True),
        *(
            Family(name, network, "SGD", options, SGD_RATES, held_out=True, clip=clip, ramps_only=True)
            for name, network, options, clip in (
                ("mixer-sgd", "mixer", {"momentum": 0.9}, 1.0),
                ("mixer-sgd-plain", "mixer", {}, 1.0),
                ("mixer-sgd-free", "mixer", {"momentum": 0.9}, math.inf),
                ("lstm-sgd", "lstm", {"momentum": 0.9}, 1.0),
                ("lstm-sgd-plain", "lstm", {}, 1.0),
                ("lstm-sgd-free", "lstm", {"momentum": 0.9}, math.inf),
                ("mlp-sgd-plain", "images-mlp", {}, 1.0),
                ("conv-sgd-plain", "images-conv", {}, 1.0),
                ("conv-sgd-free", "images-conv", {"momentum": 0.9}, math.inf),
                ("conv-nesterov", "images-conv", {"momentum": 0.9, "nesterov": True}, 1.0),
            )
        ),
    )
}


@dataclass(frozen=True)
class Task:
    """A network at initialisation, its loss and its data.

    Args:
        constant: loss of the best constant prediction, in the loss's units: what a dead network reaches.
        seen: what attention saw in the last forward pass with gradients off, by layer: largest logit, entropy in nats.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    draw: Draw
    constant: float
    seen: list[tuple[float, float]]


class Attention(nn.Module):
    """Causal (or full) multi-head attention, written out so that its logits can be looked at."""

    def __init__(self, heads: int, causal: bool, seen: list[tuple[float, float]]) -> None:
        super().__init__()
        self.heads, self.causal, self.seen = heads, causal, seen
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.causal:
            logits = logits + torch.full((length, length), float("-inf")).to(logits).triu(1)
        weights = logits.softmax(-1)
        if not torch.is_grad_enabled():
            entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean()
            self.seen.append((float(logits.amax()), float(entropy)))
        return self.out((weights @ v).transpose(1, 2).reshape(rows, length, WIDTH))


class Block(nn.Module):
    """A Transformer's block, the norms before or after its two parts."""

    def __init__(self, seen: list[tuple[float, float]], *, first: bool, causal: bool = True, experts: int = 0) -> None:
        super().__init__()
        self.first = first
        self.attention = Attention(4, causal, seen)
        self.feed: nn.Module = Experts(experts) if experts else _feed()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, (self.attention, self.feed), strict=True):
            x = x + part(norm(x)) if self.first else norm(x + part(x))
        return x


def _feed() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class Experts(nn.Module):
    """Each token goes to the two experts that the router prefers, weighted by their softmax."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.experts = nn.ModuleList(_feed() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        rest = torch.ones_like(logits, dtype=torch.bool).scatter(-1, logits.topk(2, dim=-1).indices, value=False)
        shares = logits.masked_fill(rest, float("-inf")).softmax(-1)
        return sum(shares[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class GRUBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cell = nn.LayerNorm(WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cell(self.norm(x))[0]


class LSTMBlock(nn.Module):
    """A bare recurrent layer: no norm, and nothing around it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class MixerBlock(nn.Module):
    """One layer over the 16 patches of a picture, then one over the channels of each (arXiv 2105.01601)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.patches = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.channels = _feed()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class Text(nn.Module):
    """Bytes to logits of the next byte: embedding, positions, blocks, head."""

    def __init__(self, blocks: list[nn.Module], *, norm: bool) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(blocks)
        self.norm: nn.Module = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class ViT(nn.Module):
    """Patches of 2 x 2 pixels of an 8 x 8 picture, blocks, mean, head."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, WIDTH), nn.Parameter(0.02 * torch.randn(16, WIDTH))
        self.layers = nn.ModuleList(block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)  # (rows, 16, 4)
        x = self.embed(patches) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def _images_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)
    )


def _images_conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, 2, 1), nn.GELU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(128, CLASSES),
    )  # fmt: skip


def next_byte(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    logits = getattr(logits, "logits", logits)
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def next_byte_z(model: nn.Module, batch: Tensor) -> Tensor:
    """With a penalty on the logarithm of the softmax's normaliser."""
    logits = model(batch[:, :-1]).logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch[:, 1:].flatten()) + 1e-3 * logits.logsumexp(-1).square().mean()


def label(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def _text() -> tuple[Draw, float]:
    ids, _ = runs.text()
    span = len(ids) - runs.SEQUENCE - 1
    shares = torch.bincount(ids, minlength=256).double() / len(ids)
    entropy = -float((shares * shares.clamp_min(1e-300).log()).sum())
    return lambda rows, g: runs.windows(ids, torch.randint(span, (rows,), generator=g))[
        :, : LENGTH + 1
    ].contiguous(), entropy


def _pictures(seed: int) -> tuple[Draw, float]:
    """Ten fixed pictures under noise of their own size."""
    means = torch.randn(CLASSES, 8, 8, generator=torch.Generator().manual_seed(9000 + seed))

    def draw(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (rows,), generator=generator)
        return means[labels] + torch.randn(rows, 8, 8, generator=generator), labels

    return draw, float(torch.tensor(float(CLASSES)).log())


def _regression(seed: int) -> tuple[Draw, float]:
    """256 points and the smooth targets of a random network, all of them in every batch."""
    generator = torch.Generator().manual_seed(9000 + seed)
    x, first = torch.randn(256, 32, generator=generator), torch.randn(32, 32, generator=generator) / 4
    y = torch.sin(2 * torch.tanh(x @ first) @ torch.randn(32, 10, generator=generator) / 3)
    return lambda rows, g: (x, y), float(y.var(0, unbiased=False).mean())


def _hugging(kind: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    if kind == "gpt2":
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        sizes = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": LENGTH, "vocab_size": 256}
        return GPT2LMHeadModel(GPT2Config(**sizes, **still, bos_token_id=None, eos_token_id=None))
    run = runs.Run(layers=3, width=WIDTH, method="qk-norm" if kind == "qwen3" else "plain", seed=torch.initial_seed())
    return runs.build(run)


def build(family: Family, seed: int) -> Task:
    """The network at initialisation, by seed, and its data."""
    torch.manual_seed(seed)
    seen: list[tuple[float, float]] = []
    kind = family.network
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        return Task(model, square, *_regression(seed), seen)
    pictures: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: ViT(lambda: Block(seen, first=True, causal=False)),
        "mixer": lambda: ViT(MixerBlock),
        "images-mlp": _images_mlp,
        "images-conv": _images_conv,
    }
    if kind in pictures:
        return Task(pictures[kind](), label, *_pictures(seed), seen)
    if kind in ("llama", "llama-z", "qwen3", "gpt2"):
        return Task(_hugging(kind), next_byte_z if kind == "llama-z" else next_byte, *_text(), seen)
    blocks: dict[str, Callable[[], list[nn.Module]]] = {
        "gru": lambda: [GRUBlock()],
        "lstm": lambda: [LSTMBlock()],
        "post-norm": lambda: [Block(seen, first=False) for _ in range(4)],
        "pre-norm": lambda: [Block(seen, first=True) for _ in range(2)],
        "pre-norm-deep": lambda: [Block(seen, first=True) for _ in range(6)],
        "experts": lambda: [Block(seen, first=True, experts=4) for _ in range(2)],
    }
    return Task(Text(blocks[kind](), norm=kind != "post-norm"), next_byte, *_text(), seen)


def optimizer_of(family: Family, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = getattr(torch.optim, family.optimizer)(model.parameters(), lr=lr, **family.options)
    return made
