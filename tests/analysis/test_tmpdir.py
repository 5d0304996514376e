"""A TMPDIR that lies in memory is no disk for vectors."""

from __future__ import annotations

import re
from pathlib import Path

import models
import pytest

from curvcli.analysis.plan import GIB, fitted, spare
from curvcli.curvature import resources, scratch
from curvcli.curvature.problem import Problem
from curvcli.curvature.scratch import Scratch
from curvcli.errors import UsageError


@pytest.fixture
def problem() -> Problem:
    batches = [(ids[:8], targets[:8]) for ids, targets in models.data()]
    return Problem.create(models.Net(), models.loss, batches, [8.0, 8.0])


def test_a_tmpdir_in_memory_counts_as_memory_and_the_plan_says_so(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "return_blocks", lambda: True)
    monkeypatch.setattr(resources, "held_bytes", lambda device: 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scratch, "in_memory", lambda folder: True)
    assert spare(problem, None) is None
    assert fitted(problem, GIB, "auto", 32)[1].offloaded == 0
    said = f"TMPDIR={tmp_path} lies in memory, vectors have no disk"
    assert str(fitted(problem, GIB, "auto", 32)[1]).endswith(f" GiB expected ({said})")
    with pytest.raises(UsageError, match=re.escape(f"fewer tokens (--tokens); {said}")):
        fitted(problem, 1000, "auto", 32)
    monkeypatch.setattr(scratch, "in_memory", lambda folder: folder == tmp_path)
    assert "lies in memory, vectors may lie in /var/tmp)" in str(fitted(problem, GIB, "auto", 32)[1])
    monkeypatch.setattr(scratch, "in_memory", lambda folder: False)
    assert str(fitted(problem, GIB, "auto", 32)[1]).endswith(" GiB expected")
    assert spare(problem, None) == Scratch(tmp_path)
