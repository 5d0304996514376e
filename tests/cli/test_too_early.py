"""A healthy network's first steps: too early to tell, in reports, gates, tracks and a tracker's records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from real import curv

from curvcli.documents import load_gate, load_report, load_track
from curvcli.judge.calibration import calibration, odds
from curvcli.render.largest_lr import action
from curvcli.training import CurvatureTracker
from curvcli.training.log import scalars


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Healthy steps of a small Llama, and its step 0: no optimizer state, as a Trainer has none then."""
    found = tiny.run_of(tmp_path_factory.mktemp("young"), 1, 30)
    start = found / "checkpoint-0"
    tiny.build().save_pretrained(start)
    (start / "trainer_state.json").write_text(json.dumps({"global_step": 0, "log_history": []}))
    return found


def analyzed(path: Path, out: Path, *options: object) -> str:
    done = curv("analyze", path, "--no-depths", "--tokens", 256, "-q", "-o", out, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("step", "options"), [pytest.param(0, ["--lr", "1e-3"], marks=pytest.mark.slow), (1, [])])
def test_a_healthy_network_in_its_first_steps_is_too_early(run: Path, tmp_path: Path, step: int, options: list[str]) -> None:
    said = analyzed(run / f"checkpoint-{step}", tmp_path / "r.json", *options)
    report = load_report(tmp_path / "r.json")
    assert (report.verdict, report.findings[0].code) == ("early", "early")
    assert report.full.rho is not None
    assert report.stable_lr is report.odds is None
    assert " TOO EARLY " in said
    assert f"what to do: wait until step {calibration().early_steps}, then measure again" in said
    assert "UNSTABLE" not in said


@pytest.mark.slow
def test_a_gate_on_it_is_unresolved_and_says_why(run: Path, tmp_path: Path) -> None:
    done = curv("gate", run / "checkpoint-1", "--max-rho", "1e-6", "--tokens", 256, "-o", tmp_path / "g.json")
    assert done.returncode == 3, done.stderr
    gate = load_gate(tmp_path / "g.json")
    assert (gate.outcome, gate.subject.verdict) == ("unresolved", "early")
    assert "too early" in gate.outcomes[0].message
    assert curv("gate", run / "checkpoint-1", "--require-resolved", "--tokens", 256).returncode == 1


@pytest.mark.slow
def test_an_older_run_has_a_verdict_and_a_largest_learning_rate(run: Path, tmp_path: Path) -> None:
    said = analyzed(run / "checkpoint-30", tmp_path / "r.json")
    report = load_report(tmp_path / "r.json")
    assert report.verdict != "early"
    found = report.stable_lr
    assert found.low <= found.value
    assert (found.high is None) == (report.generalisation.rho_low <= 0)
    assert found.ratio == pytest.approx(report.optimizer.lr / found.value)
    assert f"largest stable lr {found.value:.2g} (" in said
    assert f"you are at {report.optimizer.lr:.2g}" in said
    assert ("not covered" in said) == bool(found.uncovered)


@pytest.mark.slow
def test_moments_that_a_restart_began_anew_are_young_at_any_step(run: Path, tmp_path: Path) -> None:
    restarted = tmp_path / "checkpoint-5000"
    shutil.copytree(run / "checkpoint-1", restarted)
    (restarted / "trainer_state.json").write_text(json.dumps({"global_step": 5000, "log_history": []}))
    data = run.parent / "data" / "shard.bin"
    said = analyzed(restarted, tmp_path / "r.json", "--data", data, "--sequence-length", 16)
    report = load_report(tmp_path / "r.json")
    assert report.verdict == "early"
    # A network that knows nothing after 5,000 steps is lost, which goes first; of a sound one it is this.
    assert "stop: the run is collapsed" in said
    sound = report.model_copy(update={"course": None})
    assert f"wait until step {5_000 - 1 + calibration().early_steps:,}" in action(sound)


@pytest.mark.slow
def test_a_track_has_no_alarm_about_it(run: Path, tmp_path: Path) -> None:
    done = curv("track", run, "--lr", "1e-3", "--tokens", 256, "-q", "-o", tmp_path / "t.json")
    assert done.returncode == 0, done.stderr
    track = load_track(tmp_path / "t.json")
    assert [p.report.verdict == "early" for p in track.points] == [True, True, False]
    assert all(finding.severity == "info" for finding in track.findings if finding.code == "verdict-changed")


@pytest.mark.slow
def test_a_tracker_says_so_of_its_own_first_steps() -> None:
    torch.manual_seed(0)
    model = tiny.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    tracker = CurvatureTracker(model, optimizer, lambda net, ids: net(input_ids=ids, labels=ids).loss, probe=[batch])
    settled = calibration().early_steps
    records = []
    for step in range(5000, 5002 + settled):  # a job's own count goes on, its optimizer's begins anew
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        records.append(tracker.step(step))
    assert [record.early for record in records] == [True] * (settled - 1) + [False] * 3
    assert all(record.rho is not None for record in records)
    assert all(record.stable_lr is None for record in records[: settled - 1])
    last = records[-1]
    assert last.odds == pytest.approx(odds(last.rho, "AdamW"))
    assert all(record.odds is None for record in records[: settled - 1])
    assert last.stable_lr.low <= last.stable_lr.value <= last.stable_lr.high
    assert scalars(last)["curvature/stable_lr"] == last.stable_lr.value
    assert "curvature/stable_lr" not in scalars(records[0])
    # rho * lr_max / lr is the edge, whatever rho is: that of the coefficients for AdamW.
    again = last.rho * last.stable_lr.value / last.lr
    assert again == pytest.approx(records[-2].rho * records[-2].stable_lr.value / records[-2].lr)
