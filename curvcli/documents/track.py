"""The course of a run over its checkpoints: "curv.track/1"."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from curvcli.documents.base import Document, Finding, Versions, read_document
from curvcli.documents.report import Report


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


class Track(Document):
    """What `curv track` found; document "curv.track/1". Points are in step order."""

    schema_: Literal["curv.track/1"] = Field(default="curv.track/1", alias="schema")
    run: str = Field(description="what the user named")
    points: list[TrackPoint] = Field(min_length=1)
    log: list[TrainingStep] = Field(description="the newest checkpoint's log of the run")
    window: Annotated[int, Field(ge=2, description="certified points that a surge's median is over")]
    surge_limit: Annotated[float, Field(gt=1)]
    findings: list[Finding]
    hvps: int = Field(description="Hessian-vector products spent in this call; cached points cost none")
    seconds: float = Field(description="wall time of this call")
    versions: Versions


def load_track(path: Path) -> Track:
    """Read a track. Raises InputError where the file is no curv.track/1."""
    return read_document(Track, path, "curv.track/1", "write one with curv track -o")
