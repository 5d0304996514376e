"""What is divided over processes, put together for a product and let go after it: tangents, images, and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from curvcli.curvature.balls import Ball, MaxNorm
from curvcli.curvature.hvp import HVP
from curvcli.curvature.inverse_root import Diagonal, InverseRoot, Multiple
from curvcli.curvature.ranks import ALONE, Ranks
from curvcli.curvature.shards import Shards
from curvcli.curvature.streaming import Streamed


@dataclass
class _Held:
    """The whole tangents of a vector that several products are along, once the first of them is made."""

    on: bool = False
    tangents: list[Tensor] | None = None


@dataclass(frozen=True)
class Gathered:
    """Products on slices: tangents are gathered, each process makes the product of its batches, and the sum is scattered.

    Nothing runs on tensors that are divided, so any model does, by any exact mode.

    Args:
        hvp: that gives what this process' batches add, on whole tensors.
        shards: who holds what.
        whole: within it the weights are there.
    """

    hvp: HVP
    shards: Shards
    whole: Callable[[], AbstractContextManager[None]]
    _held: _Held = field(default_factory=_Held)

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        """H v on the slices that are held here, of all processes' batches; flat tensors. All call it alike."""
        along = self._held.tangents or self.shards.gather(names, tangents)
        if self._held.on:
            self._held.tangents = along
        with self.whole():
            images = list(self.hvp.product(names, along))
        del along
        return self.shards.scatter(names, images)

    def subset(self, indices: Sequence[int]) -> HVP:
        """The same of some of the batches."""
        return Gathered(self.hvp.subset(indices), self.shards, self.whole, self._held)

    def part(self) -> HVP:
        """Itself: what a process holds of a product is a slice of all of it."""
        return self

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it all products, of any batches, are along one vector: its tangents and the weights are gathered once."""
        with self.whole():
            self._held.on = True
            try:
                yield
            finally:
                self._held.on, self._held.tangents = False, None


class Weights:
    """The weights of a model that nobody else needs, of which each process holds slices but within `whole`.

    Between uses a parameter has its shape and no numbers: whoever reads it there computes with NaN, which every solve
    reports, and never with numbers that are wrong.

    Args:
        model: is left without its weights; buffers, and what is no floating-point number, stay.
        ranks: the processes, which all hold the same model now.
        parts: what is held here of each parameter, by name, where the model never had its weights.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, parts: Mapping[str, Tensor] | None = None) -> None:
        self._parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
        self.shards = Shards(ranks, {n: p.shape for n, p in self._parameters.items()})
        self._parts = dict(parts or {n: self.shards.part(n, p) for n, p in self._parameters.items()})
        self._depth = 0
        self.streamed: Streamed | None = None
        self._release()

    @property
    def nbytes(self) -> int:
        """Of all of them, whole."""
        return sum(p.nbytes for p in self._parameters.values())

    def stream(self, groups: Sequence[Sequence[str]]) -> None:
        """From now on those that are used together are there while they are used, and never all.

        Args:
            groups: names of all parameters, those together that are.
        """
        self.streamed = Streamed(self._parameters, self.shards, self._parts, groups)

    def put(self, name: str, whole: Tensor) -> None:
        """Within `whole`: another tensor in the place of a parameter, from here on."""
        self._parts[name] = self.shards.part(name, whole)
        self._parameters[name].data.copy_(whole)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it the weights are there; all processes have to come to it. Within itself it costs nothing."""
        if self.streamed is not None:
            with self.streamed.on():
                yield
            return
        if not self._depth:
            self._gather()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._release()

    def _gather(self) -> None:
        kinds = sorted({(str(p.dtype), str(p.device)) for p in self._parameters.values()})
        for kind in kinds:  # what is sent at once is of one type
            names = [n for n, p in self._parameters.items() if (str(p.dtype), str(p.device)) == kind]
            for name, tensor in zip(names, self.shards.gather(names, [self._parts[n] for n in names]), strict=True):
                self._parameters[name].data = tensor

    def _release(self) -> None:
        for parameter in self._parameters.values():
            parameter.data = parameter.new_full((), float("nan")).expand(parameter.shape)


@dataclass(frozen=True)
class Whole:
    """P^(-1/2) of one parameter, on slices, where that is no matter of entries: the tensor is gathered for it.

    Args:
        inner: of the whole parameter; what P is made of is held by every process.
    """

    inner: InverseRoot
    name: str
    shards: Shards

    @property
    def idle(self) -> int:
        """Dimension of the space along which nothing moves, of the whole parameter."""
        return self.inner.idle

    @property
    def positive(self) -> bool:
        """Whether P is finite and above 0 wherever something moves."""
        return self.inner.positive

    def apply(self, tensor: Tensor) -> Tensor:
        """P^(-1/2) x, on slices."""
        return self._on(tensor, self.inner.apply)

    def invert(self, tensor: Tensor) -> Tensor:
        """The pseudo-inverse, on slices."""
        return self._on(tensor, self.inner.invert)

    def solve(self, tensor: Tensor) -> Tensor:
        """P^(-1) x, on slices."""
        return self._on(tensor, self.inner.solve)

    def scaled(self, factor: float) -> Whole:
        """(factor P)^(-1/2)."""
        return Whole(self.inner.scaled(factor), self.name, self.shards)

    def to(self, parameter: Tensor) -> Whole:
        """The same in the parameter's precision, on its device."""
        return Whole(self.inner.to(parameter), self.name, self.shards)

    def _on(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        (whole,) = self.shards.gather([self.name], [tensor])
        return self.shards.part(self.name, function(whole))


@dataclass(frozen=True)
class Across:
    """P^(-1/2) of one parameter as a map of whole tensors, where it is held on slices.

    Args:
        inner: on slices.
    """

    inner: InverseRoot
    name: str
    shards: Shards

    def apply(self, tensor: Tensor) -> Tensor:
        """P^(-1/2) x for a whole x, which all processes have; they call it alike."""
        (found,) = self.shards.gather([self.name], [self.inner.apply(self.shards.part(self.name, tensor))])
        return found


def across(root: InverseRoot, name: str, shards: Shards | None) -> InverseRoot | Across:
    """As it acts on whole tensors; itself where that is what it does."""
    return root if shards is None else Across(root, name, shards)


def sliced(root: InverseRoot, name: str, shards: Shards | None) -> InverseRoot:
    """P^(-1/2) of one parameter as it acts on what is held of it here; itself where that is all."""
    if shards is None or isinstance(root, Multiple):
        return root
    if isinstance(root, Diagonal):
        shape = shards.shapes[name]  # which P may have by broadcasting alone
        never = None if root.never is None else shards.part(name, root.never.expand(shape))
        return Diagonal(shards.part(name, root.entries.expand(shape)), never)
    return Whole(root, name, shards)


@dataclass(frozen=True)
class SlicedMax(MaxNorm):
    """The max-norm's ball on slices: signs are a matter of entries, and the l1 norm is a sum over the processes."""

    holders: Ranks = ALONE

    def dual(self, tensor: Tensor) -> float:
        """radius times the sum of magnitudes, of all slices; all processes call it alike."""
        return sum(self.holders.each(super().dual(tensor)))


@dataclass(frozen=True)
class WholeBall:
    """The ball of a norm that is no matter of entries, on slices: the parameter is gathered, and all processes do the same.

    Args:
        inner: of the whole parameter.
    """

    inner: Ball
    name: str
    shards: Shards

    @property
    def radius(self) -> float:
        """Of the whole parameter's ball."""
        return self.inner.radius

    def steepest(self, tensor: Tensor) -> Tensor:
        """The slice of a d of the ball for which <x, d> is largest, for a slice of x."""
        return self.shards.part(self.name, self.inner.steepest(self._whole(tensor)))

    def dual(self, tensor: Tensor) -> float:
        """The dual norm of the whole."""
        return self.inner.dual(self._whole(tensor))

    def scaled(self, factor: float) -> WholeBall:
        """The ball of a step that is so many times as long."""
        return replace(self, inner=self.inner.scaled(factor))

    def _whole(self, tensor: Tensor) -> Tensor:
        return self.shards.gather([self.name], [tensor])[0]


def sliced_ball(ball: Ball, name: str, shards: Shards | None) -> Ball:
    """The ball of one parameter as it acts on what is held of it here; itself where that is all."""
    if shards is None:
        return ball
    return SlicedMax(ball.radius, shards.ranks) if isinstance(ball, MaxNorm) else WholeBall(ball, name, shards)
