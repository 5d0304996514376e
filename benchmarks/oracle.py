"""The top eigenvalue of the preconditioned Hessian once more, by code that shares nothing with curvcli.

Double-precision copies of the network and of the optimizer's moments, double backward, P written out from torch's
optimizers, and a block Lanczos iteration from several random starts that keeps and reorthogonalises every vector.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Truth:
    """A top eigenvalue with its relative residual and the vectors that it took; a lower bound whatever they are."""

    value: float
    residual: float
    vectors: int


def top(matvec: Callable[[Tensor], Tensor], size: int, *, starts: int, tolerance: float, most: int, seed: int) -> Truth:
    """Largest eigenvalue of a symmetric operator on blocks of vectors, (k, size) to (k, size), in float64."""
    draw = torch.Generator().manual_seed(seed)
    starts, most = min(starts, size), min(most, size)
    basis = torch.zeros(most, size, dtype=torch.float64)
    images = torch.zeros(most, size, dtype=torch.float64)
    block = torch.linalg.qr(torch.randn(size, starts, generator=draw, dtype=torch.float64)).Q.T
    count, checked = 0, 0
    while True:
        k = len(block)
        basis[count : count + k] = block
        images[count : count + k] = matvec(block)
        count += k
        if count >= 1.3 * checked or count == most:
            checked = count
            projected = basis[:count] @ images[:count].T
            values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
            value, y = float(values[-1]), vectors[:, -1]
            residual = float((y @ images[:count] - value * (y @ basis[:count])).norm()) / max(abs(value), 1e-300)
            if residual <= tolerance or count == most:
                return Truth(value, residual, count)
        left = images[count - k : count].clone()
        for _ in range(2):
            left -= (left @ basis[:count].T) @ basis[:count]
        left[left.norm(dim=1) == 0] = torch.randn(size, generator=draw, dtype=torch.float64)
        block = torch.linalg.qr(left.T).Q.T[: most - count]
        block = block - (block @ basis[:count].T) @ basis[:count]  # the QR of small remainders turns rounding up
        block = torch.linalg.qr(block.T).Q.T


class Oracle:
    """A checkpoint in double precision."""

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], batch: Any, optimizer: torch.optim.Optimizer, stack: str
    ) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.loss, self.batch, self.stack = loss, batch, stack
        self.parameters = dict(self.model.named_parameters())
        self.roots: dict[str, Tensor] = {}
        (group,) = optimizer.param_groups
        self.decay = 0.0 if isinstance(optimizer, torch.optim.AdamW) else group["weight_decay"]
        for name, parameter in model.named_parameters():
            state = {k: v.double() if isinstance(v, Tensor) else v for k, v in optimizer.state[parameter].items()}
            self.roots[name] = inverse_root(optimizer, group, state, self.parameters[name])

    @property
    def blocks(self) -> nn.ModuleList:
        found = self.model.get_submodule(self.stack)
        assert isinstance(found, nn.ModuleList)
        return found

    def names(self, depth: int | None = None, layer: int | None = None) -> list[str]:
        """Parameters outside the blocks and in the first `depth`; or of one block; or all."""
        inside = {name: int(name[len(self.stack) + 1 :].split(".")[0]) for name in self.parameters if self._within(name)}
        if layer is not None:
            return [name for name, index in inside.items() if index == layer]
        return [name for name in self.parameters if depth is None or inside.get(name, -1) < depth]

    def _within(self, name: str) -> bool:
        return name.startswith(self.stack + ".")

    def top(
        self, names: Sequence[str], *, truncated: int | None = None, still: Mapping[str, Tensor] = {}, seed: int = 0
    ) -> Truth:
        """Largest eigenvalue restricted to `names`, of the network of the first `truncated` blocks where that is given.

        Rows that `still` marks, by name, are held still.
        """
        blocks, (path, _, attribute) = self.blocks, self.stack.rpartition(".")
        parent = self.model.get_submodule(path)
        if truncated is not None:
            setattr(parent, attribute, nn.ModuleList(list(blocks)[:truncated]))
        try:
            return self._top(names, still, seed)
        finally:
            setattr(parent, attribute, blocks)

    def _top(self, names: Sequence[str], still: Mapping[str, Tensor], seed: int) -> Truth:
        chosen = [self.parameters[n] for n in names]
        root = torch.cat([(self.roots[n] * ~still[n][:, None] if n in still else self.roots[n]).flatten() for n in names])
        moves = root > 0  # what never had a gradient is held still
        with sdpa_kernel(SDPBackend.MATH):
            value = self.loss(self.model, self.batch)
        gradient = torch.autograd.grad(value, chosen, create_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in gradient])

        def matvec(block: Tensor) -> Tensor:
            tangents = torch.zeros(len(block), len(root), dtype=torch.float64)
            tangents[:, moves] = block
            tangents *= root
            images = torch.autograd.grad(flat, chosen, tangents, retain_graph=True, allow_unused=True, is_grads_batched=True)
            whole = torch.cat(
                [
                    (torch.zeros(len(block), *p.shape).double() if i is None else i).flatten(1)
                    for i, p in zip(images, chosen, strict=True)
                ],
                dim=1,
            )
            return ((whole + self.decay * tangents) * root)[:, moves]

        return top(matvec, int(moves.sum()), starts=2, tolerance=1e-6, most=450, seed=seed)


def inverse_root(optimizer: torch.optim.Optimizer, group: dict[str, Any], state: dict[str, Any], like: Tensor) -> Tensor:
    """P^(-1/2) entry by entry, 0 where the second moment is 0: torch/optim/adam.py, rmsprop.py, sgd.py."""
    if isinstance(optimizer, torch.optim.SGD):
        return torch.ones_like(like)
    if isinstance(optimizer, torch.optim.RMSprop):
        square = state["square_avg"]
        entries = square.sqrt() + group["eps"]
    else:
        (first, second), square, step = group["betas"], state["exp_avg_sq"], float(state["step"])
        entries = (1 - first**step) * ((square / (1 - second**step)).sqrt() + group["eps"])
    return torch.where(square > 0, entries, torch.full_like(entries, float("inf"))).rsqrt()
