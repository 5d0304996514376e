"""Schedules for tests: phases as (step, active blocks)."""

from __future__ import annotations

from collections.abc import Iterable

from curvcli.documents import Phase, Schedule, ScheduleProvenance, Versions


def schedule(
    depth: int, *phases: tuple[int, Iterable[int]], mode: str = "grow", window: int = 0, margin: float | None = None
) -> Schedule:
    """`window` is how many steps after its step a phase may begin at the latest, in adaptive mode."""
    made: list[Phase] = []
    for step, blocks in phases:
        active = sorted(blocks)
        unlock = sorted(set(active) - set(made[-1].active)) if made else []
        latest = step + (window if made else 0)
        made.append(Phase(step=step, latest=latest, active=active, unlock=unlock, lr=None, predicted_rho=None))
    return Schedule.model_validate(
        {
            "mode": mode,
            "depth": depth,
            "order": "last",
            "blocks": None,
            "lock": "zero-output" if mode == "grow" else "no-update",
            "margin": margin,
            "lr_schedule": None,
            "phases": [p.model_dump() for p in made],
            "findings": [],
            "provenance": ScheduleProvenance(
                report=None,
                report_sha256=None,
                checkpoint=None,
                versions=Versions(curvcli="0", torch="0", transformers=None, python="3"),
            ).model_dump(),
        }
    )


def gated(*gates: int) -> Schedule:
    """Residual gates that are open at these steps, one a block."""
    plain = schedule(len(gates), (0, range(len(gates))))
    return Schedule.model_validate({**plain.model_dump(), "lock": "residual-gate", "gates": list(gates)})
