"""What rho meant in runs whose end is known: the learning rate that breaks one, the chance of a bad end, and from when on.

The coefficients are in calibration.json, with the runs that they are from and the command that fits them again;
docs/explanation/rho.md#calibration says what they mean and what they do not cover.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import exp, hypot, inf, log
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from curvcli.documents import Document, Estimate, Generalisation, Optimizer, StableLr
from curvcli.documents.base import LARGEST
from curvcli.judge.clipping import too_high
from curvcli.judge.limits import certified, highest

Group = Literal["adaptive", "sgd"]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


class Source(Document):
    """The runs behind the coefficients, and the command that fits them again."""

    command: str
    runs: Count
    ramps: Count
    families: list[str]
    parameters: tuple[int, int]
    tokens_per_batch: tuple[int, int]
    optimizers: list[str]
    note: str = ""


class Edge(Document):
    """rho at which training broke while its learning rate was raised; `confidence` of the ramps lie within the ends."""

    low: Annotated[float, Field(gt=0)]
    middle: float
    high: float
    confidence: Share
    ramps: Count

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.low <= self.middle <= self.high:
            raise ValueError("low, middle and high are not in order")
        return self


class Odds(Document):
    """Chance of a bad end: 1 / (1 + exp(-(intercept + slope ln rho)))."""

    intercept: float
    slope: Annotated[float, Field(gt=0)]
    runs: Count


class Calibration(Document):
    """The content of calibration.json."""

    source: Source
    edge: dict[Group, Edge]
    odds: dict[Group, Odds]
    edge_from: Annotated[float, Field(gt=0, description="rho from which on points of the ramps were looked at")]
    stable_below: Annotated[Share, Field(description="odds")]
    hot_from: Annotated[Share, Field(description="odds")]
    unstable_from: Annotated[Share, Field(description="odds")]
    early_steps: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.stable_below <= self.hot_from <= self.unstable_from:
            raise ValueError("stable_below, hot_from and unstable_from are not in order")
        if not set(self.edge) == set(self.odds) == {"adaptive", "sgd"}:
            raise ValueError("edge and odds need the groups adaptive and sgd")
        return self

    @property
    def widest(self) -> Group:
        """The group whose edge is spread most, in factors."""
        return max(self.edge, key=lambda group: self.edge[group].high / self.edge[group].low)

    def group(self, optimizer: str) -> Group | None:
        """Whose coefficients an optimizer shares; None where none of the runs had it."""
        if optimizer not in self.source.optimizers:
            return None
        # Of the runs' optimizers the one that scales nothing by a second moment.
        return "sgd" if optimizer == "SGD" else "adaptive"

    def edge_of(self, optimizer: str) -> Edge:
        """The edge of its group; without one from the lowest to the highest of all, about the middle of the widest."""
        group = self.group(optimizer)
        if group is not None:
            return self.edge[group]
        low, high = min(e.low for e in self.edge.values()), max(e.high for e in self.edge.values())
        # No run shows where this optimizer breaks: take the widest range that any group had.
        return self.edge[self.widest].model_copy(update={"low": low, "high": high})


@cache
def calibration() -> Calibration:
    """The coefficients that this version of curv comes with."""
    return Calibration.read((files("curvcli.judge") / "calibration.json").read_bytes())


@dataclass(frozen=True)
class Bracket:
    """rho, above 0, and the ends that it lies within; `low` may be at or below 0, and then bounds nothing."""

    low: float
    value: float
    high: float


def bracket_of(judged: Estimate, generalisation: Generalisation, threshold: float) -> Bracket | None:
    """rho of the data where a bracket is known, else that of the shard, from its Ritz value up to residual or ceiling.

    None where rho is not certified or not above 0: no learning rate follows from it.
    """
    value, most = judged.rho, highest(judged)
    if not certified(judged) or value is None or most is None or value <= 0 or threshold <= 0:
        return None
    low, high = generalisation.rho_low, generalisation.rho_high
    if low is None or high is None:
        # A Ritz value is a lower bound.
        low, high = value, most / threshold
    # A report may come from anywhere: make the ends include the value, or the logarithms below change sign.
    return Bracket(min(low, value), value, max(high, value))


def stable_lr(lr: float, rho: Bracket, optimizer: str) -> StableLr | None:
    """The learning rate at which rho would come to where training broke in the ramps: lr * edge / rho.

    Two things spread it, and they are taken for independent: the edge, from ramp to ramp, and rho, within its bracket.
    So their distances from the middle are added in quadrature, in logarithms and each side by itself. lambda is held as it
    is, and rho grows in proportion to lr, but for a part of decoupled weight decay over 2/lr.

    Args:
        lr: in force, above 0.
        optimizer: the name by which the report has it.

    Returns:
        None where the numbers are too small or too large for a learning rate; `high` is None where rho may be 0 or less.
    """
    known = calibration()
    edge = known.edge_of(optimizer)
    value = lr * edge.middle / rho.value
    down = hypot(log(edge.middle / edge.low), log(rho.high / rho.value))
    up = hypot(log(edge.high / edge.middle), log(rho.value / rho.low)) if rho.low > 0 else inf
    # exp(710) overflows a double.
    low, high = value * exp(-down), value * exp(up) if up < 700 else inf
    if not 0 < low <= value <= LARGEST or lr / value > LARGEST:
        return None
    return StableLr(
        value=value,
        low=low,
        high=high if high <= LARGEST else None,
        confidence=edge.confidence,
        group=known.group(optimizer) or "all",
        uncovered=[],
        ratio=lr / value,
    )


def odds(rho: float, optimizer: str) -> float | None:
    """Chance that a run at this rho ends badly, by the runs of its optimizer's group, else of the widest.

    None where rho is not above 0.
    """
    if rho <= 0:
        return None
    known = calibration()
    # Without a group take the widest, which claims least.
    fit = known.odds[known.group(optimizer) or known.widest]
    power = fit.intercept + fit.slope * log(rho)
    # exp(700) is near the largest double; below that the chance is 0 to any digit that is shown.
    return 1 / (1 + exp(-power)) if power > -700 else 0.0


def uncovered(optimizer: str, parameters: int, rho: float) -> list[str]:
    """What of a run lies outside those that the coefficients are from, in words."""
    source, near = calibration().source, calibration().edge_from
    found = [] if optimizer in source.optimizers else [f"{optimizer} (the runs had {', '.join(source.optimizers)})"]
    low, high = source.parameters
    if not low <= parameters <= high:
        found.append(f"{parameters:,} parameters (the runs had {low:,} to {high:,})")
    if rho < near:
        found.append(f"rho below {near:g}, where curvature can still grow by decades")
    return found


def settled_after(betas: tuple[float, float] | None, momentum: float | None) -> int:
    """Steps after which moments are more than those of a few gradients: as many as the first averages, or 16."""
    memory = [1 / (1 - b) for b in ((betas or (0.0,))[0], momentum or 0.0) if 0 <= b < 1]
    # Not 1/(1 - beta2), a thousand steps at 0.999: bias correction makes up for a short second average, not for noise in m.
    return max([calibration().early_steps, *(round(steps) for steps in memory)])


def too_early(step: int | None, moments_step: int | None, betas: tuple[float, float] | None, momentum: float | None) -> bool:
    """Whether rho means nothing yet.

    Args:
        step: of the checkpoint or the job; None where it is not known.
        moments_step: steps that the optimizer itself has counted, which go first: a restart may begin them anew.
    """
    age = step if moments_step is None else moments_step
    return age is not None and age < settled_after(betas, momentum)


@dataclass(frozen=True)
class Calibrated:
    """What the calibration says of a measurement; None where nothing follows from it.

    Attributes:
        odds_at_most: the chance of a bad end where rho may be too high; `odds` is None then.
    """

    early: bool = False
    odds: float | None = None
    odds_at_most: float | None = None
    stable_lr: StableLr | None = None


def calibrated(
    judged: Estimate,
    generalisation: Generalisation,
    optimizer: Optimizer,
    *,
    step: int | None,
    parameters: int,
    doubts: bool = False,
    partial: bool = False,
) -> Calibrated:
    """Whether it is too early to tell, the chance of a bad end and the largest stable learning rate.

    Args:
        step: of the checkpoint.
        doubts: the optimizer's update is not known in full, so its rho is not either.
        partial: rho is that of some parameters with the others held still, as in none of the runs.
    """
    if judged.rho is None or optimizer.threshold is None or doubts:
        return Calibrated()
    # Before the bracket: of a young optimizer nothing follows, whatever has converged.
    if too_early(step, optimizer.step, optimizer.betas, optimizer.momentum):
        return Calibrated(early=True)
    rho = bracket_of(judged, generalisation, optimizer.threshold)
    if rho is None or optimizer.preconditioner == "estimated" or not optimizer.lr or partial:
        return Calibrated()
    chance = odds(rho.value, optimizer.name)
    if too_high(optimizer) > 1:
        return Calibrated(odds_at_most=chance)
    found = stable_lr(optimizer.lr, rho, optimizer.name)
    if found is not None:
        found = found.model_copy(update={"uncovered": uncovered(optimizer.name, parameters, rho.value)})
    return Calibrated(odds=chance, stable_lr=found)
