"""Where records of a tracker go: a JSONL file, TensorBoard, Weights & Biases, MLflow, trackio."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curvcli.documents import Record

Sink = Callable[[Record], None]
# What is drawn over steps; the rest of a record is in the JSONL file.
SCALARS = (
    "eigenvalue", "rho", "residual", "update_ratio", "update_rms", "gradient_norm", "gradient_sigmas", "gradient_quotient",
    "z", "sharpness", "dual_norm", "attention_logit", "attention_entropy", "spectral_norm", "active_depth", "hvps",
    "seconds", "overhead",
)  # fmt: skip


def open_log(path: Path | str | None) -> list[Sink]:
    """The sinks of a tracker: the file, if any, and an active Weights & Biases run."""
    return ([jsonl(Path(path))] if path is not None else []) + [wandb]


def jsonl(path: Path) -> Sink:
    """Append each record as one line, in one write. Half a line that a killed job left behind is ended first."""

    def write(record: Record) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A single write in append mode, so that lines of several writers do not mix.
        line = ("\n" if _torn(path) else "") + record.to_line()
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(handle, line.encode()) < len(line.encode()):
                raise OSError("only a part of the line could be written")
        finally:
            os.close(handle)

    return write


def _torn(path: Path) -> bool:
    """Whether a file's last line is not ended."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"


def tensorboard(writer: Any) -> Sink:
    """Scalars under curvature/ to a torch.utils.tensorboard.SummaryWriter."""

    def write(record: Record) -> None:
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record.step)

    return write


def wandb(record: Record) -> None:
    """Scalars under curvature/ to the active run, where the job has one; wandb is not imported for it."""
    module = sys.modules.get("wandb")
    run = getattr(module, "run", None)
    if run is not None:
        # Without a step: wandb drops what goes back, and the trainer may have logged a later one.
        run.log({**scalars(record), "curvature/step": record.step})


def mlflow(run_id: str | None = None) -> Sink:
    """Scalars under curvature/ to a run of MLflow, the active one by default, without waiting for its server."""

    def write(record: Record) -> None:
        import mlflow

        run = active_run(mlflow, run_id)
        mlflow.log_metrics(scalars(record), step=record.step, run_id=run, synchronous=False)

    return write


def active_run(mlflow: Any, run_id: str | None) -> str:
    """The run that is meant. Raises RuntimeError where there is none: MLflow itself would begin one."""
    if run_id:
        return run_id
    run = mlflow.active_run()
    if run is None:
        raise RuntimeError("MLflow has no active run")
    return str(run.info.run_id)


def trackio(record: Record) -> None:
    """Scalars under curvature/ to the active run of trackio. Raises RuntimeError, as trackio does, where there is none."""
    import trackio

    # Without a step: the job logs under steps of its own, and trackio counts.
    trackio.log({**scalars(record), "curvature/step": record.step})


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by the name under which they are drawn; absent where there are none."""
    found = {f"curvature/{name}": value for name in SCALARS if (value := getattr(record, name)) is not None}
    return found if record.stable_lr is None else {**found, "curvature/stable_lr": record.stable_lr.value}
