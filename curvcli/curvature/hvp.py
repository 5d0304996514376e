"""Hessian-vector products, exact, by three routes; the first that fits and agrees on the real problem is used.

Reverse over forward, `torch.func.linearize` and `functional_call` under gradient checkpointing are
silently wrong on common models (pytorch#196700) and are not among them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvcli.curvature import resources
from curvcli.curvature.precision import norm
from curvcli.curvature.problem import Problem
from curvcli.curvature.ranks import Ranks
from curvcli.curvature.selftest import check_second_derivative
from curvcli.curvature.standin import StandIn
from curvcli.curvature.threads import in_order
from curvcli.errors import OutOfMemoryError, UnsupportedError, exhausted, memory_named, shortage

Mode = Literal["kept", "fresh", "forward", "differences"]  # the last is no exact one: differences.py
MODES: tuple[Mode, ...] = ("kept", "fresh", "forward")  # the exact ones, in the order in which they are tried


class HVP(Protocol):
    """Products with the Hessian of a problem's mean loss, restricted to named parameters."""

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        """H v for v zero outside `names`, read off at `names`; tensors in the parameters' shapes."""
        ...

    def subset(self, indices: Sequence[int]) -> HVP:
        """The same for the mean loss over some of the batches."""
        ...

    def part(self) -> HVP:
        """What the batches of this process add to the products: all, where it is alone."""
        ...


class Summed:
    """Products that several processes make together, each on its batches.

    Args:
        hvp: that gives what this process' batches add.
        ranks: the processes.
    """

    def __init__(self, hvp: HVP, ranks: Ranks) -> None:
        self.hvp, self.ranks = hvp, ranks

    def subset(self, indices: Sequence[int]) -> HVP:
        """The same batches of each process' engine."""
        return Summed(self.hvp.subset(indices), self.ranks)

    def part(self) -> HVP:
        """The engine of this process' batches."""
        return self.hvp

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        """Each process' part, summed; the same in all."""
        found = self.hvp.product(names, tangents)
        self.ranks.sum_(found)
        return found


class _Engine:
    """An engine whose products are over the batches of this process alone."""

    def part(self) -> HVP:
        """Itself."""
        return self  # type: ignore[return-value]


def _accumulate(total: list[Tensor], parts: Sequence[Tensor | None], weight: float) -> None:
    for accumulated, part in zip(total, parts, strict=True):
        if part is not None:
            accumulated.add_(part, alpha=weight)


@contextmanager
def taken(inputs: Sequence[Tensor], take: Callable[[int, Tensor], object]) -> Iterator[None]:
    """Within it, a gradient of an input is handed over once it is complete, and what autograd.grad returns is 0.

    So there is no moment at which the gradients of all of them are in memory.
    """

    def hook(index: int) -> Callable[[Tensor], Tensor]:
        def once(gradient: Tensor) -> Tensor:
            take(index, gradient)
            return gradient.detach().new_zeros(()).expand(gradient.shape)  # which takes the room of one entry

        return once

    handles = [tensor.register_hook(hook(index)) for index, tensor in enumerate(inputs)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradient_edges(problem: Problem, index: int, names: Sequence[str]) -> dict[str, GradientEdge]:
    """Where the graph of one batch's gradient ends, by parameter, of those whose gradient can be differentiated.

    An edge holds the graph, and not the gradient itself, whose numbers nobody needs.
    """
    found: dict[str, GradientEdge] = {}

    def take(place: int, gradient: Tensor) -> None:
        if gradient.requires_grad:  # one that depends on no parameter has no graph, and its rows of H are 0
            found[names[place]] = get_gradient_edge(gradient)

    inputs = [problem.parameters[n] for n in names]
    loss = problem.batch_loss(index)
    with taken(inputs, take):
        torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    return found


def _add_derivative(
    total: dict[str, Tensor],
    weight: float,
    parameters: dict[str, Tensor],
    edges: dict[str, GradientEdge],
    tangents: Mapping[str, Tensor],
    *,
    keep: bool,
) -> None:
    """Backward from the gradient of one batch along tangents, times a weight, added up."""
    sums, inputs = list(total.values()), [parameters[n] for n in total]
    with taken(inputs, lambda place, part: sums[place].add_(part, alpha=weight)):
        _derivative(edges, inputs, tangents, keep=keep)


def _derivative(
    edges: dict[str, GradientEdge], inputs: Sequence[Tensor], tangents: Mapping[str, Tensor], *, keep: bool = True
) -> Sequence[Tensor | None]:
    """Backward from the gradient of one batch along tangents; None for inputs that it does not depend on."""
    names = [n for n in tangents if n in edges]
    if not names:
        return [None] * len(inputs)
    outputs, vectors = [edges[n] for n in names], [tangents[n] for n in names]
    return torch.autograd.grad(outputs, inputs, vectors, retain_graph=keep, allow_unused=True)


class KeptGraph(_Engine):
    """Double backward through a gradient graph that is built once per batch and kept.

    Cheapest per product, and holds the activations of every batch. One graph of all parameters
    serves every restriction: autograd walks only what leads from the named gradients to the named
    parameters, so the last block costs a fraction of the whole.

    Args:
        threads: whether batches may be walked at the same time (`threads.in_order`), each with a gradient of its own.
    """

    def __init__(self, problem: Problem, *, threads: bool = False) -> None:
        self.weights, self.threads = problem.weights, threads
        self.parameters = problem.parameters
        names, own = list(self.parameters), set(problem.own)
        # Batches of other ranks get an empty entry, so that indices mean the same on all ranks.
        self.gradients = [_gradient_edges(problem, i, names) if i in own else {} for i in range(len(problem.batches))]

    def subset(self, indices: Sequence[int]) -> KeptGraph:
        """Shares the graphs of the chosen batches: nothing is computed again."""
        part = copy(self)
        total = sum(self.weights[i] for i in indices)
        part.weights = [self.weights[i] / total for i in indices]
        part.gradients = [self.gradients[i] for i in indices]
        return part

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        """Walks the kept graphs backward, and leaves them for the next product."""
        total = {n: torch.zeros_like(self.parameters[n]) for n in names}
        along = dict(zip(names, tangents, strict=True))
        if self.threads:
            sums, inputs = list(total.values()), [self.parameters[n] for n in names]
            walks = [partial(_derivative, edges, inputs, along) for edges in self.gradients]
            in_order(walks, lambda i, parts: _accumulate(sums, parts, self.weights[i]))
            return sums
        for weight, edges in zip(self.weights, self.gradients, strict=True):
            _add_derivative(total, weight, self.parameters, edges, along, keep=True)
        return list(total.values())


class FreshGraph(_Engine):
    """Double backward, forward and gradient recomputed for every product: one batch in memory at a time."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.parameters = problem.parameters

    def subset(self, indices: Sequence[int]) -> FreshGraph:
        """Holds no graphs, so this only selects batches and scales their weights to sum to 1."""
        return FreshGraph(self.problem.subset(indices))

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        """Builds the gradient graph of one batch, walks it backward, and drops it before the next."""
        total = {n: torch.zeros_like(self.parameters[n]) for n in names}
        along = dict(zip(names, tangents, strict=True))
        for i in self.problem.own:
            edges = _gradient_edges(self.problem, i, names)
            _add_derivative(total, self.problem.weights[i], self.parameters, edges, along, keep=False)
            del edges  # before the next batch's are made
        return list(total.values())


class ForwardOverReverse(_Engine):
    """jvp of the gradient. Fails on models with old custom autograd functions (Bloom, grouped_mm experts)."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.parameters = problem.parameters

    def subset(self, indices: Sequence[int]) -> ForwardOverReverse:
        """Holds no graphs, so this only selects batches and scales their weights to sum to 1."""
        return ForwardOverReverse(self.problem.subset(indices))

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        """Pushes the tangents through the gradient in forward mode, one batch after the other.

        Raises what the model raises where it cannot be transformed, as for a loss that reaches inside the model.
        """
        inputs = tuple(self.parameters[n].detach() for n in names)
        total = [torch.zeros_like(p) for p in inputs]
        for i in self.problem.own:

            def loss(*values: Tensor, batch: object = self.problem.batches[i]) -> Tensor:
                stand_in = StandIn(self.problem.model, dict(zip(names, values, strict=True)))
                return self.problem.loss(stand_in, batch)

            with self.problem.scope(), sdpa_kernel(SDPBackend.MATH):
                parts = jvp(grad(loss, argnums=tuple(range(len(inputs)))), inputs, tuple(tangents))[1]
            _accumulate(total, parts, self.problem.weights[i])
        return total


def timed(engine: HVP, names: Sequence[str], tangents: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """A product and the seconds that it took."""
    resources.synchronize(tangents[0].device)
    start = time.perf_counter()
    found = engine.product(names, tangents)
    resources.synchronize(tangents[0].device)
    return found, time.perf_counter() - start


def graph_bytes(problem: Problem, *, cut_short: bool = False, once: bool = False) -> int:
    """Bytes that the kept graph of the first batch holds beside parameters, counted once per storage as it is saved.

    Args:
        cut_short: where memory runs out, what was held by then, in place of the allocator's error.
        once: of the loss alone, whose gradient is not differentiated again.
    """
    seen: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in problem.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        # A sparse one, which has no storage of its own, is the network's as a rule and no activation.
        if tensor.layout is torch.strided and (storage := tensor.untyped_storage()).data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs, streamed = list(problem.parameters.values()), problem.streamed
    try:
        # Where blocks are gathered one at a time their weights are no part of it, and gradients are not to pile up.
        watched = saved_tensors_hooks(pack, lambda t: t) if streamed is None else streamed.watched(pack)
        with watched, nullcontext() if streamed is None else taken(inputs, lambda place, gradient: None):
            torch.autograd.grad(problem.batch_loss(0), inputs, create_graph=not once, allow_unused=True)
    except (RuntimeError, MemoryError) as error:
        if not (cut_short and exhausted(error)):
            raise
    return sum(seen.values())


@dataclass(frozen=True)
class Choice:
    """The mode taken: seconds of a product on the first batch by it, and why modes before it fell out."""

    mode: Mode
    seconds: dict[Mode, float]
    refused: dict[Mode, str]


def choose(
    problem: Problem, *, mode: Mode | Literal["auto"] = "auto", memory: float = float("inf"), graphs: float | None = None
) -> Choice:
    """The first of the exact modes that has room, works on the first batch, and agrees with fresh double backward.

    A rule and no race: kept graphs were never slower than fresh ones (benchmarks/hvp_cost.py), timings are noisy, modes
    round differently, and the same analysis is to give the same digits twice.

    Args:
        problem: what will be measured, or a part of it that is like the rest: only the first batch is looked at.
        mode: a mode to insist on, or "auto".
        memory: bytes that kept graphs of all batches of a process may take.
        graphs: how many of the first batch's they are; by default one for each batch of `problem`.

    Raises:
        UnsupportedError: no mode works, or none agrees.
    """
    first = problem.subset([0]).alone()  # ranks may take different modes here, and must not speak in one
    graphs = problem.most if graphs is None else graphs
    names, tangents = list(problem.parameters), random_direction(problem)
    seconds: dict[Mode, float] = {}
    refused: dict[Mode, str] = {}
    try:
        with memory_named("in a Hessian-vector product"):
            reference = FreshGraph(first).product(names, tangents)  # right on every architecture tried
    except RuntimeError as error:  # NotImplementedError among them
        raise UnsupportedError(
            f"this model has no second derivative here: {str(error).splitlines()[0][:200]}",
            hint="use eager or math attention, without torch.compile or checkpointing; or --mode differences",
        ) from error
    if not any(g.any() for g in reference) and _has_gradient(first):
        # A kernel marked once_differentiable yields nothing, rather than an error, when differentiated again.
        raise UnsupportedError(
            "every second derivative of this model is zero or missing",
            hint="a custom or fused kernel is differentiable once only: use eager implementations, or --mode differences",
        )
    check_second_derivative(first, tangents, reference)
    scale = norm(reference)
    for candidate in MODES if mode == "auto" else (mode,):
        try:
            if candidate == "kept" and (need := graph_bytes(first) * graphs) > memory:
                refused[candidate] = (
                    f"out of memory: its graphs need {need / 2**30:.3g} GiB of {memory / 2**30:.3g} GiB free"
                )
                continue
            engine = build(first, candidate)
            answer, seconds[candidate] = timed(engine, names, tangents)
        except Exception as error:  # whatever a model's own code raises under this mode rules the mode out
            said = str(error).splitlines()[0][:120] if str(error) else ""
            refused[candidate] = (
                f"out of memory: {shortage(error)}" if exhausted(error) else f"{type(error).__name__}: {said}"
            )
            continue
        difference = norm([a - b for a, b in zip(answer, reference, strict=True)])
        # Exact modes differ by float32's rounding alone; those known to be wrong are 3 to 21 % off. NaN is refused, too.
        if not difference <= 1e-3 * max(scale, 1e-30):
            refused[candidate] = f"differs from double backward by {difference / max(scale, 1e-30):.1e}"
            del seconds[candidate]
            continue
        # Where one process has to take a leaner mode, all do.
        return Choice(MODES[int(max(problem.ranks.each(MODES.index(candidate))))], seconds, refused)
    if all(why.startswith("out of memory") for why in refused.values()):
        raise OutOfMemoryError("; ".join(f"mode {m} is {why}" for m, why in refused.items()), hint="try --mode fresh")
    raise UnsupportedError(
        "no exact mode of Hessian-vector products works on this model: "
        + ", ".join(f"{m}: {why}" for m, why in refused.items()),
        hint="try --mode fresh with smaller --batch-size",
    )


def random_direction(problem: Problem) -> list[Tensor]:
    """A tangent for every parameter, the same at every call, each tensor of norm about 1."""
    parameters = list(problem.parameters.values())
    # A GPU draws for itself: a CPU would take longer than a dozen of its products.
    generator = torch.Generator(parameters[0].device if parameters[0].is_cuda else "cpu").manual_seed(0)
    # Drawn in one precision, whatever the default is; of norm 1, or an error in a tensor of few entries would not show.
    drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float32, device=generator.device) for p in parameters]
    return [d.to(p) / max(p.numel(), 1) ** 0.5 for d, p in zip(drawn, parameters, strict=True)]


def _has_gradient(problem: Problem) -> bool:
    inputs = list(problem.parameters.values())
    parts = torch.autograd.grad(problem.batch_loss(0), inputs, create_graph=True, allow_unused=True)
    return any(part is not None and part.requires_grad for part in parts)  # none where the loss is linear


def build(problem: Problem, mode: Mode, *, threads: bool = False) -> HVP:
    """The product engine of a mode. Building "kept" costs about two gradients.

    Args:
        threads: whether kept graphs may be walked at the same time. Other modes call the model, which threads may not.
    """
    engines: dict[Mode, Callable[[Problem], KeptGraph | FreshGraph | ForwardOverReverse]] = {
        "kept": partial(KeptGraph, threads=threads),
        "fresh": FreshGraph,
        "forward": ForwardOverReverse,
    }
    engine = engines[mode](problem)
    return engine if problem.ranks.world == 1 else Summed(engine, problem.ranks)
