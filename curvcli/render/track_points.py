"""A track's points as the rows that the table, the CSV, the picture and the page all show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from curvcli.documents import ENDS, Report, RunVerdict, Track, TrackPoint
from curvcli.documents.columns import POINTS, Measurement
from curvcli.judge.limits import certified
from curvcli.judge.run import judge_track


@dataclass(frozen=True)
class Row:
    """One checkpoint's numbers. None is "not known"; what `certified` denies must not be relied on.

    Args:
        place: where it stands on the axis of steps; None where its step is not known and others' are.
        certified: whether lambda and rho of the full model converged.
        low, high: the bracket of rho on the data behind the shard.
        ratio: learning rate over the critical one of the next update.
        z: of the parameters whose step is steepest in a norm; None where none has one.
    """

    point: TrackPoint
    place: int | None
    certified: bool
    eigenvalue: float | None = None
    threshold: float | None = None
    rho: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    lr: float | None = None
    z: float | None = None

    @property
    def report(self) -> Report | None:
        """The point's report; None where it was not measured."""
        return self.point.report

    @property
    def measured(self) -> Measurement:
        """What the columns of a point are of."""
        return Measurement(self.point.report, self.point)

    @property
    def verdict(self) -> str:
        """The report's, or "failed"."""
        return self.point.report.verdict if self.point.report else "failed"

    @property
    def label(self) -> str:
        """What the row is called."""
        return f"step {self.point.step:,}" if self.point.step is not None else self.point.checkpoint


def rows(track: Track) -> list[Row]:
    """A row per point, in the track's order."""
    counted = axis(track) == "checkpoint"
    return [_row(point, number if counted else point.step) for number, point in enumerate(track.points, 1)]


def axis(track: Track) -> str:
    """What points are drawn over: "step", or "checkpoint", their number, where a measured one has no step."""
    unknown = any(point.step is None for point in track.points if point.report is not None)
    return "checkpoint" if unknown or all(point.step is None for point in track.points) else "step"


def newest(track: Track) -> TrackPoint | None:
    """The last point that was measured; None where none was."""
    return next((point for point in reversed(track.points) if point.report is not None), None)


def run_verdict(track: Track) -> RunVerdict | None:
    """The verdict on the run, which documents of older versions lack: by today's rules then. None where nothing is known."""
    return track.verdict or judge_track(track)


def part_names(track: Track) -> list[str]:
    """Embedding and head, and the layers of all reports in order of depth, each name once."""
    return sorted(
        dict.fromkeys(part.name for point in track.points if point.report for part in point.report.parts),
        key=lambda name: name != ENDS,
    )


def _row(point: TrackPoint, place: int | None) -> Row:
    report = point.report
    if report is None:
        return Row(point, place, certified=False)
    values: dict[str, Any] = {column.key: column.get(Measurement(report, point)) for column in POINTS}
    return Row(
        point,
        place,
        certified=certified(report.judged),
        eigenvalue=values["lambda"],
        threshold=values["threshold"],
        rho=values["rho"],
        low=values["rho_low"],
        high=values["rho_high"],
        ratio=values["update_ratio"],
        lr=values["lr"],
        z=values["z"],
    )
