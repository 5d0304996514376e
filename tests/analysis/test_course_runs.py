"""Small runs that were really trained: a healthy, a wrecked and a collapsed one, each with its learning rate at 0 by now.

Their newest checkpoints are flat, and their rho next to nothing: what is wrong with them is in the loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from courses import cosine, postnorm, prenorm, train, wrecking
from real import curv

import curvcli
from curvcli.analysis import document
from curvcli.analysis.gate import gate
from curvcli.documents import LossCourse, Report, Track, load_report
from curvcli.judge.verdict import judge

STEPS, SAVED = 150, (20, 70, 150)
QUICK: dict[str, Any] = {"tokens": 256, "mode": "kept", "device": "cpu"}
WORDS = ("--tokens", "128", "--mode", "kept", "--device", "cpu", "-q")


MADE = {
    "healthy": (prenorm, cosine(2e-2, 20, STEPS)),
    "wrecked": (lambda: prenorm(32, 3), wrecking(1e-2, 2e-1, 80, STEPS)),
    "collapsed": (postnorm, cosine(3e-1, 2, STEPS)),
}


@pytest.fixture(scope="module")
def run_called(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    found: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in found:
            model, rate = MADE[name]
            torch.manual_seed(0)
            found[name] = train(tmp_path_factory.mktemp(name), model(), rate, steps=STEPS, save=SAVED)
        return found[name]

    return of


@pytest.fixture(scope="module")
def tracked(run_called: Callable[[str], Path]) -> Callable[[str], Track]:
    found: dict[str, Track] = {}

    def of(name: str) -> Track:
        if name not in found:
            found[name] = curvcli.track(run_called(name), cache=False, **QUICK)
        return found[name]

    return of


@pytest.fixture(scope="module")
def newest(tracked: Callable[[str], Track]) -> Callable[[str], Report]:
    def of(name: str) -> Report:
        report = tracked(name).points[-1].report
        assert report is not None
        return report

    return of


def of_log(run: Path) -> list[float]:
    state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"]]


@pytest.mark.slow
def test_the_runs_are_what_they_are_called(run_called: Callable[[str], Path]) -> None:
    """The losses themselves, not what is made of them: about 0.9 nats with context and 4.1 without."""
    late = {name: sum(of_log(run_called(name))[-10:]) / 10 for name in MADE}
    assert late["healthy"] < 1.2
    assert min(of_log(run_called("wrecked"))) < 1.2
    assert late["wrecked"] > 2.5
    assert late["collapsed"] > 4.0
    assert min(of_log(run_called("collapsed"))[10:]) > 3.5


@pytest.mark.parametrize("name", ["healthy", "wrecked"])
def test_a_lost_network_is_given_no_rate_and_no_odds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Path(curvcli.__file__).parent / "cli" / "demo" / "checkpoint-60"
    monkeypatch.setattr(document, "loss_course", lambda *_, **__: LossCourse.model_validate({"name": name}))
    report = curvcli.track(demo, cache=False, **{**QUICK, "tokens": 128}).points[-1].report
    assert report is not None
    assert report.judged.rho is not None
    assert (report.stable_lr is None) == (report.odds is None) == (name == "wrecked")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["healthy", "wrecked"])
def test_curvature_alone_would_say_stable(newest: Callable[[str], Report], name: str) -> None:
    report = newest(name)
    assert judge(report.judged, report.generalisation) == "stable"
    assert report.judged.rho is not None
    assert report.judged.rho < 0.1


@pytest.mark.slow
def test_a_healthy_run_alarms_nowhere(tracked: Callable[[str], Track]) -> None:
    track = tracked("healthy")
    assert track.verdict is not None
    assert (track.verdict.name, track.verdict.action, track.verdict.step) == ("healthy", "go on", None)
    for point in track.points:
        assert point.report is not None
        assert point.report.course is not None
        assert point.report.course.name == "healthy"
        assert not [f for f in point.report.findings if f.severity == "error"]
    last = track.points[-1].report
    assert last is not None
    assert last.verdict == "stable"
    decayed = next(f for f in last.findings if f.code == "lr-decayed")
    assert decayed.severity == "info"
    rho, share = last.judged.rho, last.course.lr_share if last.course else None
    assert rho is not None
    assert share is not None
    assert float(re.findall(r"about ([\d.e+-]+)$", decayed.message)[0]) == pytest.approx(rho / share, rel=0.01)


@pytest.mark.slow
def test_a_wrecked_run_names_the_step_and_the_checkpoint_to_go_back_to(tracked: Callable[[str], Track]) -> None:
    run = tracked("wrecked").verdict
    assert run is not None
    assert (run.name, run.action) == ("wrecked", "go back")
    assert run.step is not None
    assert 80 < run.step <= 95
    assert run.good_step == 70
    assert (run.good_checkpoint or "").endswith("checkpoint-70")
    assert run.restart_lr is not None
    assert run.restart_lr <= 0.1
    finding = tracked("wrecked").findings[0]
    assert (finding.code, finding.severity) == ("run-wrecked", "error")
    assert "checkpoint-70" in finding.message


@pytest.mark.slow
def test_a_collapsed_run_says_so(tracked: Callable[[str], Track], newest: Callable[[str], Report]) -> None:
    run, report = tracked("collapsed").verdict, newest("collapsed")
    assert run is not None
    assert (run.name, run.action) == ("collapsed", "stop")
    assert report.data.unigram_loss is not None
    assert report.data.loss > 0.98 * report.data.unigram_loss


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("wrecked", "loss-over-best"), ("collapsed", "no-context")])
def test_a_lost_checkpoint_is_not_called_stable(newest: Callable[[str], Report], name: str, code: str) -> None:
    report = newest(name)
    assert report.verdict == "unresolved"
    first = report.findings[0]
    assert (first.code, first.severity) == (code, "error")
    assert "does not limit" not in " ".join(f.message for f in report.findings)


def test_a_wrecked_run_passes_no_gate(run_called: Callable[[str], Path], tmp_path: Path) -> None:
    done = curv("gate", run_called("wrecked"), "--max-rho", 1, *WORDS, "-o", tmp_path / "gate.json")
    assert done.returncode == 1, done.stderr
    words = " ".join(done.stdout.split())
    assert "max-rho 1.000" in words
    assert re.search(r"since step (8|9)\d; stop, go back to .*checkpoint-70 \(step 70\)", words)
    outcomes = {o["rule"]: o["outcome"] for o in json.loads((tmp_path / "gate.json").read_text())["outcomes"]}
    assert outcomes == {"max-rho": "passed", "require-healthy": "broken"}


@pytest.mark.slow
def test_every_point_of_a_run_may_be_held(tracked: Callable[[str], Track], run_called: Callable[[str], Path]) -> None:
    track = tracked("healthy")
    rhos = [point.report.judged.rho for point in track.points if point.report]
    assert len(rhos) == 3
    highest = max(rho for rho in rhos if rho is not None)
    of: dict[str, Any] = {"require_healthy": True, "max_loss_rise": 60.0}
    assert gate(track, max_rho=100 * highest, any=True, **of).outcome == "passed"
    low = gate(track, max_rho=1e-9, any=True)
    assert (low.outcome, low.subject.points, low.outcomes[0].rule) == ("broken", 3, "max-rho")
    measured = gate(run_called("healthy"), max_rho=100 * highest, any=True, **QUICK)
    assert (measured.outcome, measured.subject.points, measured.subject.kind) == ("passed", 3, "checkpoint")


@pytest.mark.slow
def test_the_report_alone_knows(newest: Callable[[str], Report], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(newest("wrecked").to_json())
    decided = gate(load_report(tmp_path / "report.json"), max_rho=1.0)
    assert (decided.exit_code, decided.outcomes[-1].rule, decided.outcomes[-1].outcome) == (1, "require-healthy", "broken")
