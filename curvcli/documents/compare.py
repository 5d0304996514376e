"""Two checkpoints side by side, "curv.compare/1", and two runs, "curv.compare-tracks/1"."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from curvcli.documents.base import Document, Finding, Versions, read_document
from curvcli.documents.report import VerdictName
from curvcli.documents.shown import Shown
from curvcli.documents.track import RunName


class Side(Document):
    """One of the two."""

    path: str = Field(description="what the user named")
    checkpoint: str
    step: int | None
    lr: float | None
    threshold: float | None
    loss: float = Field(description="mean loss over the shard, in nats per token")
    update_ratio: float | None
    verdict: VerdictName
    tokens: int
    z: float | None = Field(default=None, description="of the parameters whose step is steepest in a norm; null without one")
    stable_lr: float | None = Field(default=None, description="the largest stable learning rate; null where none is known")


class Change(Document):
    """What became of one part: the full model, embedding and head, or a layer. Values are null where not certified."""

    part: Literal["full", "ends", "layer"] = Field(
        description="full: what the verdicts are on, the full model or, where rare rows carry its top direction, the rest"
    )
    name: str
    first: float | None = Field(description="lambda of the first")
    second: float | None = Field(description="lambda of the second")
    first_rho: float | None
    second_rho: float | None
    ratio: float | None = Field(description="second lambda over first; null where one is missing or not positive")
    low: float | None = Field(description="lower end of the ratio's bracket, from what lies above neither lambda")
    high: float | None
    first_z: float | None = Field(default=None, description="Z of the first; null where it has no norm")
    second_z: float | None = None
    rho_ratio: float | None = Field(description="second rho over first: the learning rate counts too")
    message: str | None = Field(description="why there is no ratio")


class Comparison(Shown, Document):
    """What `curv compare` found; document "curv.compare/1"."""

    schema_: Literal["curv.compare/1"] = Field(default="curv.compare/1", alias="schema")
    first: Side
    second: Side
    changes: list[Change] = Field(min_length=1)
    findings: list[Finding] = Field(description="first what makes the two no like for like")
    versions: Versions


def load_comparison(path: Path) -> Comparison:
    """Read a comparison. Raises InputError where the file is no curv.compare/1."""
    return read_document(Comparison, path, "curv.compare/1", "write one with curv compare -o")


class TrackSide(Document):
    """One of the two runs."""

    path: str = Field(description="what the user named")
    run: str = Field(description="what the track is of")
    points: int = Field(description="checkpoints that were measured")
    failed: int = Field(description="checkpoints that could not be")
    verdict: RunName | None = Field(description="on the run; null where nothing was measured")
    first_step: int | None = Field(description="of those measured; null where no step is known")
    last_step: int | None


class StepSide(Document):
    """A run at one step. Values of lambda and rho are null where they are not certified; `status` says why."""

    checkpoint: str
    verdict: VerdictName
    status: str = Field(description="of the estimate that the verdict is on")
    rho: float | None
    low: float | None = Field(description="lower end of the bracket that rho is ranked by: see `TrackStep.bracket`")
    high: float | None
    eigenvalue: float | None = Field(description="lambda")
    threshold: float | None = Field(description="value of lambda at which rho is 1")
    z: float | None = Field(description="of the parameters whose step is steepest in a norm; null without one")
    update_ratio: float | None = Field(description="learning rate over the critical one of the next update")
    lr: float | None
    training_loss: float | None = Field(description="last that the run's own log has, in nats per token")
    shard_loss: float = Field(description="mean loss over the shard, in nats per token")


class TrackStep(Document):
    """One step, of either run or of both; a side is null where that run has no measured checkpoint there."""

    step: int
    first: StepSide | None
    second: StepSide | None
    bracket: Literal["shard", "data"] | None = Field(
        description="shard: the same tokens on both sides, and the ends are those of the residuals and ceilings; "
        "data: other tokens, and "
        "the ends are those of the data behind each shard; null without both sides"
    )
    rho_ratio: float | None = Field(description="second rho over first; null where one is missing or not positive")
    ranked: bool = Field(description="both have a rho with a bracket, and are past their first steps")
    further: Literal["first", "second"] | None = Field(
        description="the run with the lower rho, its whole bracket below the other's; null where they meet or one is missing"
    )


class TrackComparison(Shown, Document):
    """What `curv compare` found of two tracks; document "curv.compare-tracks/1"."""

    schema_: Literal["curv.compare-tracks/1"] = Field(default="curv.compare-tracks/1", alias="schema")
    first: TrackSide
    second: TrackSide
    steps: list[TrackStep] = Field(description="all steps of either run, rising")
    ranked: int = Field(description="steps that are ranked")
    further: Literal["first", "second"] | None = Field(
        description="the run that is further below its edge at the last ranked step; null where the brackets meet, or no "
        "step is ranked"
    )
    since: int | None = Field(description="first of the unbroken row of ranked steps, up to the last, that all say so")
    findings: list[Finding] = Field(description="first what makes the two no like for like")
    versions: Versions


def load_track_comparison(path: Path) -> TrackComparison:
    """Read a comparison of tracks. Raises InputError where the file is no curv.compare-tracks/1."""
    return read_document(TrackComparison, path, "curv.compare-tracks/1", "write one with curv compare -o")
