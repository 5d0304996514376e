"""The run's own log as the Trainer writes it: losses that are no numbers are no losses, and are not forgotten."""

from __future__ import annotations

import json
from pathlib import Path

from curvcli.checkpoints.base import Logged
from curvcli.checkpoints.formats.huggingface import run_log, trainer_state


def test_lines_of_a_log(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 2.5, "learning_rate": 0.1},
        {"step": 2, "loss": float("nan"), "learning_rate": 0.2},
        {"step": 3, "loss": float("inf")},
        {"step": 3, "eval_loss": 2.0},
        {"step": 4, "learning_rate": 0.3},
        {"step": 5, "loss": 10**400},
        {"step": 6, "loss": "2.0", "learning_rate": 0.4},
        {"train_loss": 2.0, "step": 6},
        {"loss": 2.0},
    ]
    text = json.dumps({"log_history": lines})
    assert "NaN" in text  # as Python's json writes it, and so the Trainer
    (tmp_path / "trainer_state.json").write_text(text)
    assert run_log(trainer_state(tmp_path)) == (
        Logged(1, 2.5, 0.1),
        Logged(2, None, 0.2, non_finite=True),
        Logged(3, None, None, non_finite=True),
        Logged(4, None, 0.3),
        Logged(6, None, 0.4),
    )
