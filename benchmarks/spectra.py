"""Symmetric operators by seed whose eigenvalues are known, of 50 to a million entries: what an eigensolver is judged on.

A diagonal between two Householder reflections of each block of coordinates. A product costs a few passes over a vector, and
the eigenvalues are the diagonal's. A cold start is a normal vector, which looks the same in every orthogonal basis; no
block's eigenvectors lean on the coordinates of another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.ritz import Extremes
from curvcli.curvature.space import OneDevice

Draw = np.random.Generator


class Reflected:
    """Q D Q', D diagonal and Q orthogonal, block by block.

    Args:
        values: the eigenvalues, of shape (n,).
        block: the block of each entry, of shape (n,), numbered from 0; None is one block.
        dtype: of the vectors.
    """

    def __init__(self, values: np.ndarray, draw: Draw, block: np.ndarray | None = None, dtype: torch.dtype = torch.float64):
        self.values = torch.from_numpy(values)
        self.space = OneDevice(len(values), dtype, torch.device("cpu"))
        self.diagonal = self.values.to(dtype)
        self.block = None if block is None else torch.from_numpy(block)
        self.blocks = 1 if block is None else int(block.max()) + 1
        mirrors = torch.from_numpy(draw.standard_normal((2, len(values))))
        self.mirrors = [(m / self._sums(m * m).sqrt()).to(dtype) for m in mirrors]

    def matvec(self, vector: Tensor) -> Tensor:
        return self.rotate(self.diagonal * self.rotate(vector, back=True))

    def rotate(self, vector: Tensor, *, back: bool = False) -> Tensor:
        """Q times a vector, or Q' times it."""
        for mirror in reversed(self.mirrors) if back else self.mirrors:
            vector = vector - 2 * mirror * self._sums(mirror * vector)
        return vector

    def eigenvector(self, index: int) -> Tensor:
        unit = torch.zeros_like(self.diagonal)
        unit[index] = 1
        return self.rotate(unit)

    def _sums(self, vector: Tensor) -> Tensor:
        """For each entry the sum over its block."""
        if self.block is None:
            return vector.sum()
        return vector.new_zeros(self.blocks).index_add_(0, self.block, vector)[self.block]


@dataclass(frozen=True)
class Sample:
    """A problem for the solver: an operator, its largest eigenvalue and its norm, and a warm vector to start from."""

    operator: Reflected
    top: float
    norm: float
    start: Tensor | None = None


def between(draw: Draw, low: float, high: float) -> float:
    """Uniform in the logarithm."""
    return float(np.exp(draw.uniform(np.log(low), np.log(high))))


def size(draw: Draw, most: float = 50_000) -> int:
    return round(between(draw, 50, most))


def bulk(draw: Draw, n: int) -> np.ndarray:
    """Many eigenvalues in [-1, 1]: flat, thin towards the edges, or crowded at 0."""
    u = draw.uniform(-1, 1, n)
    return (u, np.sin(np.pi / 2 * u) * np.sqrt(np.abs(u)), u**5)[draw.integers(3)]


def reflected(draw: Draw, values: np.ndarray, block: np.ndarray | None = None) -> Reflected:
    """At a random scale; in float32, as networks are, twice out of three times."""
    dtype = torch.float64 if len(values) < 500_000 and draw.random() < 1 / 3 else torch.float32
    return Reflected(values * between(draw, 1e-3, 1e5), draw, block, dtype)


def plain(operator: Reflected, start: Tensor | None = None) -> Sample:
    return Sample(operator, float(operator.values.max()), float(operator.values.abs().max()), start)


def decoupled(draw: Draw) -> Sample:
    """Blocks that know nothing of each other, the top in a small one. Every second starts in the largest of the others."""
    n, blocks = size(draw, 20_000), int(draw.integers(2, 41))
    small = int(draw.integers(1, max(2, n // 50)))
    block = draw.integers(1, blocks, n) if blocks > 2 else np.ones(n, dtype=np.int64)
    block[:small] = 0
    block = np.unique(block, return_inverse=True)[1]
    values = bulk(draw, n) * draw.uniform(0.1, 1, block.max() + 1)[block]
    values[0] = values[1:].max() * between(draw, 1.05, 10)
    operator = reflected(draw, values, block)
    if draw.random() < 0.5:
        return plain(operator)
    best = small + int(np.argmax(values[small:]))
    beside = torch.from_numpy((block == block[best]) * draw.standard_normal(n)).to(operator.diagonal)
    return plain(operator, operator.eigenvector(best) + 1e-3 * beside / beside.norm())


def clustered(draw: Draw) -> Sample:
    """2 to 10 eigenvalues close together at the top: within 0.1 to 3 % of it, or, every second time, 4 to 15 % below it."""
    n, count = size(draw), int(draw.integers(2, 11))
    values = bulk(draw, n) * draw.uniform(0.3, 0.8)
    wide = draw.random() < 0.5
    width = between(draw, 0.04, 0.15) if wide else between(draw, 1e-3, 3e-2)
    values[:count] = 1 - width * draw.uniform(0.8 if wide else 0.0, 1, count)
    values[0] = 1.0
    return plain(reflected(draw, values))


def negative(draw: Draw) -> Sample:
    """The negative end is 10 to 1,000 times the positive one."""
    values = bulk(draw, size(draw)) * draw.uniform(0.1, 0.9)
    values[0] = 1.0
    count = int(draw.integers(1, 6))
    values[1 : count + 1] = -between(draw, 10, 1000) * draw.uniform(0.1, 1, count)
    values[1] = values.min()
    return plain(reflected(draw, values))


def outlier(draw: Draw) -> Sample:
    """One eigenvalue in a million above the bulk, at 1.2 to 10 times its edge."""
    values = bulk(draw, 1_000_000)
    values[0] = between(draw, 1.2, 10) * values.max()
    return plain(reflected(draw, values))


def power(draw: Draw) -> Sample:
    """Few outliers that fall by a power law, at both ends, and a bulk near 0: as of networks in training."""
    n = size(draw)
    count = int(draw.integers(5, 41))
    values = bulk(draw, n) * between(draw, 1e-4, 1e-2)
    law = np.arange(1, count + 1) ** -draw.uniform(0.5, 2.5)
    values[:count] += law
    values[count : count + count // 4] -= between(draw, 0.05, 2) * law[: count // 4]
    return plain(reflected(draw, values))


def flat(draw: Draw) -> Sample:
    """A multiple of the identity, zero, or minus a matrix of rank one, whose top is 0."""
    values = np.zeros(size(draw))
    kind = draw.integers(4)
    if kind == 3:
        values[0] = -1.0
    else:
        values += kind - 1.0
    return plain(reflected(draw, values))


def low_rank(draw: Draw) -> Sample:
    """Positive semidefinite of rank 1 to 20."""
    values = np.zeros(size(draw))
    rank = int(draw.integers(1, 21))
    values[:rank] = 10 ** draw.uniform(-3, 0, rank)
    return plain(reflected(draw, values))


def warm(draw: Draw) -> Sample:
    """The start is the second eigenvector and 0.1 % of noise."""
    values = bulk(draw, size(draw))
    second = values.max()
    values[0], values[1] = second / draw.uniform(0.2, 0.95), second
    operator = reflected(draw, values)
    noise = torch.from_numpy(draw.standard_normal(len(values))).to(operator.diagonal)
    return plain(operator, operator.eigenvector(1) + 1e-3 * noise / noise.norm())


FAMILIES: dict[str, tuple[Callable[[Draw], Sample], int]] = {
    "decoupled": (decoupled, 170),
    "clustered": (clustered, 140),
    "negative": (negative, 140),
    "outlier": (outlier, 100),
    "power": (power, 140),
    "flat": (flat, 60),
    "low rank": (low_rank, 90),
    "warm": (warm, 160),
}


def sample(family: str, index: int) -> Sample:
    """The same for the same family and index, whatever else was drawn."""
    make, _ = FAMILIES[family]
    return make(np.random.default_rng([list(FAMILIES).index(family), index]))


def solve(task: Sample, solver: Lanczos, seed: int) -> Extremes:
    """What the solver finds; the start is its own where the sample has none."""
    return replace(solver, seed=seed).extremes(task.operator, task.start)
