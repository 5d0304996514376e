"""The course of a run over its checkpoints: "curv.track/1"."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from curvcli.documents.base import Document, Finding, Versions, read_document
from curvcli.documents.report import LossCourse, Report
from curvcli.documents.shown import Shown


class TrackPoint(Document):
    """One checkpoint of the run. `report` is null where it could not be measured; `message` then says why."""

    checkpoint: str = Field(description="path")
    step: int | None
    source: Literal["measured", "cached", "failed"]
    report: Report | None
    message: str | None = None
    training_loss: float | None = Field(description="last that the run's own log has at this step, in nats per token")
    surge: float | None = Field(
        description="rho over the median of up to `window` certified points before; null with fewer than two of them"
    )
    surged: bool = Field(description="surge is above the track's limit")


class TrainingStep(Document):
    """A line of the run's own log."""

    step: int
    loss: float | None
    lr: float | None
    non_finite: bool = Field(default=False, description="a loss was logged that is no number, or infinite")


RunName = Literal["healthy", "hot", "wrecked", "collapsed", "unresolved", "early"]
ActionName = Literal["go on", "watch", "lower the lr", "go back", "stop"]


class RunVerdict(Document):
    """The verdict on a whole run: its log and every point of it, not the newest checkpoint alone.

    "wrecked" and "collapsed" are of the loss (`course`), and of a loss that stands still while lambda falls by decades.
    "hot": the newest checkpoint, or a third of them, lie past the edge, and the loss is none the worse. "early": too few
    steps for rho to mean anything. "unresolved": the newest verdict is, and the loss says nothing against the run.
    """

    name: RunName
    step: int | None = Field(default=None, description="where it went wrong")
    good_checkpoint: str | None = Field(default=None, description="path of the last good one before that")
    good_step: int | None = None
    worst_rho: float | None = Field(default=None, description="highest certified rho of all points")
    worst_step: int | None = None
    trend: Literal["rising", "falling", "flat"] | None = Field(
        default=None, description="newest certified rho against the median of up to five before; null with fewer than two"
    )
    course: LossCourse | None = None
    reasons: list[str] = Field(description="in plain words, the weightiest first")
    action: ActionName
    advice: str = Field(description="the action as a sentence, with checkpoint and learning rate")
    restart_lr: float | None = Field(default=None, description="highest learning rate to go on with, where it has to change")


class Track(Shown, Document):
    """What `curv track` found; document "curv.track/1". Points are in step order."""

    schema_: Literal["curv.track/1"] = Field(default="curv.track/1", alias="schema")
    run: str = Field(description="what the user named")
    points: list[TrackPoint] = Field(min_length=1)
    log: list[TrainingStep] = Field(description="the newest checkpoint's log of the run")
    window: Annotated[int, Field(ge=2, description="certified points that a surge's median is over")]
    surge_limit: Annotated[float, Field(gt=1)]
    findings: list[Finding]
    verdict: RunVerdict | None = Field(default=None, description="on the run; null in documents of older versions")
    hvps: int = Field(description="Hessian-vector products spent in this call; cached points cost none")
    seconds: float = Field(description="wall time of this call")
    versions: Versions


def load_track(path: Path) -> Track:
    """Read a track. Raises InputError where the file is no curv.track/1."""
    return read_document(Track, path, "curv.track/1", "write one with curv track -o")
