"""Logs of a tracker, written as one writes them."""

from __future__ import annotations

from pathlib import Path

from curvcli.documents import Log, Record


def record(step: int, rho: float | None = 0.5, **changes: object) -> Record:
    values = {
        "step": step, "loss": 3.2, "lr": 1e-3, "eigenvalue": None if rho is None else rho * 38_000, "rho": rho,
        "residual": None if rho is None else 12.0, "update_ratio": None, "active_depth": 4, "hvps": 12, "seconds": 1.5,
        "status": "converged" if rho is not None else "failed",
    }  # fmt: skip
    return Record.model_validate({**values, **changes})


def write(path: Path, *records: Record | str, mode: str = "a") -> None:
    with path.open(mode) as stream:
        stream.writelines(r if isinstance(r, str) else r.to_line() for r in records)


def steps(log: Log) -> list[int]:
    return [r.step for r in log.records]
