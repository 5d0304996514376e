"""A shard whose loss is far from the run's own is most likely not what the run was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest

from curvcli.analysis.api import analyze
from curvcli.analysis.checkpoint import Options, open_for_analysis
from curvcli.analysis.document import Provenance
from curvcli.documents import Report
from curvcli.errors import InputError
from curvcli.judge.findings import _loss


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


def test_the_finding_is_in_the_report() -> None:
    model, batches = models.Net(), models.data()
    for logged, said in ((None, False), (0.1, True)):
        found = analyze(
            model, models.loss, batches, weights=[1, 2], max_hvps=3, depths=False, provenance=Provenance(logged_loss=logged)
        )
        findings = {finding.code: finding for finding in found.findings}
        assert ("loss-apart" in findings) == said
    assert findings["loss-apart"].severity == "warning"
    assert "the last one in the run's log 0.1:" in findings["loss-apart"].message


def test_the_runs_own_log_is_looked_at(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Provenance] = []

    def looked(*arguments: object, provenance: Provenance, **given: object) -> Report:
        seen.append(provenance)
        raise InputError("enough", hint="")

    monkeypatch.setattr("curvcli.analysis.checkpoint.analyze", looked)
    with pytest.raises(InputError, match="enough"):
        open_for_analysis(run, Options(optimizer="none", device="cpu", tokens=64)).measure()
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert seen[0].logged_loss == log[-1]["loss"]
