"""Inverse roots S^(1/2) = P^(-1/2) of preconditioners, as linear maps: of one parameter, and of a whole model.

The operator whose spectrum is measured, S^(1/2) H S^(1/2) (arXiv 2606.16768), asks no more of P than this, so P may be
diagonal (Adam), a Kronecker product (Shampoo), diagonal in a rotated basis (SOAP) or of low rank (GaLore).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from curvcli.curvature.ranks import ALONE, Ranks
from curvcli.curvature.scratch import Put, let_go
from curvcli.curvature.shards import Sharded, Shards
from curvcli.curvature.space import OneDevice, space_of


class InverseRoot(Protocol):
    """P^(-1/2) of one parameter: a symmetric, positive semidefinite map of tensors in the parameter's shape.

    It is 0 along directions in which nothing moves: those that never had a gradient, or that P projects away.
    """

    @property
    def idle(self) -> int:
        """Dimension of the space along which nothing moves."""
        ...

    @property
    def positive(self) -> bool:
        """Whether P is finite and above 0 wherever something moves. Where it is not, there is no root."""
        ...

    def apply(self, tensor: Tensor) -> Tensor:
        """P^(-1/2) x."""
        ...

    def invert(self, tensor: Tensor) -> Tensor:
        """The pseudo-inverse, P^(1/2) x; 0 along what is idle."""
        ...

    def solve(self, tensor: Tensor) -> Tensor:
        """P^(-1) x, the step that the optimizer takes for a momentum x, along what is idle too."""
        ...

    def scaled(self, factor: float) -> InverseRoot:
        """(factor P)^(-1/2), for a factor above 0."""
        ...

    def to(self, parameter: Tensor) -> InverseRoot:
        """The same in the parameter's precision, on its device."""
        ...


@dataclass(frozen=True)
class Multiple:
    """P = factor I, of an optimizer that does not precondition."""

    factor: float = 1.0
    idle: int = 0

    @property
    def positive(self) -> bool:
        """Whether the factor is finite and above 0."""
        return 0 < self.factor < float("inf")

    def apply(self, tensor: Tensor) -> Tensor:
        """Entries over the square root of the factor."""
        return tensor * math.pow(self.factor, -0.5)

    def invert(self, tensor: Tensor) -> Tensor:
        """Entries times the square root of the factor."""
        # The same power as in `apply`, so that each undoes the other to rounding.
        return tensor / math.pow(self.factor, -0.5)

    def solve(self, tensor: Tensor) -> Tensor:
        """Entries over the factor."""
        return tensor / self.factor

    def scaled(self, factor: float) -> Multiple:
        """P times the factor, with nothing idle."""
        return Multiple(self.factor * factor)

    def to(self, parameter: Tensor) -> Multiple:
        """Itself: it holds no tensor."""
        return self


@dataclass(frozen=True)
class Diagonal:
    """P of one number for each entry.

    Attributes:
        entries: the diagonal of P, in the parameter's shape. The root is taken when it is applied: that costs nothing
            beside a product with the Hessian, and P and its root need not both be held.
        never: true on the entries that never had a gradient, in the parameter's shape; None where there is none.
            Such an entry divides by eps alone until its first gradient comes; the optimizer has not moved along it, and
            its curvature would be 1/eps times anything.
    """

    entries: Tensor
    never: Tensor | None = None

    @classmethod
    def of(cls, entries: Tensor, moment: Tensor) -> Diagonal:
        """P from its diagonal, and the second moment in it, which is 0 where there never was a gradient."""
        never = moment == 0
        return cls(entries, never if bool(never.any()) else None)

    @property
    def idle(self) -> int:
        """How many entries never had a gradient."""
        return 0 if self.never is None else int(self.never.sum())

    @property
    def positive(self) -> bool:
        """Whether P is finite and above 0 on every entry that had a gradient."""
        fine = (self.entries > 0) & torch.isfinite(self.entries)
        return bool((fine if self.never is None else fine | self.never).all())

    @property
    def _root(self) -> Tensor:
        root = self.entries.rsqrt()
        let_go(self.entries)
        if self.never is not None:
            # Filled in, not multiplied by 0: P may be 0 where there never was a gradient, and infinity times 0 is NaN.
            root.masked_fill_(self.never, 0.0)
            let_go(self.never)
        return root

    def apply(self, tensor: Tensor) -> Tensor:
        """Entries over the square root of P; 0 where there never was a gradient."""
        return self._root * tensor

    def invert(self, tensor: Tensor) -> Tensor:
        """Entries times the square root of P; 0 where there never was a gradient."""
        root = self._root
        ratio = tensor / root  # infinite or NaN where idle, and not chosen
        return torch.where(root > 0, ratio, torch.zeros_like(ratio))

    def solve(self, tensor: Tensor) -> Tensor:
        """Entries over P, on those that never had a gradient too."""
        return tensor / self.entries

    def scaled(self, factor: float) -> Diagonal:
        """P times the factor; the same entries are idle."""
        return Diagonal(self.entries * factor, self.never)

    def to(self, parameter: Tensor) -> Diagonal:
        """P in the parameter's precision on its device, and the mask of idle entries beside it."""
        return Diagonal(self.entries.to(parameter), None if self.never is None else self.never.to(parameter.device))


class ModelRoot(Mapping[str, InverseRoot]):
    """P^(-1/2) of a whole model, one block for each parameter, on flat vectors: the parameters' tensors end to end.

    Args:
        roots: by name, in the order of the flat vector. None where no parameter is preconditioned.
        parameters: by name: whose shapes, precision and device vectors have. All of one precision, on one device.
        shards: where each process holds slices of the parameters, flat ones; `roots` and vectors are of these then.
    """

    def __init__(
        self, roots: Mapping[str, InverseRoot], parameters: Mapping[str, Tensor], shards: Shards | None = None
    ) -> None:
        self._roots, self.shards = dict(roots), shards
        # Where nothing is preconditioned, any parameter gives precision and device.
        first = parameters[next(iter(roots or parameters))]
        self.space: OneDevice | Sharded
        if shards is None:
            self._shapes = {n: parameters[n].shape for n in roots}
            self.sizes = [shape.numel() for shape in self._shapes.values()]  # of the pieces of a flat vector, in order
            self.space = space_of(sum(self.sizes), first.dtype, first.device)
        else:
            self.space = Sharded(shards, tuple(roots), first.dtype, first.device)
            self.sizes = self.space.sizes
            self._shapes = {n: torch.Size([size]) for n, size in zip(roots, self.sizes, strict=True)}

    def __getitem__(self, name: str) -> InverseRoot:
        return self._roots[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roots)

    def __len__(self) -> int:
        return len(self._roots)

    @property
    def holders(self) -> Ranks:
        """The processes whose numbers make up one of a whole vector: this one alone, where it holds vectors as a whole."""
        return self.shards.ranks if self.shards else ALONE

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that move, in the order of the flat vector."""
        return tuple(self._roots)

    def restrict(self, names: Sequence[str]) -> ModelRoot:
        """Of some parameters alone, in the order given. Raises ValueError where none are."""
        if not names:
            raise ValueError("an operator needs at least one parameter")
        return ModelRoot({n: self._roots[n] for n in names}, self._empty(), self.shards)

    def none(self) -> ModelRoot:
        """Of no parameter, in the same precision on the same device."""
        # A nameless parameter stands for precision and device; no root runs over it.
        return ModelRoot({}, {"": torch.empty((), dtype=self.space.dtype, device=self.space.device)}, self.shards)

    def joined(self, roots: Mapping[str, InverseRoot], parameters: Mapping[str, Tensor]) -> ModelRoot:
        """With more parameters, which take the place of those of the same name."""
        return ModelRoot({**self._roots, **roots}, parameters, self.shards)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat vector, of shape (n,), as tensors in the parameters' shapes (views)."""
        return [v.view(shape) for v, shape in zip(vector.split(self.sizes), self._shapes.values(), strict=True)]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Inverse of `split`."""
        return torch.cat([t.reshape(-1) for t in tensors])

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """P^(-1/2) of a tensor for each parameter."""
        return [root.apply(t) for root, t in zip(self._roots.values(), tensors, strict=True)]

    def lift(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector v as the direction P^(-1/2) v of the weights: what lasts while P moves on."""
        return dict(zip(self._roots, self.apply(self.split(vector)), strict=True))

    def lower(self, direction: Mapping[str, Tensor]) -> Tensor:
        """A direction of the weights as a flat vector, of shape (n,): the inverse of `lift` where something moves.

        Names that are absent, or of another shape, are 0.
        """
        pieces = []
        for (name, root), empty in zip(self._roots.items(), self._empty().values(), strict=True):
            known = name in direction and direction[name].shape == empty.shape
            pieces.append(root.invert(direction[name].to(empty)) if known else torch.zeros_like(empty))
        return self.flatten(pieces)

    def carry(self, vector: Tensor, source: ModelRoot) -> Tensor:
        """A flat vector over another's parameters: cut to these, padded with zeros."""
        pieces = dict(zip(source.names, vector.split(source.sizes), strict=True))
        return torch.cat(
            [pieces[n] if n in pieces else vector.new_zeros(size) for n, size in zip(self.names, self.sizes, strict=True)]
        )

    def mask(self, names: Sequence[str]) -> Tensor:
        """Boolean vector, of shape (n,), true on the entries of the given names."""
        chosen = set(names)
        return torch.cat(
            [
                torch.full((size,), n in chosen, dtype=torch.bool, device=self.space.device)
                for n, size in zip(self.names, self.sizes, strict=True)
            ]
        )

    def aside(self, put: Put) -> ModelRoot:
        """With what `put` gives in the place of diagonals."""
        found = {n: root for n, root in self._roots.items() if isinstance(root, Diagonal)}
        if not found:
            return self
        masks = {n: root.never for n, root in found.items() if root.never is not None}
        never = dict(zip(masks, put(list(masks.values())), strict=True))
        entries = dict(zip(found, put([root.entries for root in found.values()]), strict=True))
        moved = {n: Diagonal(diagonal, never.get(n)) for n, diagonal in entries.items()}
        return ModelRoot({**self._roots, **moved}, self._empty(), self.shards)

    def _empty(self) -> dict[str, Tensor]:
        """A tensor in every parameter's shape that takes the room of one entry."""
        one = torch.empty((), dtype=self.space.dtype, device=self.space.device)
        return {n: one.expand(shape) for n, shape in self._shapes.items()}
