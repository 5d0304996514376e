"""The restricted curve: curvature of embedding, head and the first k blocks of the intact network, from the full model down.

Eigenvalues can only fall with the depth (Cauchy interlacing), the second as the first. So what bounds a depth from above
bounds those below it; and what lies above all but one eigenvalue of a depth lies above all but one of theirs, so that an
eigenvalue found above it is the top. Where either says enough, a few products from the vector of the depth above do, and
none of a fresh start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Protocol

from curvcli.analysis.measured import Measured, Ongoing, Solved, violates
from curvcli.analysis.steepest import Steep
from curvcli.curvature.davidson import Davidson
from curvcli.curvature.hvp import HVP
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.operator import PreconditionedHessian

WARM = 4  # products that a depth may take from the vector of the depth above it


class Solving(Ongoing, Protocol):
    """A measurement in progress, with its solves.

    Attributes:
        layer_names: of those that have a P, by layer; `outer` are those outside the layers.
    """

    layer_names: list[list[str]]
    outer: list[str]

    @property
    def coarse(self) -> Lanczos:
        """The solver of values on which no verdict hangs."""
        ...

    @property
    def exact(self) -> bool:
        """Whether products are, so that a value from a warm start has a certificate."""
        ...

    def operator(self, hvp: HVP, names: Sequence[str]) -> PreconditionedHessian:
        """G restricted to `names`."""
        ...

    def solve(self, hvp: HVP, names: list[str], solver: Lanczos) -> Solved:
        """From a random start."""
        ...

    def upto(self, depth: int) -> list[str]:
        """Parameters outside the layers and in the first `depth` of them."""
        ...


def curve(measurement: Solving, hvp: HVP, found: Measured, steep: Steep | None) -> None:
    """Solves all depths, and adds them to what was found."""
    last = len(measurement.layer_names)
    ends, above = found.ends or Solved(measurement.outer, None), found.full
    found.restricted.update({0: ends, last: above.bare()})
    for depth in range(last - 1, 0, -1):
        measurement.stages.enter(f"restricted to depth {depth}")
        names = measurement.upto(depth)
        solved = lowered(measurement, hvp, names, above)
        # A second eigenvalue as near to the top as Lanczos tells none apart is not below that bound, and may be what is on
        # top here. Of parts that were solved from a start of their own it shows where they have it.
        parts = [ends, *found.layers[:depth]]
        if not solved.converged or any(violates(part, solved) for part in parts):
            solved = measurement.solve(hvp, names, serving(measurement, depth, above, solved, ends))
        found.restricted[depth] = solved.bare()
        if steep:
            steep.depth(depth)
        # A depth that failed leaves no vector to start from: keep the one above it.
        above = solved if solved.extremes and solved.extremes.vector is not None else above


def lowered(measurement: Solving, hvp: HVP, names: list[str], above: Solved) -> Solved:
    """A depth from the one above it; not converged where that says too little of it."""
    wide, solver = above.extremes, measurement.solver
    if solver.store is not None or not measurement.exact:  # no room for its basis, or no certificate
        return Solved(names, None)
    if not names or wide is None or wide.vector is None or wide.status == "asymmetric":  # no bound holds of such products
        return Solved(names, None)
    allowed = 1 + 10 * solver.tolerance
    least = min(wide.ceiling / allowed, wide.second)  # below it neither bound says enough
    if not 0 < least < above.value:
        return Solved(names, None)
    measurement.in_time()
    operator = measurement.operator(hvp, names)
    start = operator.root.carry(wide.vector, measurement.preconditioner.root.restrict(above.names))
    # Davidson, as Lanczos has no ceiling from a warm start; here the bounds of the depth above hold.
    tolerance = measurement.coarse.tolerance
    warm = Davidson(tolerance, inf, WARM, basis=6, seed=solver.seed, deadline=solver.deadline, least=least)
    extremes = warm.extremes(operator, [start])
    top, ceiling = extremes.top, wide.ceiling
    if top is not None:
        if top.value - top.residual > wide.second:  # the only eigenvalue that may lie there
            ceiling = min(ceiling, top.value + top.residual)
        if ceiling > allowed * top.value:
            extremes = replace(extremes, status="max-hvps")
    return Solved(names, replace(extremes, bottom=None, ceiling=ceiling, second=wide.second))


def serving(measurement: Solving, depth: int, above: Solved, seen: Solved, ends: Solved) -> Lanczos:
    """The solver of a depth of which a start from above has seen so much, for the sake of the depths below it.

    A ceiling serves them where they fall less than what it may lie above. Telling the second eigenvalue from the top serves
    them where the next depth comes to lie between the two: by a straight line down to embedding and head.
    """
    tolerance = measurement.solver.tolerance
    near = above.value <= (1 + 7 * tolerance) * seen.value
    found = replace(measurement.solver, margin=3 * tolerance) if near else measurement.coarse
    if depth < 3 or above.value <= 0:
        return found
    return replace(found, apart=1 - (1 - max(ends.value, 0.0) / above.value) / depth)
