"""Logs of a tracker, written as one writes them."""

from __future__ import annotations

from math import exp, sin
from pathlib import Path

from curvcli.documents import Log, Record


def record(step: int, rho: float | None = 0.5, **changes: object) -> Record:
    values = {
        "step": step, "loss": 3.2, "lr": 1e-3, "eigenvalue": None if rho is None else rho * 38_000, "rho": rho,
        "residual": None if rho is None else 12.0, "update_ratio": None, "active_depth": 4, "hvps": 12, "seconds": 1.5,
        "status": "converged" if rho is not None else "failed",
    }  # fmt: skip
    return Record.model_validate({**values, **changes})


def job(path: Path = Path("run/curvature.jsonl"), records: int = 60) -> Log:
    """A log with everything in it: unlocks, a spike past the edge, a value not converged, a failure, every companion."""
    found = []
    for n in range(records):
        step, depth = 10 * n, 2 + 2 * (n > 20) + 4 * (n > 40)
        more: dict[str, object] = {
            "loss": 2.7 + 3 * exp(-n / 20), "lr": 3e-3 * min(1, n / 8), "active_depth": depth, "update_ratio": 0.3 + n / 400,
            "gradient_norm": 3 * exp(-n / 30), "gradient_sigmas": sin(n), "update_rms": 0.9, "gradient_quotient": 40 + n,
            "attention_logit": 5 + n / 9, "attention_entropy": 2 - n / 60, "spectral_norm": 3 + n / 50,
            "overhead": 0.048 if n else None, "probe_batches": 2, "early": n < 3,
        }  # fmt: skip
        rho: float | None = 0.2 + 0.01 * n
        if n == 30:
            more["status"] = "unconverged"
        if n == 40:
            rho, more["gradient_sigmas"], more["gradient_outlier"] = 1.9, 7.1, True
        if n == 50:
            rho, more["message"] = None, "out of memory"
        found.append(record(step, rho, **more))
    return Log(path, exists=True, records=tuple(found), damaged=1, damage="line 7: step: Field required", superseded=2)


def write(path: Path, *records: Record | str, mode: str = "a") -> None:
    with path.open(mode) as stream:
        stream.writelines(r if isinstance(r, str) else r.to_line() for r in records)


def steps(log: Log) -> list[int]:
    return [r.step for r in log.records]
