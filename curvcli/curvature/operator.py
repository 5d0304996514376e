"""Symmetric operators: all that an eigensolver may know of a curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from curvcli.curvature import resources
from curvcli.curvature.hvp import HVP
from curvcli.curvature.inverse_root import ModelRoot
from curvcli.curvature.precision import inner, numbers
from curvcli.curvature.ranks import ALONE, Ranks
from curvcli.curvature.scratch import Put, let_go
from curvcli.curvature.space import OneDevice, Space
from curvcli.curvature.threads import in_order

LARGE = 2**26  # bytes of a vector from which on free memory is worth the few percent that it costs to ask for it again


class Operator(Protocol):
    """A real symmetric operator on the vectors of a space."""

    @property
    def space(self) -> Space:
        """The space of the vectors that `matvec` takes and gives."""
        ...

    def matvec(self, vector: Tensor) -> Tensor:
        """Image of a vector of the space, which is the caller's to change."""
        ...


class DenseOperator:
    """A symmetric matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix  # (n, n)
        self.space = OneDevice(matrix.shape[0], matrix.dtype, matrix.device)

    def matvec(self, vector: Tensor) -> Tensor:
        """The matrix, of shape (n, n), times a vector of shape (n,)."""
        return self.matrix @ self.space.here(vector)


class PreconditionedHessian:
    """P^(-1/2) (H + L) P^(-1/2) restricted to named parameters, on flat vectors: G of arXiv 2606.16768.

    L is the diagonal that a coupled (not decoupled) weight decay adds to the Hessian.

    Args:
        hvp: products with H.
        root: P^(-1/2) of the parameters that move, in the order of the flat vector.
        decay: coupled weight decay for each name (absent means 0).
    """

    def __init__(self, hvp: HVP, root: ModelRoot, decay: Mapping[str, float] | None = None) -> None:
        self.hvp, self.root = hvp, root
        self.decay = [(decay or {}).get(n, 0.0) for n in root.names]
        self.space = root.space

    def matvec(self, vector: Tensor) -> Tensor:
        """G v for a flat v of shape (n,): one Hessian-vector product between two applications of P^(-1/2)."""
        large = vector.nbytes >= LARGE
        tangents = self.root.apply(self.root.split(self.space.here(vector)))
        let_go(vector)  # one that lies on disk, of which the product has no need
        images = list(self.hvp.product(self.root.names, tangents))
        if large:
            resources.give_back(vector.device)
        # Allocated only now: during the product, at the peak of memory, it would be one more vector.
        flat = self.space.empty(1)[0]
        pieces = zip(self.root.split(flat), self.root.values(), self.decay, strict=True)
        tangents.reverse()  # so that pop() gives them in the order of the pieces
        images.reverse()
        for piece, root, weight in pieces:  # each image goes as it is written down: three vectors at a time, not five
            image, tangent = images.pop().detach(), tangents.pop()
            piece.copy_(root.apply(image + weight * tangent if weight else image))
        if large:  # large tensors had taken the place of what the product left free
            resources.give_back(vector.device)
        return flat


class Folded:
    """The weighted mean of operators that stand for parts of the data, which are seen through the vectors it is applied to.

    Between the vectors of a Lanczos basis every fold is a small matrix, which costs no product: that of the whole is made
    of the folds' own.

    Args:
        folds: a weight, which sum to 1, and an operator for each; all on one space. Where several processes measure
            together, what this one's batches add to it, or all of it on the entries that are held here.
        ranks: these processes, which sum a product once and not once a fold.
        held: where entries are divided over them: within it products are along one vector alone.
        put: what keeps a sum elsewhere while a product is made.
        done: called with a fold's weight after each of its products.
        threads: whether folds may be applied at the same time (`threads.in_order`).
    """

    def __init__(
        self,
        folds: Sequence[tuple[float, Operator]],
        ranks: Ranks = ALONE,
        held: Callable[[], AbstractContextManager[None]] | None = None,
        *,
        put: Put = list,
        done: Callable[[float], object] = lambda weight: None,
        threads: bool = False,
    ) -> None:
        self.put, self.done, self.threads = put, done, threads
        self.folds, self.space, self.ranks = folds, folds[0][1].space, ranks
        self.sharded, self.held = held is not None, held or nullcontext
        self.vectors: list[Tensor] = []  # each (n,), as they were given
        self.columns: list[list[list[float]]] = [[] for _ in folds]  # by fold: of vector j, v_i.G v_j for i <= j

    def matvec(self, vector: Tensor) -> Tensor:
        """The mean's image of a vector of shape (n,), which is kept, not copied."""
        if len(self.folds) == 1 and self.ranks.world == 1:  # nothing to compare it with
            self.vectors.append(vector)
            image = self.folds[0][1].matvec(vector)
            self.done(1.0)
            return image
        # A basis that lies elsewhere is read once for two folds' images, which are one vector more than for one.
        at_once = 2 if vector.device != self.space.empty(0).device else 1
        given, vector = vector, self.space.here(vector)
        (total,) = self.put([torch.zeros_like(vector)])
        self.vectors.append(given)  # only now: a vector of which there is no product for want of room is none that was seen

        def add(first: int, images: Sequence[Tensor]) -> None:
            # One by one: the vectors are rows of the solver's basis, and stacking them would copy it.
            inside = [self._inner(v, images) for v in self.vectors]
            for place, image in enumerate(images):
                weight = self.folds[first + place][0]
                self.columns[first + place].append(numbers([found[place] for found in inside]))
                total.add_(image, alpha=weight)
                self.done(weight)
            let_go(total)

        products = [partial(operator.matvec, vector) for _, operator in self.folds]
        with self.held():
            if self.threads:
                in_order(products, lambda index, image: add(index, [image]))
            else:
                for first in range(0, len(products), at_once):
                    add(first, [product() for product in products[first : first + at_once]])
        if not self.sharded:
            self.ranks.sum_([total])
        return total

    def forget(self, count: int) -> None:
        """All vectors but the first so many, and what the folds made of them."""
        del self.vectors[count:]
        for columns in self.columns:
            del columns[count:]

    def _inner(self, vector: Tensor, images: Sequence[Tensor]) -> list[Tensor]:
        # Of what is here alone: `projected` adds up what the processes found.
        near = self.space.here(vector)[None]
        found = [inner(near, image)[0] for image in images]
        let_go(vector)
        return found

    def projected(self) -> Tensor:
        """Every fold between the vectors: shape (folds, k, k), float64, symmetric."""
        size = len(self.vectors)
        found = torch.zeros(len(self.folds), size, size, dtype=torch.float64)
        for matrix, columns in zip(found, self.columns, strict=True):
            for j, column in enumerate(columns):
                matrix[: j + 1, j] = matrix[j, : j + 1] = torch.tensor(column, dtype=torch.float64)  # G is symmetric
        self.ranks.sum_([found])
        return found
