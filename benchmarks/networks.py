"""Small networks of six families, and runs that train them: what the benchmark of certificates measures.

Text is Moby-Dick as bytes (`runs.py`), images are made by seed. One thread and seeded throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import runs
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

FAMILIES = ("llama", "gpt2", "post-norm", "vit", "gru", "mlp")
OPTIMIZERS = ("AdamW", "Adam", "RMSprop", "SGD")
# Calm, usual, hot: the last is near to what these runs still survive.
RATES = {"AdamW": (1e-3, 4e-3, 2e-2), "Adam": (1e-3, 4e-3, 2e-2), "RMSprop": (3e-4, 1e-3, 5e-3), "SGD": (0.02, 0.1, 0.4)}
POINTS = (1, 4, 8, 14, 22, 34, 50, 70)  # steps after which a run is measured
LAYERS, WIDTH, CLASSES = 3, 16, 10


@dataclass(frozen=True)
class Case:
    """One run: everything that its result depends on."""

    family: str
    optimizer: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Task:
    """A network, its loss, where its stack of blocks is, and what draws batches: (rows, generator) -> batch.

    `table` is the weight whose rows a batch's bytes but the last look up; empty where there is none.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    stack: str
    draw: Callable[[int, torch.Generator], Any]
    rows: int  # of the shard that is measured: 256 predictions, of images 32
    table: str = "embed.weight"

    def rare(self, batch: Any) -> dict[str, Tensor]:
        """True on the table's rows, of shape (256,), that a batch looks up fewer than ten times, if at all."""
        return {self.table: torch.bincount(batch[:, :-1].flatten(), minlength=256) < 10} if self.table else {}


def joined(batches: list[Any]) -> Any:
    """Batches as one."""
    return torch.cat(batches) if isinstance(batches[0], Tensor) else tuple(map(torch.cat, zip(*batches, strict=True)))


def cases() -> list[Case]:
    """25 runs: each family with each optimizer, learning rates in turn, and one more."""
    pairs = [*product(FAMILIES, OPTIMIZERS), ("llama", "AdamW")]
    return [Case(family, name, RATES[name][(k + k // len(OPTIMIZERS)) % 3], k) for k, (family, name) in enumerate(pairs)]


class GRUBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cell(self.norm(x))[0]


class MLPBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def attention_block(first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=first)


class Text(nn.Module):
    """Bytes to logits of the next byte: embedding, blocks, head."""

    def __init__(self, blocks: list[nn.Module], *, positions: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.place = nn.Embedding(runs.SEQUENCE, WIDTH) if positions else None
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.place is None:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)
        x = x + self.place.weight[: ids.shape[1]]
        mask = torch.triu(torch.full((ids.shape[1],) * 2, float("-inf"), dtype=x.dtype), 1)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return self.head(x)


class Context(nn.Module):
    """Eight bytes to logits of the ninth: an embedding side by side, residual blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 4)
        self.layers = nn.ModuleList(MLPBlock(32) for _ in range(LAYERS))
        self.head = nn.Linear(32, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Images(nn.Module):
    """A ViT without a class token: patches of 2 x 2 pixels, positions, pre-norm blocks, mean, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        self.layers = nn.ModuleList(attention_block(first=True) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)  # (rows, 16, 4)
        x = self.embed(patches) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def next_byte(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def last_byte(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])


def label(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    # The pixels follow the model's precision: the truth is computed on a float64 copy.
    pixels = batch[0].to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(pixels), batch[1])


def text_windows(length: int) -> Callable[[int, torch.Generator], Tensor]:
    ids, _ = runs.text()
    span = len(ids) - runs.SEQUENCE - 1
    return lambda rows, draw: runs.windows(ids, torch.randint(span, (rows,), generator=draw))[:, : length + 1].contiguous()


def image_rows(seed: int) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Ten fixed pictures of 8 x 8 under noise of their own size."""
    means = torch.randn(CLASSES, 8, 8, generator=torch.Generator().manual_seed(9000 + seed))

    def draw(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (rows,), generator=generator)
        return means[labels] + torch.randn(rows, 8, 8, generator=generator), labels

    return draw


def build(case: Case) -> Task:
    """The network at initialisation and its data."""
    torch.manual_seed(case.seed)
    if case.family == "llama":
        run = runs.Run(seed=case.seed, layers=LAYERS, width=WIDTH)
        return Task(runs.build(run), runs.loss, "model.layers", text_windows(32), 8, "model.embed_tokens.weight")
    if case.family == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 64, "vocab_size": 256}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **still, bos_token_id=None, eos_token_id=None))
        return Task(model, runs.loss, "transformer.h", text_windows(32), 8, "transformer.wte.weight")
    if case.family == "post-norm":
        blocks = [attention_block(first=False) for _ in range(LAYERS)]
        return Task(Text(blocks, positions=True), next_byte, "layers", text_windows(32), 8)
    if case.family == "vit":
        return Task(Images(), label, "layers", image_rows(case.seed), 32, "")
    if case.family == "gru":
        return Task(Text([GRUBlock() for _ in range(2)]), next_byte, "layers", text_windows(16), 16)
    return Task(Context(), last_byte, "layers", text_windows(8), 256)


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if case.optimizer == "AdamW":
        return torch.optim.AdamW(parameters, lr=case.lr, betas=(0.9, 0.99), weight_decay=0.1)
    if case.optimizer == "Adam":
        # Coupled decay is the whole gradient of a row that no token uses: its curvature is a crowd of separate entries.
        decay = 1e-3 if case.seed % 8 < 4 else 0.0
        return torch.optim.Adam(parameters, lr=case.lr, betas=(0.9, 0.999), weight_decay=decay)
    if case.optimizer == "RMSprop":
        return torch.optim.RMSprop(parameters, lr=case.lr)
    return torch.optim.SGD(parameters, lr=case.lr, momentum=0.9)


def train(case: Case, points: tuple[int, ...] = POINTS) -> Iterator[tuple[int, Task, torch.optim.Optimizer]]:
    """Train, and stop after each of `points` steps with the network and the optimizer as they are then."""
    task = build(case)
    optimizer = optimizer_of(case, task.model)
    draw = torch.Generator().manual_seed(1000 + case.seed)
    for step in range(1, max(points) + 1):
        for group in optimizer.param_groups:
            group["lr"] = case.lr * min(step / 10, 1.0)
        task.loss(task.model, task.draw(max(task.rows // 2, 8), draw)).backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in points:
            yield step, task, optimizer
