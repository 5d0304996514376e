"""A shard whose loss is far from the run's own is most likely not what the run was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curvcli.checkpoints import Options, analyze_checkpoint
from curvcli.verdict import _loss


@pytest.mark.parametrize(
    ("measured", "logged", "said"),
    [
        (4.222, 2.251, True),  # rows whose labels were dropped, as they were once read from parquet
        (2.05, 1.80, False),  # 256 tokens of a sample run's own data: 0.90 to 1.14 of what it logged
        (1.62, 1.80, False),
        (0.9, 1.8, True),
        (0.03, 0.01, False),  # far apart as a ratio, and nothing in nats
        (2.0, None, False),
        (2.0, 0.0, False),
        (2.0, float("inf"), False),
        (2.0, float("nan"), False),
    ],
)
def test_far_above_or_below(measured: float, logged: float | None, said: bool) -> None:
    assert [finding.code for finding in _loss(measured, logged)] == (["loss-apart"] if said else [])


def test_the_runs_own_log_is_looked_at(run: Path) -> None:
    """The sample run's data, and the same with a log of another loss."""
    options = Options(depths=False, max_hvps=3, device="cpu")
    own = analyze_checkpoint(run, options)
    assert "loss-apart" not in [finding.code for finding in own.findings]
    log = json.loads((run / "trainer_state.json").read_text())
    for entry in log["log_history"]:
        entry["loss"] = 2.0
    (run / "trainer_state.json").write_text(json.dumps(log))
    found = {finding.code: finding for finding in analyze_checkpoint(run, options).findings}
    assert found["loss-apart"].severity == "warning"
    assert "the last one in the run's log 2:" in found["loss-apart"].message
