"""The solves: full model on parts of the shard, layers, depths, the next update. Raw pairs, no document."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from curvcli.curvature import resources
from curvcli.curvature.davidson import Davidson, Extremes
from curvcli.curvature.hvp import HVP, Choice, Mode, build, choose
from curvcli.curvature.operator import PreconditionedHessian
from curvcli.curvature.problem import Blocks, Problem, gradient
from curvcli.documents import Update
from curvcli.errors import OutOfTime
from curvcli.optimizers.preconditioner import Preconditioner
from curvcli.optimizers.update import next_update

Progress = Callable[[str, float], None]


@dataclass
class Solved:
    """An estimate's raw form: the pairs, and the names that its vectors run over."""

    names: list[str]
    extremes: Extremes | None
    inconsistent: bool = False
    skipped: bool = False

    @property
    def converged(self) -> bool:
        """Whether the top pair met its tolerance, and no part of these parameters came out above it."""
        return self.extremes is not None and self.extremes.status == "converged" and not self.inconsistent

    @property
    def value(self) -> float:
        """Largest Ritz value, a lower bound of the largest eigenvalue; -inf where there is no pair."""
        top = self.extremes.top if self.extremes else None
        return top.value if top else float("-inf")

    @property
    def slack(self) -> float:
        """Residual of the top pair, in units of the eigenvalue; 0 where there is no pair."""
        top = self.extremes.top if self.extremes else None
        return top.residual if top else 0.0


@dataclass(frozen=True)
class Measured:
    """What was found. `prefixes` pairs shares of the shard with solves on them, the last the full model.

    `ends` are the parameters outside the layers, as one part; None where there are no layers.
    """

    loss: float
    prefixes: list[tuple[float, Solved]]
    held_out: float | None
    full: Solved
    update: Update
    ends: Solved | None
    layers: list[Solved]
    restricted: list[Solved]
    truncated: list[Solved]


class Measurement:
    """One analysis in progress; `run` does it."""

    def __init__(
        self,
        problem: Problem,
        preconditioner: Preconditioner,
        blocks: Blocks | None,
        solver: Davidson,
        mode: Mode | Literal["auto"],
        progress: Progress,
        *,
        depths: bool = True,
    ) -> None:
        self.problem, self.preconditioner, self.blocks = problem, preconditioner, blocks
        self.solver, self.depths = solver, depths
        self.started = time.perf_counter()
        self.hvps = 0
        self.stages = _Stages(len(blocks.modules) if blocks else 0, progress, depths)
        self.names = [n for n in problem.parameters if n in preconditioner.root]
        of_block = [{id(p) for p in block.parameters()} for block in (blocks.modules if blocks else ())]
        self.layer_names = [[n for n in self.names if id(problem.parameters[n]) in ids] for ids in of_block]
        inside = {n for names in self.layer_names for n in names}
        self.outer = [n for n in self.names if n not in inside]
        device = next(iter(problem.parameters.values())).device
        resources.reset_peak(device)
        self.stages.enter("choosing how to multiply")
        self.choice: Choice = choose(problem, mode=mode, memory=resources.free_bytes(device))
        size = sum(problem.parameters[n].numel() for n in self.names)
        itemsize = next(iter(problem.parameters.values())).element_size()
        room = int(resources.free_bytes(device) / 4 / (2 * size * itemsize))
        self.solver = replace(solver, basis=min(max(room, 6), 24))
        self.device = device

    # --- solving -----------------------------------------------------------------------------

    def operator(self, hvp: HVP, names: Sequence[str]) -> PreconditionedHessian:
        """G restricted to `names`, on flat vectors in the order of `names`, with the products of `hvp`.

        Raises ValueError where `names` is empty.
        """
        return PreconditionedHessian(hvp, self.preconditioner.root.restrict(names), self.preconditioner.decay)

    @property
    def coarse(self) -> Davidson:
        """The solver of layers, truncated networks and parts of the shard, at three times the tolerance.

        The smallest eigenvalue's is twice its own. Errors go with the residual's square, and no verdict hangs on them.
        All restricted depths, the full model last, are solved to the tolerance itself.
        """
        return replace(self.solver, tolerance=3 * self.solver.tolerance, bottom_tolerance=2 * self.solver.bottom_tolerance)

    def solve(self, hvp: HVP, names: list[str], start: Sequence[tuple[Sequence[str], Tensor]] = ()) -> Solved:
        """Both ends of the spectrum over `names`, from vectors over other names carried over."""
        if not names:
            return Solved(names, None)
        self.in_time()
        operator = self.operator(_Counting(hvp, self), names)
        vectors = [self.carry(operator, source, vector) for source, vector in start]
        return Solved(names, self.coarse.extremes(operator, vectors))

    def in_time(self) -> None:
        """Raises OutOfTime where nothing more may be started."""
        if self.solver.expired:
            raise OutOfTime

    def carry(self, operator: PreconditionedHessian, names: Sequence[str], vector: Tensor) -> Tensor:
        """A flat vector over `names` as one over the operator's parameters: cut to them, 0 on those that it lacks."""
        return operator.root.carry(vector, self.preconditioner.root.restrict(names))

    def ends(self, *solved: Solved) -> list[tuple[Sequence[str], Tensor]]:
        """Start vectors: the eigenvectors found at both ends."""
        found = [(s.names, s.extremes) for s in solved if s.extremes]
        return [(names, pair.vector) for names, e in found for pair in (e.top, e.bottom) if pair]

    # --- the parts ---------------------------------------------------------------------------

    def run(self) -> Measured:
        """Everything, in the order in which each solve can start from the last.

        Under a deadline the full model comes first, and what is not reached is skipped. Raises OutOfTime where
        not even the full model was reached.
        """
        self.stages.enter("gradient")
        gradients = gradient(self.problem, self.names)
        loss = self.problem.mean_loss()
        hvp = build(self.problem, self.choice.mode)
        prefixes, held_out = self.prefixes(hvp)
        hint = prefixes[-1][1] if prefixes else None
        full = self.full(hvp, hint) if self.solver.deadline < float("inf") or not self.depths else None
        update = Update(critical_lr=None, ratio=None, status="skipped")
        ends: list[Solved] = []
        layers: list[Solved] = []
        restricted: list[Solved] = []
        truncated: list[Solved] = []
        try:
            update = self.update(hvp, gradients)
            ends.extend(self.outside(hvp, full or hint))
            layers.extend(self.layers(hvp, full or hint))
            if self.depths:
                restricted.extend(self.restricted(hvp, full or hint, ends, layers))
                del hvp  # its graphs make room for those of the shortened networks
                truncated.extend(self.truncated(restricted[-1]))
        except OutOfTime:  # what was finished has been added one by one
            pass
        self.stages.enter("report")
        if ends and restricted:  # the same parameters once more, with other start vectors
            ends[0].inconsistent = violates(restricted[0], ends[0])
        full = self.best(full, [*ends, *layers], restricted)
        prefixes.append((1.0, full))
        self.skip(ends, layers, restricted, truncated, full)
        outside = ends[0] if ends else None
        return Measured(loss, prefixes, held_out, full, update, outside, layers, restricted, truncated)

    def full(self, hvp: HVP, hint: Solved | None) -> Solved:
        """The full model on its own, to the tolerance itself."""
        self.stages.enter("full model")
        self.in_time()
        operator = self.operator(_Counting(hvp, self), self.names)
        start = [self.carry(operator, *end) for end in (self.ends(hint) if hint else [])]
        return Solved(self.names, self.solver.extremes(operator, start) if self.names else None)

    def best(self, full: Solved | None, parts: list[Solved], restricted: list[Solved]) -> Solved:
        """The full model as the restricted curve ends in it; where that was cut short, as it was solved for first."""
        whole = len(restricted) == len(self.layer_names) + 1
        if full is None or (whole and restricted[-1].converged):
            return restricted[-1]
        full.inconsistent = any(violates(part, full) for part in (*parts, *restricted))
        return full

    def skip(
        self, ends: list[Solved], layers: list[Solved], restricted: list[Solved], truncated: list[Solved], full: Solved
    ) -> None:
        """Entries for what was not reached; the truncated curve ends in the full model, which was."""
        depths = len(self.layer_names)
        if self.layer_names and not ends:
            ends.append(Solved(self.outer, None, skipped=True))
        layers += [Solved(names, None, skipped=True) for names in self.layer_names[len(layers) :]]
        if not self.depths:
            return
        restricted += [Solved(self.upto(k), None, skipped=True) for k in range(len(restricted), depths + 1)]
        if self.blocks and self.blocks.truncation:
            truncated += [Solved(self.upto(k), None, skipped=True) for k in range(len(truncated), depths)]
            truncated.append(full)

    def prefixes(self, hvp: HVP) -> tuple[list[tuple[float, Solved]], float | None]:
        """The full model on growing prefixes of the shard, each warm from the last; and the held-out quotient."""
        count = len(self.problem.batches)
        half = -(-count // 2)
        solved: list[tuple[float, Solved]] = []
        held_out: float | None = None
        for prefix in sorted({-(-count // 4), half} - {count}):
            self.stages.enter("full model on part of the shard")
            part = hvp.subset(range(prefix))
            answer = self.solve(part, self.names, self.ends(*[s for _, s in solved[-1:]]))
            solved.append((sum(self.problem.weights[:prefix]), answer))
            if prefix == half and answer.extremes and answer.extremes.top:
                rest = self.operator(_Counting(hvp.subset(range(prefix, count)), self), self.names)
                vector = answer.extremes.top.vector
                quotient = float(vector @ rest.matvec(vector))
                held_out = quotient if abs(quotient) < float("inf") else None
        return solved, held_out

    def update(self, hvp: HVP, gradients: list[Tensor]) -> Update:
        """Curvature along the optimizer's own next step (one product)."""
        self.stages.enter("next update")
        return next_update(self.problem, self.preconditioner, _Counting(hvp, self), self.names, gradients)

    def outside(self, hvp: HVP, hint: Solved | None) -> Iterator[Solved]:
        """Embedding, head and what else lies outside the blocks, alone, where there are blocks."""
        if self.layer_names:
            self.stages.enter("embedding, head")
            yield self.solve(hvp, self.outer, self.ends(*([hint] if hint else [])))

    def layers(self, hvp: HVP, hint: Solved | None) -> Iterator[Solved]:
        """Each block alone, the rest of the network held still."""
        for i, names in enumerate(self.layer_names):
            self.stages.enter(f"layer {i}")
            yield self.solve(hvp, names, self.ends(*([hint] if hint else [])))

    def restricted(self, hvp: HVP, hint: Solved | None, outside: list[Solved], layers: list[Solved]) -> Iterator[Solved]:
        """Embedding, head and the first k blocks of the intact network; the last is the full model.

        One basis serves all depths, so the curve cannot fall. It takes in each block's own top
        vector, so that it does not stay under any of its blocks either (Cauchy interlacing).
        """
        operator = self.operator(_Counting(hvp, self), self.names)
        depths = range(len(layers) + 1)

        def supports() -> Iterator[tuple[Tensor, list[Tensor]]]:
            for depth in depths:
                last = depth == depths[-1]
                self.stages.enter("full model" if last else f"restricted to depth {depth}")
                self.in_time()
                mask = operator.root.mask(self.upto(depth))
                ends = self.ends(*([hint] if hint else []))
                start = ends if depth == 0 or last else ends[:1]
                start += self.ends(layers[depth - 1])[:1] if depth else self.ends(*outside)[:1]
                yield mask, [self.carry(operator, names, vector) * mask for names, vector in start]

        below: list[Solved] = []  # the depth before
        for depth, extremes in zip(depths, self.solver.nested(operator, supports()), strict=True):
            solved = Solved(self.names if self.upto(depth) else [], extremes)
            solved.inconsistent = any(violates(part, solved) for part in [*below, *outside, *layers[:depth]])
            yield solved
            below = [solved]

    def truncated(self, full: Solved) -> Iterator[Solved]:
        """The network of the first k blocks alone, up to the full model."""
        if not self.blocks or not self.blocks.truncation:
            return
        last: list[Solved] = []
        for depth in range(len(self.layer_names)):
            self.stages.enter(f"truncated at depth {depth}")
            self.in_time()
            hvp = build(self.problem.truncated(self.blocks, depth), self.choice.mode)
            solved = self.solve(hvp, self.upto(depth), self.ends(full, *last))
            yield solved
            last = [solved]

    def upto(self, depth: int) -> list[str]:
        """Parameters outside the layers and in the first `depth` of them, in the model's order."""
        inside = {n for names in self.layer_names[:depth] for n in names} | set(self.outer)
        return [n for n in self.names if n in inside]


class _Counting:
    """An engine that counts its products and moves the progress on."""

    def __init__(self, hvp: HVP, work: Measurement) -> None:
        self.hvp, self.work = hvp, work

    def product(self, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
        self.work.hvps += 1
        self.work.stages.tick()
        return self.hvp.product(names, tangents)

    def subset(self, indices: Sequence[int]) -> HVP:
        return _Counting(self.hvp.subset(indices), self.work)


class _Stages:
    """Progress in stages whose cost is guessed beforehand in products of the full model."""

    def __init__(self, layers: int, progress: Progress, depths: bool) -> None:
        self.progress = progress
        self.total = 14.0 + (6 if layers else 0) + layers * (6 + (5 + 5 if depths else 0))
        self.done, self.planned, self.ticks, self.name = 0.0, 0.0, 0, ""

    def enter(self, name: str) -> None:
        self.done += self.planned
        kind = name.split()[0]
        self.planned = {"full": 4.0, "embedding,": 6.0, "layer": 6.0, "restricted": 5.0, "truncated": 5.0}.get(kind, 1.0)
        self.ticks, self.name = 0, name
        self._say()

    def tick(self) -> None:
        self.ticks += 1
        self._say()

    def _say(self) -> None:
        # Within a stage: towards its planned cost and never past it, however many products it takes.
        within = self.planned * (1 - 0.75**self.ticks)
        self.progress(self.name, min((self.done + within) / self.total, 1.0))


def violates(lower: Solved, upper: Solved) -> bool:
    """Whether `upper`, over more parameters, came out below `lower` by more than rounding."""
    if lower.extremes is None or upper.extremes is None or lower.inconsistent:
        return False
    return upper.value < lower.value - upper.slack - 1e-5 * abs(lower.value)
