"""`curv gate` on checkpoints, within a time budget, and on tracks."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import real
from pace import in_time
from places import ASSETS
from real import Done, process
from tiny import run_of
from tracks import course_of

from curvcli.analysis.budget import GRACE, LEAST_GRACE
from curvcli.documents import load_gate, load_report


def curv(*arguments: object, **environment: str) -> Done:
    return real.curv("gate", *arguments, **environment)


# --- a checkpoint, and the time budget ---------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_is_measured_and_its_report_kept(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = (run_of(tmp_path, 60), "--tokens", 256, "--mode", "kept", "--max-rho", 50, "--min-tokens", 2000)
    done = curv(*arguments, "--report", report, "-q", "--format", "json")
    assert (done.returncode, done.stderr) == (1, "")
    gate = json.loads(done.stdout)
    assert [o["outcome"] for o in gate["outcomes"]] == ["passed", "broken"]
    assert gate["subject"]["kind"] == "checkpoint"
    assert load_report(report).full.rho == gate["subject"]["rho"]
    again = curv(report, "--max-rho", 50, "--min-tokens", 2000, "--format", "json")
    assert json.loads(again.stdout)["outcomes"] == gate["outcomes"]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_tiny_budget_is_kept_and_leaves_the_gate_unresolved(samples: Path, tmp_path: Path, budget: int) -> None:
    """In a process of its own, whose start counts too."""
    start = time.perf_counter()
    arguments = (samples / "hot" / "checkpoint-60", "--tokens", 32768, "--max-rho", 1, "--budget", f"{budget}s")
    done = process("gate", *arguments, "-o", tmp_path / "gate.json", "--report", tmp_path / "r.json", OMP_NUM_THREADS="1")
    taken = time.perf_counter() - start
    assert done.returncode == 3, done.stderr
    assert in_time(taken - budget - max(LEAST_GRACE, GRACE * budget), 6)
    assert "--budget" in done.stdout
    (outcome,) = load_gate(tmp_path / "gate.json").outcomes
    assert outcome.outcome == "unresolved"
    assert outcome.low is None
    if (tmp_path / "r.json").exists():
        assert load_report(tmp_path / "r.json").full.status != "converged"


@pytest.mark.slow
def test_a_fair_budget_decides_on_the_full_model_alone(samples: Path, tmp_path: Path) -> None:
    """Less than the whole analysis takes: rho is certified, layers or depths are skipped, and the rules know it."""
    arguments = (samples / "hot" / "checkpoint-60", "--max-rho", 1, "--report", tmp_path / "r.json", "-q")
    for seconds in (15, 20, 30, 45):
        done = process("gate", *arguments, "--budget", seconds, OMP_NUM_THREADS="1")
        if done.returncode != 3:
            break
    assert done.returncode == 1, done.stdout
    report = load_report(tmp_path / "r.json")
    assert report.full.status == "converged"
    assert report.full.eigenvalue == pytest.approx(load_report(ASSETS / "hot-60.gate.report.json").full.eigenvalue, rel=0.01)
    skipped = [e for e in (*report.layers, *report.cumulative.restricted) if e.status == "skipped"]
    assert skipped
    assert any(f.code == "out-of-time" for f in report.findings)


# --- tracks ------------------------------------------------------------------------------------


@pytest.fixture
def track(tmp_path: Path) -> Path:
    path = tmp_path / "track.json"
    path.write_text(course_of([1.0, 1.0, 1.0, 3.0]).to_json())
    return path


def test_a_track_is_judged_at_its_newest_point(track: Path) -> None:
    done = curv(track, "--max-surge", 2, "--format", "json")
    assert done.returncode == 1, done.stderr
    gate = json.loads(done.stdout)
    assert gate["subject"]["kind"] == "track"
    assert gate["subject"]["step"] == 3
    assert gate["outcomes"][0]["value"] == pytest.approx(3.0)
    assert curv(track, "--max-surge", 4).returncode == 0
    assert curv(track, "--max-surge", 4, "--budget", "5s").returncode == 2
    no_baseline = curv(track, "--max-regression", 5)
    assert no_baseline.returncode == 2
    assert "max-regression compares with a baseline" in no_baseline.stderr


def test_a_track_is_a_baseline(track: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(course_of([None] * 4 + [6.0]).points[-1].report.to_json())  # type: ignore[union-attr]
    done = curv(report, "--max-surge", 5, "--max-regression", 50, "--baseline", track, "--format", "json")
    values = {o["rule"]: o["value"] for o in json.loads(done.stdout)["outcomes"]}
    assert values["max-surge"] == pytest.approx(6.0)  # over the median 1
    assert values["max-regression"] == pytest.approx(100.0)  # over the newest, 3


def test_a_track_that_already_has_the_checkpoint_does_not_compare_it_with_itself(track: Path, tmp_path: Path) -> None:
    """As where a nightly `curv track` ran first: 0 % regression, whatever the run did."""
    newest = json.loads(track.read_text())["points"][-1]["report"]
    for path in (newest["checkpoint"]["path"], "elsewhere/checkpoint-3"):
        newest["checkpoint"]["path"] = path
        (tmp_path / "report.json").write_text(json.dumps(newest))
        done = curv(tmp_path / "report.json", "--max-regression", 50, "--baseline", track, "--format", "json")
        assert done.returncode == 1, done.stderr
        assert json.loads(done.stdout)["outcomes"][0]["value"] == pytest.approx(200.0)  # over the one before, 1
