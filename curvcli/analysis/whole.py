"""The full model, and where its top direction lies on rows that the shard hardly looks up: without them.

The verdict is on what is without them then, so that the full model's solve waits where it plainly comes to that, and goes on
once the verdict is known.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from curvcli.analysis.measured import Measured, Ongoing, Solved, folds_of
from curvcli.curvature.gathering import across
from curvcli.curvature.hvp import HVP
from curvcli.curvature.lanczos import Lanczos, Walk
from curvcli.curvature.operator import Folded
from curvcli.curvature.ranks import Ranks
from curvcli.curvature.ritz import Extremes
from curvcli.curvature.scratch import Put, let_go
from curvcli.curvature.shards import Shards
from curvcli.errors import OutOfTime
from curvcli.models.rows import Lookups, apart, outside

RARE = 10  # a row that the shard looks up fewer times than this, or never, is measured by its luck
RARE_MASS = 0.01  # of the top eigenvector on rare rows, from which on the model is measured without them too
PLAINLY = 10 * RARE_MASS  # of a vector on the way to it
PIECE = 2**22  # entries of a vector that are looked at at once
ROOMY = 64  # vectors there is room for, from which on two solves' may be held at once


class Solving(Ongoing, Protocol):
    """A measurement in progress, with what the full model's solves are made of.

    Attributes:
        put: where vectors lie that are needed later.
        shards: how processes divide vectors; None where each has the whole.
    """

    put: Put
    ranks: Ranks
    shards: Shards | None

    @property
    def exact(self) -> bool:
        """Whether products are exact, not by differences."""
        ...

    @property
    def late(self) -> bool:
        """Whether the deadline has passed, or the disk was full."""
        ...

    def ended(self, found: Extremes) -> Extremes:
        """A solve's result; where a full disk ended it, nothing more is started."""
        ...

    def room(self) -> AbstractContextManager[None]:
        """Where the disk is full within it, that ends the analysis as a deadline does."""
        ...

    def folded(self, hvp: HVP) -> Folded:
        """G of the full model, as the mean of those of the shard's folds."""
        ...


class Whole:
    """The solves of the full model in one measurement."""

    def __init__(self, work: Solving, hvp: HVP) -> None:
        self.work, self.hvp, self.names = work, hvp, work.names
        # The most negative eigenvalue is of interest in the full model: only here it is waited for.
        self.solver: Lanczos = replace(work.solver, bottom_tolerance=0.1)
        self.left: tuple[Walk, Folded, Tensor] | None = None  # for later: a solve, and where its rare rows are not

    def solve(self, loss: float, looked_up: Lookups, *, pausing: bool = False) -> Measured:
        """The full model; without the rows that the shard hardly looks up too, where the top direction lies on them.

        Args:
            pausing: where it plainly lies on them, a part of the full model's solve may be left for `resume`.
        """
        work = self.work
        work.stages.enter("full model")
        work.in_time()
        if not self.names:
            return Measured(loss, Solved(self.names, None))
        mask, rows = self._kept(looked_up)
        operator = work.folded(self.hvp)
        if pausing and mask is not None and self._may_wait:
            walk = self.solver.begin(operator)
            extremes = self.solver.finish(walk, partial(_plainly, mask))
            self.left = (walk, operator, mask) if walk.paused else None
            del walk
        else:
            extremes = self.solver.extremes(operator)
        found = Measured(loss, Solved(self.names, work.ended(extremes)), folds_of(operator))
        if extremes.status == "non-finite":
            work.notes |= self._overflown(operator)
        del operator, extremes  # which hold vectors
        with work.room():
            found.full = found.full.aside(work.put)
            if mask is not None and self._on_rare(found.full, mask):
                self._without(found, mask, {n: int(m.sum()) for n, m in rows.items()})
        return found

    def _without(self, found: Measured, mask: Tensor, rare: dict[str, int]) -> None:
        """Adds the full model without some rows, so many of each name."""
        work = self.work
        work.stages.enter("full model without rare rows", planned=False)
        found.rare = rare
        # The verdict is to be on it: where there is no time for it, there is none on the full model instead.
        found.body = Solved(self.names, None, skipped=True)
        if work.late:
            return
        folded = work.folded(self.hvp)
        held = self.left[0].products if self.left else 0  # vectors, of the solve that waits
        try:
            with work.ranks.together():
                extremes = replace(work.solver, basis=work.solver.basis - held).extremes(folded, support=mask)
        except OutOfTime:  # in the middle of a long product: what is known of the full model stays
            return
        found.body = Solved(self.names, work.ended(extremes))
        found.folds = folds_of(folded)

    def resume(self, found: Measured) -> None:
        """The rest of a solve that was left for later, in place of what was known of the full model.

        Raises:
            OutOfTime: the deadline has passed.
        """
        if self.left is None:
            return
        self.work.stages.enter("full model with rare rows", planned=False)
        self.work.in_time()
        (walk, operator, mask), self.left = self.left, None
        found.full = Solved(self.names, self.work.ended(self.solver.finish(walk))).aside(self.work.put)
        if not self._on_rare(found.full, mask):  # it was not so plain after all
            found.body, found.rare, found.folds = None, {}, folds_of(operator)

    @property
    def _may_wait(self) -> bool:
        """Whether the full model's solve may wait for that without rare rows."""
        # Both solves' vectors are held at once; ranks could come to see the mass on two sides of the limit; and products
        # by differences are certified by their own solver, as a whole (stepped.py).
        return self.solver.basis >= ROOMY and self.work.exact and self.work.ranks.world == 1

    def _kept(self, looked_up: Lookups) -> tuple[Tensor | None, dict[str, Tensor]]:
        """True, flat, on what is in no row that the shard hardly looks up, None where no row is; these rows by name."""
        work = self.work
        parameters = work.problem.parameters
        rare = {n: looked_up.rare(parameters[n], RARE) for n in self.names}
        rows = {n: mask for n, mask in rare.items() if mask is not None and bool(mask.any())}
        roots = {n: across(work.preconditioner.root[n], n, work.shards) for n in rows}
        if mixed := [n for n, mask in rows.items() if not apart(roots[n], parameters[n], mask)]:
            work.notes["rows-mixed"] = (
                f"the preconditioner of {', '.join(mixed)} mixes its rows: those that the shard hardly looks up stay in"
            )
            rows = {n: mask for n, mask in rows.items() if n not in mixed}
        if not rows:
            return None, rows
        outer = ((n, outside(parameters[n], rows.get(n))) for n in self.names)
        (found,) = work.put([torch.cat([own if work.shards is None else work.shards.part(n, own) for n, own in outer])])
        let_go(found)
        if not any(work.ranks.each(float(found.any()))):
            work.notes["rows-all-rare"] = (
                "the shard hardly looks up any row of what moves: none is left out, and their tokens' luck is in the verdict"
            )
            return None, {}
        return found, rows

    def _on_rare(self, full: Solved, mask: Tensor) -> bool:
        """Whether the full model's top direction lies on rows that the shard hardly looks up."""
        vector = full.extremes.vector if full.extremes else None
        # Products that are not symmetric are wrong on fewer rows, too: no verdict is to rest on them.
        if vector is None or (full.extremes and full.extremes.status == "asymmetric"):
            return False
        mass, ranks = _mass(vector, mask), self.work.ranks
        # Rank 0 decides: a rank that rounds to the other side of the limit would start a solve alone.
        return (sum(ranks.each(mass)) if self.work.shards else ranks.first([mass])[0]) >= RARE_MASS

    def _overflown(self, operator: Folded) -> dict[str, str]:
        """Whose batches gave a product that is not finite, where there are several processes."""
        parts = [fold.matvec(operator.vectors[-1]) for _, fold in operator.folds]
        bad = self.work.ranks.each(float(not all(bool(torch.isfinite(part).all()) for part in parts)))
        ranks = [str(rank) for rank, found in enumerate(bad) if found]
        if len(bad) == 1 or not ranks or self.work.shards:  # where slices are held, each has those of all batches
            return {}
        return {"rank-overflow": f"a product is not finite in the batches of rank {', '.join(ranks)} of {len(bad)}"}


def _plainly(mask: Tensor, walk: Walk) -> bool:
    """Whether a solve on its way to the top direction has a tenth of it where a mask is not."""
    return _mass(walk.vector(-1), mask) >= PLAINLY


def _mass(vector: Tensor, mask: Tensor) -> float:
    """What of a unit vector's square lies where a mask is not."""
    # Piece by piece: of a large embedding most rows are rare, and in float64 they would be several vectors.
    pieces = zip(vector.split(PIECE), mask.split(PIECE), strict=True)
    found = sum(float(part[~inside].cpu().double().square().sum()) for part, inside in pieces)
    let_go(vector)
    let_go(mask)
    return found
