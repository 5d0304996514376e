"""Tracks for tests, of real reports: those of the assets, at steps that are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import exp, sin
from statistics import median
from typing import Any

from places import ASSETS

from curvcli.documents import Finding, Report, Track, TrackPoint, TrainingStep, Versions, load_report


def asset(name: str) -> Report:
    return load_report(ASSETS / f"{name}-60.gate.report.json")


def at(report: Report, step: int, scale: float = 1.0, **full: Any) -> Report:
    """The report at another step, its curvature times `scale`, fields of the full model replaced."""
    found = json.loads(report.to_json())

    def grow(estimate: dict[str, Any]) -> None:
        for key in ("eigenvalue", "rho"):
            estimate[key] = None if estimate[key] is None else estimate[key] * scale

    for estimate in (found["full"], *found["layers"], *found["cumulative"]["restricted"], *found["cumulative"]["truncated"]):
        grow(estimate)
    held = found["generalisation"]
    found["generalisation"] = {key: None if value is None else value * scale for key, value in held.items()}
    found["checkpoint"] |= {"step": step, "path": f"run/checkpoint-{step}"}
    found["full"] |= full
    if found["full"]["status"] != "converged":
        found["verdict"] = "unresolved"
    return Report.model_validate(found)


def track(points: Sequence[Report | TrackPoint], *, log: Sequence[TrainingStep] = (), **changes: Any) -> Track:
    """A track of reports, surges worked out as the document says; a point that is given stands as it is."""
    made: list[TrackPoint] = []
    for number, report in enumerate(points):
        if isinstance(report, TrackPoint):
            made.append(report)
            continue
        before = [
            p.report.full.rho for p in made
            if p.report and p.report.full.status == "converged" and p.report.full.rho is not None
        ]  # fmt: skip
        rho = report.full.rho if report.full.status == "converged" else None
        surge = rho / median(before[-5:]) if rho is not None and len(before) > 1 else None
        made.append(
            TrackPoint(
                checkpoint=report.checkpoint.path, step=report.checkpoint.step,
                source="cached" if number % 3 == 1 else "measured", report=report,
                training_loss=report.data.loss * 1.02, surge=surge, surged=surge is not None and surge > 2,
            )
        )  # fmt: skip
    document = {
        "run": "run", "points": made, "log": list(log), "window": 5, "surge_limit": 2.0, "findings": [], "hvps": 137,
        "seconds": 33.9,
        "versions": Versions(curvcli="0.1.0", torch="2.13.0", transformers=None, python="3.11.2"),
    }  # fmt: skip
    return Track.model_validate({**document, **changes})


def failed(step: int | None, message: str = "optimizer.pt is truncated; copy it again") -> TrackPoint:
    return TrackPoint(
        checkpoint=f"run/checkpoint-{step}", step=step, source="failed", report=None, message=message,
        training_loss=None, surge=None, surged=False,
    )  # fmt: skip


def course_of(rhos: list[float | None]) -> Track:
    """A track whose points have these rho; None is an uncertified point."""
    report = load_report(next(ASSETS.glob("calm-60*.report.json")))
    points = []
    for i, rho in enumerate(rhos):
        full = report.full.model_copy(
            update={
                "rho": rho,
                "eigenvalue": (rho or 0) * (report.optimizer.threshold or 1),
                "residual": 0.0,
                "status": "converged" if rho is not None else "unconverged",
            }
        )
        here = report.model_copy(update={"full": full, "checkpoint": report.checkpoint.model_copy(update={"step": i})})
        points.append(
            TrackPoint(
                checkpoint=f"checkpoint-{i}",
                step=i,
                source="measured",
                report=here,
                training_loss=None,
                surge=None,
                surged=False,
            )
        )
    return Track(
        run="run", points=points, log=[], window=5, surge_limit=2, findings=[], hvps=0, seconds=0, versions=report.versions
    )


def course() -> Track:
    """A run with everything in it: a rise, a surge over the edge, a point that did not converge, one that failed."""
    hot, calm = asset("hot"), asset("calm")
    points: list[Report | TrackPoint] = [
        at(calm, 10, 0.15), at(calm, 20, 0.3), at(calm, 30, 0.6), at(calm, 40, 1.0), failed(50), at(hot, 60),
        at(calm, 70, 1.5, status="unconverged"), at(calm, 80, 1.2), at(calm, 90, 0.9),
    ]  # fmt: skip
    log = [TrainingStep(step=s, loss=2 + 3.5 * exp(-s / 25), lr=0.03 * min(s / 60, 1)) for s in range(1, 91)]
    findings = [
        Finding(code="surge", severity="warning", message="rho at step 60 is 3.1 times the median before it"),
        Finding(code="failed", severity="warning", message="run/checkpoint-50: optimizer.pt is truncated"),
    ]
    return track(points, log=log, findings=findings)


def long(points: int = 200, layers: int = 96) -> Track:
    """A long run of a deep model."""
    calm = asset("calm")
    reports = []
    for number in range(points):
        scale = 1 + 0.6 * sin(number / 9) + (2.5 if number == 120 else 0)
        report = at(calm, 1000 * (number + 1), scale)
        deep = [
            (own := report.layers[i % 8]).model_copy(
                update={
                    "index": i,
                    "name": f"model.layers.{i}",
                    "rho": own.rho * (1 + sin(i / 5)) if own.rho else None,
                    "status": "unconverged" if (i + number) % 97 == 0 else own.status,
                }
            )
            for i in range(layers)
        ]
        checkpoint = report.checkpoint.model_copy(update={"layers": layers})
        reports.append(report.model_copy(update={"layers": deep, "checkpoint": checkpoint}))
    log = [TrainingStep(step=s, loss=2 + 3 * exp(-s / 30_000) + 0.1 * sin(s), lr=1e-3) for s in range(0, 200_000, 20)]
    return track(reports, log=log)
