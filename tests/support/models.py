"""Small float64 models, trained optimizers, and the dense oracle.

The oracle shares first-order autograd with curvcli and nothing else: central differences of float64
gradients, P typed out from the optimizer's documentation, torch.linalg.eigvalsh.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding, residual blocks, head: a Transformer without its attention."""

    def __init__(self, *, seed: int = 0, blocks: int = 3, width: int = 5, vocab: int = 7) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head: nn.Module = nn.Linear(width, vocab)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(seed: int = 0, rows: int = 48, vocab: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (rows,), generator=generator)
    ids[:vocab] = torch.arange(vocab)  # every row of the embedding gets a gradient
    targets = (ids * 3 + torch.randint(2, (rows,), generator=generator)) % vocab
    # Unequal batches: a mean that forgot their sizes would differ.
    return [(ids[: rows // 3], targets[: rows // 3]), (ids[rows // 3 :], targets[rows // 3 :])]


def weights(batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [float(len(ids)) for ids, _ in batches]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, steps: int = 12) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        ids, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        loss(model, (ids, targets)).backward()
        optimizer.step()
        del step


def dense_hessian(model: nn.Module, batches: list, names: list[str], depth: int | None = None) -> Tensor:
    """Hessian of the mean loss over all rows, over the named parameters in order, good to about 1e-8.

    Central differences of float64 gradients, the points of many columns through the model at once. torch.func.hessian
    will not do: on nn.LayerNorm it is silently wrong (test_trap_torch_func_hessian).
    """
    parameters = dict(model.named_parameters())
    shapes, sizes = [parameters[n].shape for n in names], [parameters[n].numel() for n in names]
    ids, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    layers = model.layers
    if depth is not None:
        model.layers = nn.ModuleList(list(layers)[:depth])  # type: ignore[arg-type]
    there = {n for n, _ in model.named_parameters()}

    def value(flat: Tensor) -> Tensor:
        pieces = {n: v.view(s) for n, v, s in zip(names, flat.split(sizes), shapes, strict=True) if n in there}
        return nn.functional.cross_entropy(functional_call(model, pieces, (ids,)), targets)

    at, step = torch.cat([parameters[n].detach().reshape(-1) for n in names]), 1e-5
    gradients = vmap(grad(value), chunk_size=128)
    shifts = step * torch.eye(len(at), dtype=at.dtype)
    try:
        with torch.no_grad():  # which `grad` does not heed, and the parameters that are not named do
            matrix = (gradients(at + shifts) - gradients(at - shifts)) / (2 * step)
    finally:
        model.layers = layers
    assert float((matrix - matrix.T).abs().max()) < 1e-6 * float(matrix.abs().max()), "the oracle is not symmetric"
    return (matrix + matrix.T) / 2


def top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])


def layer_names(model: nn.Module, index: int) -> list[str]:
    return [n for n, _ in model.named_parameters() if n.startswith(f"layers.{index}.")]


def depth_names(model: nn.Module, depth: int) -> list[str]:
    return [n for n, _ in model.named_parameters() if not n.startswith("layers.") or int(n.split(".")[1]) < depth]
