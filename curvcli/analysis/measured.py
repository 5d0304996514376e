"""What the solves found: raw values, before they are a document; and what is known while they go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Protocol

from curvcli.analysis.stages import Stages
from curvcli.curvature.folds import Folds
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.operator import Folded
from curvcli.curvature.problem import Blocks, Problem
from curvcli.curvature.ritz import Extremes, Ritz
from curvcli.curvature.scratch import Put
from curvcli.documents import Companions, LayerCompanions, ModelSteepest, Steepest, Update
from curvcli.optimizers.preconditioner import Preconditioner


class Ongoing(Protocol):
    """A measurement in progress, as those see it who measure one thing more in it.

    Attributes:
        moving: names of the parameters that move; `names` are those of them that have a P, and so lambda and rho.
        layer_moving: those that move, by layer.
        notes: for the report's findings, by code.
    """

    problem: Problem
    preconditioner: Preconditioner
    blocks: Blocks | None
    solver: Lanczos
    stages: Stages
    moving: list[str]
    names: list[str]
    layer_moving: list[list[str]]
    notes: dict[str, str]

    def in_time(self) -> None:
        """Raises OutOfTime where nothing more may be started."""
        ...


@dataclass
class Solved:
    """An estimate's raw form, and the names that its vector runs over."""

    names: list[str]
    extremes: Extremes | None
    inconsistent: bool = False
    skipped: bool = False

    @property
    def converged(self) -> bool:
        """Whether the top value met its tolerance, and no part of these parameters came out above it."""
        return self.extremes is not None and self.extremes.status == "converged" and not self.inconsistent

    @property
    def bounds(self) -> bool:
        """Whether its value is one that the eigenvalue over more parameters cannot lie below."""
        return self.extremes is not None and self.extremes.status != "asymmetric" and not self.inconsistent

    @property
    def value(self) -> float:
        """Largest Ritz value, a lower bound of the largest eigenvalue; -inf where there is none."""
        top = self.extremes.top if self.extremes else None
        return top.value if top else -inf

    @property
    def ceiling(self) -> float:
        """What no eigenvalue lies above; infinite where that is not known."""
        return self.extremes.ceiling if self.extremes else inf

    @property
    def second(self) -> float:
        """What no eigenvalue but the top one lies above; infinite where that is not known."""
        return self.extremes.second if self.extremes else inf

    def over(self, parts: Sequence[Solved]) -> Solved:
        """Not below its parts: what is within the certificate is taken over, what is beyond makes it inconsistent."""
        # An inconsistent part is known to be wrong, and so is one whose products are not symmetric: they bound nothing.
        known = [part for part in parts if part.bounds]
        top = self.extremes.top if self.extremes else None
        if self.extremes is None or top is None or self.inconsistent or not known:
            return self
        if any(violates(part, self) for part in known):
            return replace(self, inconsistent=True)
        value = max(self.value, *(part.value for part in known))
        # The old residual is about the old value: moving the value widens it by as much.
        raised = Ritz(value, top.residual + value - top.value)
        return replace(self, extremes=replace(self.extremes, top=raised, ceiling=max(self.ceiling, value)))

    def aside(self, put: Put) -> Solved:
        """With what `put` gives in the place of the vector, so that it makes room for other solves."""
        found = self.extremes
        if found is None or found.vector is None:
            return self
        return replace(self, extremes=replace(found, vector=put([found.vector])[0]))

    def bare(self) -> Solved:
        """Without the vector."""
        return replace(self, extremes=self.extremes and replace(self.extremes, vector=None))


@dataclass
class InNorm:
    """Sharpness in the optimizer's norm: of all that have one, of parts, and over depth; None where none of a part has."""

    full: ModelSteepest
    ends: Steepest | None = None
    layers: list[Steepest | None] = field(default_factory=list)
    restricted: dict[int, Steepest | None] = field(default_factory=dict)


@dataclass
class Measured:
    """What was found so far.

    `body` is the full model without the embedding rows that the shard hardly looks up, where they carry the top direction;
    `rare` counts them by name. `folds` are of the body where there is one, else of the full model; None where the shard is
    one batch. `ends` are the parameters outside the layers, as one part; None where there are no layers. `norm` is of the
    parameters whose step is steepest in a norm, which the others are not of; None where there is none. `ratios` are of
    the gradient's norm, and of that of a batch's, over what the second moment remembers; None where there is none.
    """

    loss: float
    full: Solved
    folds: Folds | None = None
    body: Solved | None = None
    rare: dict[str, int] = field(default_factory=dict)
    update: Update = field(default_factory=lambda: Update(critical_lr=None, ratio=None, status="skipped"))
    ends: Solved | None = None
    companions: Companions | None = None
    beside: list[LayerCompanions] = field(default_factory=list)
    layers: list[Solved] = field(default_factory=list)
    restricted: dict[int, Solved] = field(default_factory=dict)
    truncated: list[Solved] = field(default_factory=list)
    norm: InNorm | None = None
    ratios: tuple[float, float] | None = None


def violates(lower: Solved, upper: Solved) -> bool:
    """Whether `lower`, over fewer parameters, came out above all that `upper` can be."""
    if not lower.bounds or upper.extremes is None or upper.extremes.top is None:
        return False
    most = max(upper.value + upper.extremes.top.residual, upper.ceiling if upper.ceiling < inf else upper.value)
    return lower.value > most + 1e-5 * abs(lower.value)  # float32's rounding


def folds_of(operator: Folded) -> Folds | None:
    """What was seen of the shard's parts between the vectors of a solve; None where there is but one part."""
    if len(operator.folds) < 2:
        return None
    return Folds([weight for weight, _ in operator.folds], operator.projected())
