"""The solves: full model, next update, layers, depths. Raw values, no document."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from math import inf, isfinite
from typing import Literal

import torch

from curvcli.analysis.companions import companions
from curvcli.analysis.counting import Counting, count
from curvcli.analysis.curve import curve
from curvcli.analysis.cuts import Cut
from curvcli.analysis.engines import chosen, engine, mean_gradient
from curvcli.analysis.measured import Measured, Solved, violates
from curvcli.analysis.plan import LEAST, WORKING, unplanned
from curvcli.analysis.stages import Progress, Stages, products
from curvcli.analysis.steepest import Steep
from curvcli.analysis.whole import Whole
from curvcli.curvature import resources
from curvcli.curvature.hvp import HVP, Choice, Mode
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.operator import LARGE, Folded, Operator, PreconditionedHessian
from curvcli.curvature.problem import Blocks, Problem
from curvcli.curvature.ranks import agreed
from curvcli.curvature.ritz import Extremes
from curvcli.curvature.scratch import Put, Scratch, elsewhere
from curvcli.curvature.stepped import suited
from curvcli.errors import FullDiskError, OutOfTime, UnsupportedError
from curvcli.models.blocks import no_truncation, runs_at
from curvcli.models.rows import Lookups, lookups
from curvcli.optimizers.preconditioner import Preconditioner
from curvcli.optimizers.update import next_update, ratios

FOLDS = 8  # parts of the shard that the full model is seen on, at most


class Measurement:
    """One analysis in progress; `run` does it.

    Args:
        threads: batches are walked by several threads though the basis is given: another measurement chose both.
    """

    def __init__(
        self,
        problem: Problem,
        preconditioner: Preconditioner,
        blocks: Blocks | None,
        solver: Lanczos,
        mode: Mode | Literal["auto"],
        progress: Progress,
        *,
        depths: bool = True,
        truncated: bool | None = None,
        unigram: float | None = None,
        basis: int | None = None,
        offload: bool = False,
        aside: Scratch | None = None,
        threads: bool = False,
    ) -> None:
        self.problem, self.preconditioner, self.blocks = problem, preconditioner, blocks
        self.depths = depths
        self.put: Put = aside.put if aside else list  # where vectors lie that are needed later
        self.shards = preconditioner.root.shards
        self.held: Callable[[], AbstractContextManager[None]] | None = None
        self.started = time.perf_counter()
        self.hvps = 0.0
        self.peak = 0  # bytes, of the process that held most
        self.full_disk: FullDiskError | None = None  # what ended it
        self.notes: dict[str, str] = {}
        layers = len(blocks.modules) if blocks else 0
        norm = bool(preconditioner.balls)
        self.stages = Stages(progress, products(layers, depths=depths, norm=norm))
        # What moves, and of it what lambda and rho are of: the rest has a norm instead of a P.
        self.moving = [n for n in problem.parameters if n in preconditioner.moving]
        self.names = [n for n in self.moving if n in preconditioner.root]
        of_block = [{id(p) for p in block.parameters()} for block in (blocks.modules if blocks else ())]
        self.layer_moving = [[n for n in self.moving if id(problem.parameters[n]) in ids] for ids in of_block]
        self.layer_names = [[n for n in names if n in preconditioner.root] for names in self.layer_moving]
        inside = {n for names in self.layer_moving for n in names}
        self.outer_moving = [n for n in self.moving if n not in inside]
        self.outer = [n for n in self.outer_moving if n in preconditioner.root]
        self.device = device = next(iter(problem.parameters.values())).device
        self.stages.enter("choosing how to multiply")
        self.solver = solver
        self.in_time()
        self.ranks = problem.ranks
        free = self._free(device)
        # Else it would hold eight whole vectors, as a basis that lies in memory has room for.
        short = aside is not None and (offload or (basis or LEAST) < LEAST)
        vector = sum(problem.parameters[n].nbytes for n in self.names) or 1  # nothing has a P: no basis is needed
        vector = -(-vector // self.ranks.world) if self.shards else vector
        # Graphs leave room for vectors. Under a limit of memory plan.py has chosen the mode already.
        moved = sum(problem.parameters[n].nbytes for n in self.moving)  # also those that have a norm and no P
        room = inf if basis is not None else free if mode == "kept" else max(free - WORKING * moved - LEAST * vector, 0.0)
        self.choice: Choice = chosen(problem, self.shards, mode, room, lean=short)
        # Small tensors, of which torch makes little, and results that each thread may hold; not slices, which all gather.
        small = device.type == "cpu" and basis is None and self.shards is None and moved < LARGE
        self.threads = (small or threads) and self.choice.mode == "kept"
        if basis is None:
            basis, offload = unplanned(problem, vector, self._free(device), solver.max_products)
        found = replace(solver, basis=basis, store=elsewhere(device) if offload else None)
        self.solver, self.step = suited(found, self.choice.mode)
        self.cut: Cut | None = None  # where its losses decide
        self.cuts = self._cuts(truncated, unigram)
        self.stages.total = products(layers, depths=depths, truncated=self.cuts, norm=norm)

    def _free(self, device: torch.device) -> float:
        """Memory that each process can plan with: that of the one that has least."""
        return min(self.ranks.each(resources.free_bytes(device) / (self.ranks.here if device.type == "cpu" else 1)))

    def _cuts(self, truncated: bool | None, unigram: float | None) -> bool:
        """Whether networks cut short are measured: where that is asked for, or near initialisation."""
        if not (self.names and self.depths and self.layer_names and self.blocks and self.blocks.truncation):
            return False
        if truncated is None:
            # Of minus a loss frequencies say nothing.
            self.cut = Cut.of(self.problem, self.blocks, None if self.preconditioner.ascends else unigram)
            truncated = self.cut.means
        # `survey` has tried a few depths; one that does not run is not to end an analysis that is nearly done.
        if truncated and not runs_at(self.problem, self.blocks, range(len(self.blocks.modules))):
            self.notes |= no_truncation(self.blocks)
            self.cut, truncated = None, False
        return truncated

    # --- solving -----------------------------------------------------------------------------

    def operator(self, hvp: HVP, names: Sequence[str], of: int = 1) -> PreconditionedHessian:
        """G restricted to `names`, on flat vectors in the order of `names`, with the products of `hvp`.

        Args:
            of: so many processes, whose products are summed: each has its part of the decay.

        Raises:
            ValueError: `names` is empty.
        """
        root = self.preconditioner.root.restrict(names)
        decay = {name: found / of for name, found in self.preconditioner.decay.items()}
        return PreconditionedHessian(hvp, root, decay)

    def folded(self, hvp: HVP) -> Folded:
        """G of the full model, or of some of its entries, as the mean of those of the shard's folds."""
        of = 1 if self.shards else self.ranks.world
        weights, given = self.problem.weights, self.problem.given
        folds: list[tuple[float, Operator]] = []
        # Folds are runs of neighbouring batches: these are alike, and would tie interleaved folds to each other.
        for those in torch.arange(len(given)).tensor_split(min(FOLDS, len(given))):
            part = [i for which in those.tolist() for i in given[which]]
            share = sum(weights[i] for i in part)
            folds.append((share, self.operator(hvp.subset(part).part(), self.names, of=of)))
        return Folded(folds, self.ranks, self.held, put=self.put, done=partial(count, self), threads=self.threads)

    def build(self, problem: Problem) -> HVP:
        """Products with the Hessian of a problem's mean loss, on slices where processes divide the parameters."""
        found, self.held = engine(problem, self.choice.mode, self.step, self.shards, threads=self.threads)
        return found

    @property
    def coarse(self) -> Lanczos:
        """The solver of layers and truncated networks, on which no verdict hangs: errors go with the residual's square."""
        return replace(self.solver, tolerance=3 * self.solver.tolerance, margin=10 * self.solver.tolerance)

    @property
    def exact(self) -> bool:
        """Whether products are exact, not by differences."""
        return self.step is None

    def solve(self, hvp: HVP, names: list[str], solver: Lanczos) -> Solved:
        """Both ends of the spectrum over `names`, from a random start."""
        if not names:
            return Solved(names, None)
        self.in_time()
        return Solved(names, self.ended(solver.extremes(self.operator(hvp, names))))

    def ended(self, found: Extremes) -> Extremes:
        """A solve's result; where a full disk ended it, nothing more is started."""
        self.full_disk = self.full_disk or found.full_disk
        return found

    @contextmanager
    def room(self) -> Iterator[None]:
        """Where the disk is full within it, that ends the analysis as a deadline does: what was found so far stands."""
        try:
            yield
        except FullDiskError as error:
            if self.ranks.world > 1:  # the others wait for what is summed next
                raise
            self.full_disk = error

    def in_time(self) -> None:
        """Raises OutOfTime where nothing more may be started."""
        if self.late:
            raise OutOfTime

    @property
    def late(self) -> bool:
        """Whether the deadline has passed, by the clock of rank 0, or the disk was full."""
        return self.full_disk is not None or (self.solver.deadline < inf and agreed(self.solver.expired)[0])

    def run(self, on_full: Callable[[Measured], None] = lambda measured: None) -> Measured:
        """Everything, the full model first.

        What is not reached before the deadline, or before the disk is full, is skipped.

        Args:
            on_full: called as soon as the full model is known, which is what a verdict needs.

        Raises:
            OutOfTime, FullDiskError: not even the full model was reached.
        """
        self.in_time()
        self.stages.enter("gradient")
        gradients, spread = mean_gradient(self.problem, self.moving, self.shards)
        gradients = gradients if self.shards else self.put(gradients)
        loss, looked_up = lookups(self.problem)
        if not isfinite(loss):
            raise UnsupportedError("the mean loss is not finite on this data", hint="check the data and the weights")
        self.in_time()
        hvp = Counting(self.build(self.problem), self)
        resources.give_back(self.device)  # what gradients took is not to lie beside products
        whole = Whole(self, hvp)
        found = whole.solve(loss, looked_up, pausing=True)
        found.body = found.body and found.body.bare()  # its vector makes room for what follows
        steep: Steep | None = None
        # What was finished has been added one by one. An alarm breaks into rank 0 alone, and the others are to leave their
        # products too.
        with suppress(OutOfTime), self.room(), self.ranks.together():
            found.ratios = ratios(self.preconditioner, self.moving, gradients, spread) if spread else None
            self.in_time()
            self.stages.enter("next update")
            found.update = next_update(self.problem, self.preconditioner, hvp, self.moving, gradients)
            steep = Steep.of(self, hvp, gradients)
            found.norm = steep.found if steep else None
            on_full(self.completed(found))
            whole.resume(found)
            del whole  # which holds the graphs
            found.companions, found.beside = companions(self, hvp, gradients)
            del gradients
            self.parts(hvp, found, steep)
            if self.depths and self.layer_names:
                curve(self, hvp, found, steep)
                del hvp  # its graphs make room for those of the shortened networks
                self.shortened(found)
        self.stages.enter("report")
        self.settle(found)
        if steep:
            steep.settle()
        self.peak = int(max(self.ranks.each(resources.peak_bytes(self.device))))
        return self.completed(found)

    def settle(self, found: Measured) -> None:
        """What lies below one of its own parts is brought up to it where its certificate allows that, else marked.

        A part's Ritz vector is one of the whole, so its value bounds the whole's from below, too (Cauchy interlacing).
        """
        parts = [found.ends] if found.ends else []
        for depth, solved in sorted(found.restricted.items()):
            # Layer k - 1 is what depth k has more than the one below it.
            parts += found.layers[depth - 1 : depth] if depth else []
            if parts and depth < len(self.layer_names):
                found.restricted[depth] = solved.over(parts)
            parts.append(found.restricted[depth])
        # Not brought up to them, since its verdict has been shown; layers that look no rows up are parts of it.
        within = [s for s in found.layers if found.rare.keys().isdisjoint(s.names)]
        if found.body and any(violates(s, found.body) for s in within):
            found.body = replace(found.body, inconsistent=True)
        bodies = [found.body] if found.body else []
        found.full = found.full.over([*parts[:1], *found.layers, *found.restricted.values(), *bodies])
        if found.restricted:
            found.restricted[len(self.layer_names)] = found.full.bare()

    def full(self, hvp: HVP, loss: float, looked_up: Lookups) -> Measured:
        """The full model; without the rows that the shard hardly looks up too, where the top direction lies on them."""
        return Whole(self, hvp).solve(loss, looked_up)

    def parts(self, hvp: HVP, found: Measured, steep: Steep | None) -> None:
        """Embedding, head and what else lies outside the blocks, alone; and each block alone, the rest held still."""
        if not self.layer_names:
            return
        self.stages.enter("embedding, head")
        # Depth 0 of the curve, too.
        found.ends = self.solve(hvp, self.outer, self.coarse).bare()
        if steep:
            steep.ends(self.outer_moving)
        for i, names in enumerate(self.layer_names):
            self.stages.enter(f"layer {i}")
            found.layers.append(self.solve(hvp, names, self.coarse).bare())
            if steep:
                steep.layer(self.layer_moving[i])

    def shortened(self, found: Measured) -> None:
        """The network of the first k blocks alone, up to the full model."""
        if not self.cuts or not self.blocks:
            return
        for depth in range(len(self.layer_names)):
            self.stages.enter(f"truncated at depth {depth}")
            self.in_time()
            names = self.upto(depth)
            if not names:  # as of LoRA, at depth 0: nothing that trains is left, and no gradient
                found.truncated.append(Solved(names, None))
                continue
            # In the whole network's mode: a part of it takes less of everything.
            hvp = Counting(self.build(self.problem.truncated(self.blocks, depth)), self)
            found.truncated.append(self.solve(hvp, names, self.coarse).bare())

    def completed(self, found: Measured) -> Measured:
        """With entries for what was not reached."""
        self.notes |= self.step.said() if self.step else {}
        last = len(self.layer_names)
        if not last:
            return found
        layers = [*found.layers, *(Solved(names, None, skipped=True) for names in self.layer_names[len(found.layers) :])]
        ends = found.ends or Solved(self.outer, None, skipped=True)
        restricted = dict(found.restricted)
        if self.depths:
            restricted.setdefault(last, found.full.bare())
        for depth in range(last if self.depths else 0):
            restricted.setdefault(depth, Solved(self.upto(depth), None, skipped=True))
        truncated = list(found.truncated)
        if self.cuts and len(truncated) <= last:
            truncated += [Solved(self.upto(k), None, skipped=True) for k in range(len(truncated), last)]
            truncated.append(found.full)
        return replace(found, ends=ends, layers=layers, restricted=dict(sorted(restricted.items())), truncated=truncated)

    def upto(self, depth: int) -> list[str]:
        """Parameters outside the layers and in the first `depth` of them, in the model's order."""
        inside = {n for names in self.layer_names[:depth] for n in names} | set(self.outer)
        return [n for n in self.names if n in inside]
