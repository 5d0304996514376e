"""A track's points as the rows that the table, the CSV, the picture and the page all draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from typing import Any

from curvcli.documents import ENDS, Report, Track, TrackPoint
from curvcli.documents.columns import POINTS, Measurement
from curvcli.judge.limits import certified
from curvcli.render.fit import thin

Series = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Row:
    """One checkpoint's numbers. None is "not known"; what `certified` denies must not be relied on.

    Args:
        place: where it stands on the axis of steps; None where its step is not known and others' are.
        certified: whether lambda and rho of the full model converged.
        low, high: the bracket of rho on the data behind the shard.
        ratio: learning rate over the critical one of the next update.
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

    @property
    def report(self) -> Report | None:
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


def series(track: Track) -> dict[str, Series]:
    """What is drawn, each as places on the axis and values.

    Lines break (NaN) where there is no value, those of rho and lambda where it is not certified; "rho?" and
    "lambda?" are those that are not to be relied on. "low" and "high" bracket rho on the data behind the shard,
    "surges" are values of rho, and at the places of "failed" nothing could be measured. "lr" and "loss" are of the
    run's log, and where it has none of the checkpoints.
    """
    found = [(row.place, row) for row in rows(track) if row.place is not None]

    def line(value: Callable[[Row], float | None], certified: bool = True) -> Series:
        values = [value(row) if row.certified is certified else None for _, row in found]
        return [place for place, _ in found], [nan if y is None else y for y in values]

    def pick(value: Callable[[Row], float | None], wanted: Callable[[Row], bool] = lambda row: True) -> Series:
        kept = [(place, y) for place, row in found if wanted(row) and (y := value(row)) is not None]
        return [place for place, _ in kept], [y for _, y in kept]

    bracketed = [(place, row) for place, row in found if row.certified and row.low is not None and row.high is not None]
    places = [place for place, _ in bracketed]
    # The log counts steps: it has no place on an axis of checkpoints.
    log = track.log if axis(track) == "step" else []
    rates = [(entry.step, entry.lr) for entry in log if entry.lr is not None]
    losses = [(entry.step, entry.loss) for entry in log if entry.loss is not None]
    return {
        "rho": line(lambda row: row.rho),
        "rho?": pick(lambda row: row.rho, lambda row: not row.certified),
        "low": (places, [row.low for _, row in bracketed if row.low is not None]),
        "high": (places, [row.high for _, row in bracketed if row.high is not None]),
        "surges": pick(lambda row: row.rho, lambda row: row.point.surged),
        "failed": pick(lambda row: 0.0, lambda row: row.report is None),
        "lambda": line(lambda row: row.eigenvalue),
        "lambda?": pick(lambda row: row.eigenvalue, lambda row: not row.certified),
        "threshold": pick(lambda row: row.threshold),
        "ratio": ([place for place, _ in found], [nan if row.ratio is None else row.ratio for _, row in found]),
        "lr": _unzip(rates) if rates else pick(lambda row: row.lr),
        "loss": _unzip(losses) if losses else pick(lambda row: row.point.training_loss),
    }


def axis(track: Track) -> str:
    """What points are drawn over: "step", or "checkpoint", their number, where a measured one has no step."""
    unknown = any(point.step is None for point in track.points if point.report is not None)
    return "checkpoint" if unknown or all(point.step is None for point in track.points) else "step"


def newest(track: Track) -> TrackPoint | None:
    """The last point that was measured; None where none was."""
    return next((point for point in reversed(track.points) if point.report is not None), None)


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
        certified=certified(report.full),
        eigenvalue=values["lambda"],
        threshold=values["threshold"],
        rho=values["rho"],
        low=values["rho_low"],
        high=values["rho_high"],
        ratio=values["update_ratio"],
        lr=values["lr"],
    )


def _unzip(points: list[tuple[int, float]]) -> Series:
    kept = thin(points, 1000)
    return [x for x, _ in kept], [y for _, y in kept]
