"""How far a run's newest rho stands above those before it, and which of them count."""

from __future__ import annotations

from typing import Any

import pytest
from tracks import course_of

from curvcli.documents import BodyEstimate
from curvcli.judge.readings import ReportReadings, past, track_readings


def surge(rhos: list[float | None], **changed: Any) -> float | None:
    """The newest point's surge as a run would have it, where the newest report's parts are `changed`."""
    *before, newest = course_of(rhos).points
    assert newest.report is not None
    parts = {name: getattr(newest.report, name).model_copy(update=update) for name, update in changed.items()}
    return ReportReadings(newest.report.model_copy(update=parts), history=past(before, 5)).surge().value


def test_surge_is_over_the_median_before() -> None:
    assert surge([1.0, 3.0]) is None
    assert surge([1.0, 2.0, 100.0, 3.0]) == 1.5
    assert surge([-1.0, 1.0, 3.0]) is None


def test_no_surge_is_over_what_does_not_compare() -> None:
    assert surge([1.0, 1.0, 3.0], optimizer={"preconditioner": "estimated"}) is None
    assert surge([1.0, 1.0, 3.0], optimizer={"name": "SGD"}) is None
    assert surge([1.0, 1.0, 3.0], checkpoint={"parameters": 7}) is None
    assert surge([1.0, 1.0, 3.0], data={"sha256": "0" * 64}) is None


def test_an_unconverged_value_is_no_past() -> None:
    points = list(course_of([1.0, 2.0, 3.0]).points)
    report = points[1].report
    assert report is not None
    full = report.full.model_copy(update={"status": "unconverged"})  # its rho stands in the report, not to be relied on
    points[1] = points[1].model_copy(update={"report": report.model_copy(update={"full": full})})
    assert [known.full.rho for known in past(points, 5)] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("full", "body", "expected"), [("converged", "unconverged", None), ("unconverged", "converged", 3.0)]
)
def test_without_rare_rows_a_surge_rests_on_what_the_verdict_does(full: str, body: str, expected: float | None) -> None:
    *before, newest = course_of([1.0, 1.0, 3.0]).points
    report = newest.report
    assert report is not None
    parts = {
        "full": report.full.model_copy(update={"status": full}),
        "body": BodyEstimate(**{**report.full.model_dump(), "status": body}, rows=3),
    }
    assert ReportReadings(report.model_copy(update=parts), history=past(before, 5)).surge().value == expected


def test_the_bracket_of_a_surge_is_from_all_residuals() -> None:
    track = course_of([1.0, 1.0, 3.0])
    points = []
    for point, residual in zip(track.points, (0.5, 0.5, 0.3), strict=True):
        assert point.report is not None
        full = point.report.full.model_copy(update={"residual": residual * (point.report.optimizer.threshold or 0)})
        points.append(point.model_copy(update={"report": point.report.model_copy(update={"full": full})}))
    reading = track_readings(track.model_copy(update={"points": points})).surge()
    assert (reading.low, reading.high) == (pytest.approx(3.0 / 1.5), pytest.approx(3.3 / 1.0))


def test_the_gate_holds_a_track_against_its_own_past() -> None:
    assert track_readings(course_of([1.0, 2.0, 100.0, 3.0])).surge().value == pytest.approx(1.5)
    # Only the window counts, and of it only what is certified.
    assert track_readings(course_of([9.0, 9.0, 9.0, 9.0, 1.0, 1.0, None, 1.0, 3.0])).surge().value == pytest.approx(3.0)
    assert "fewer than two" in track_readings(course_of([1.0, 3.0])).surge().reason
    assert "not converged" in track_readings(course_of([1.0, 1.0, 1.0, None])).surge().reason
