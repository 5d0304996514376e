"""Checkpoints of a run whose schedule has ended at 0, and runs whose log is a tracker's."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from logs import record, write
from tiny import run_of
from transformers import TrainingArguments, get_scheduler

from curvcli.analysis.cache import FileCache
from curvcli.analysis.checkpoint import Options, analyze_checkpoint, open_for_analysis
from curvcli.analysis.gate import gate
from curvcli.analysis.inspection import inspect_checkpoint
from curvcli.analysis.track import key_of, track_run
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.arguments import last_step_lr
from curvcli.checkpoints.base import Logged
from curvcli.errors import InputError

FEW = Options(tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")


def arguments(place: Path, **given: Any) -> TrainingArguments:
    found = TrainingArguments(str(place), use_cpu=True, report_to=[], **{"learning_rate": 3e-3, "max_steps": 9, **given})
    torch.save(found, place / "training_args.bin")
    return found


def finished(run: Path, log: list[dict[str, float]], step: int = 9) -> Path:
    """The run's last checkpoint as a schedule that ends at 0 leaves it."""
    checkpoint = run / f"checkpoint-{step}"
    document = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for group in document["param_groups"]:
        group |= {"lr": 0.0, "initial_lr": 3e-3}
    torch.save(document, checkpoint / "optimizer.pt")
    state = {"global_step": step, "max_steps": 9, "log_history": log}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return checkpoint


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("given", [{}, {"warmup_steps": 3}, {"warmup_steps": 0.3}, {"max_steps": 1}])
def test_the_last_steps_rate_is_that_of_transformers(kind: str, given: dict[str, Any], tmp_path: Path) -> None:
    said = arguments(tmp_path, lr_scheduler_type=kind, **given)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=said.learning_rate)
    steps = said.max_steps
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=said.get_warmup_steps(steps), num_training_steps=steps)
    for _ in range(steps):
        last = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": steps, "max_steps": steps}))
    assert last_step_lr(tmp_path) == pytest.approx(last, rel=1e-9)


@pytest.mark.parametrize(
    ("given", "state"),
    [
        ({}, {"global_step": 8, "max_steps": 9}),  # not at its end
        ({}, {"global_step": 9}),
        ({}, {"global_step": True, "max_steps": True}),
        ({}, []),
        ({"lr_scheduler_type": "polynomial"}, {"global_step": 9, "max_steps": 9}),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "cosine"}, {"global_step": 9, "max_steps": 9}),
        ({"warmup_steps": 9}, {"global_step": 9, "max_steps": 9}),
        ({"learning_rate": 0.0}, {"global_step": 9, "max_steps": 9}),
    ],
)
def test_what_arguments_do_not_say_is_not_made_up(given: dict[str, Any], state: Any, tmp_path: Path) -> None:
    arguments(tmp_path, **given)
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert last_step_lr(tmp_path) is None


@pytest.mark.parametrize("name", ["warmup_steps", "warmup_ratio", "learning_rate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "junk", [1]])
def test_arguments_of_strangers_say_nothing(name: str, value: Any, tmp_path: Path) -> None:
    said = arguments(tmp_path)
    setattr(said, name, value)
    torch.save(said, tmp_path / "training_args.bin")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 9, "max_steps": 9}))
    assert last_step_lr(tmp_path) is None


def test_a_cached_report_is_of_the_arguments_beside_it(tmp_path: Path) -> None:
    run = run_of(tmp_path, 9)
    state = finished(run, log=[]) / "trainer_state.json"

    def key() -> str:
        return key_of(open_for_analysis(run / "checkpoint-9", replace(FEW, lr=1e-3)))

    keys = [key()]
    arguments(run, label_smoothing_factor=0.1)
    keys.append(key())
    (run / "trainer_state.json").write_text(state.read_text())
    keys.append(key())
    assert len(set(keys)) == 3


def test_a_finished_run_that_logged_nothing_is_judged(tmp_path: Path) -> None:
    run = run_of(tmp_path, 9)
    checkpoint = finished(run, log=[])
    with pytest.raises(InputError, match=r"the learning rate in .*optimizer\.pt is 0 and the run's log has none"):
        analyze_checkpoint(checkpoint, FEW)
    arguments(checkpoint)
    report = analyze_checkpoint(checkpoint, FEW)
    assert (report.optimizer.lr, report.optimizer.lr_source) == (pytest.approx(3e-3 / 9), "schedule")
    assert ["a finished schedule" in f.message for f in report.findings if f.code == "lr-from-schedule"] == [True]
    assert (
        "that of the last step, by the run's arguments, 0.000333333"
        in inspect_checkpoint(checkpoint)["notes"]["learning-rate"]
    )
    # What was logged goes before it, and what the user says before both.
    finished(run, log=[{"step": 8, "loss": 3.0, "learning_rate": 7e-4}])
    assert analyze_checkpoint(checkpoint, FEW).optimizer.lr == pytest.approx(7e-4)


def test_a_trackers_log_is_the_runs_where_it_has_none(tmp_path: Path) -> None:
    run = run_of(tmp_path, 2, 9)
    plain = open_checkpoint(run / "checkpoint-9").log
    write(run / "curvature.jsonl", record(2, 0.5, loss=3.0, lr=2e-3), record(9, 0.5, loss=2.5, lr=1e-3, loss_finite=False))
    assert open_checkpoint(run / "checkpoint-9").log == plain  # its own goes first
    for step in (2, 9):
        finished(run, log=[], step=step)
    write(run / "curvature.jsonl", record(12, 0.5, loss=9.9), "half a li")
    found = open_checkpoint(run / "checkpoint-9")
    assert found.log == (Logged(2, 3.0, 2e-3), Logged(9, 2.5, 1e-3, non_finite=True))
    assert [f.severity for f in found.findings if f.code == "tracker-log" and "curvature.jsonl" in f.message] == ["info"]
    assert open_checkpoint(run / "checkpoint-2").log == found.log[:1]
    assert found.last_lr == 1e-3


def test_a_track_has_the_losses_of_the_trackers_log(tmp_path: Path) -> None:
    run = run_of(tmp_path, 2, 9)
    for step in (2, 9):
        finished(run, log=[], step=step)
    losses = [3.0 - n / 10 for n in range(9)]
    write(run / "curvature.jsonl", *(record(n + 1, 0.5, loss=loss) for n, loss in enumerate(losses)))
    cache = FileCache(tmp_path / "cache")
    track = track_run(run, FEW, cache)
    assert [entry.loss for entry in track.log] == losses
    assert [point.training_loss for point in track.points] == [losses[1], losses[8]]
    # Records to come, after the newest checkpoint, change no report; other losses up to it do.
    write(run / "curvature.jsonl", record(10, 0.5))
    assert [p.source for p in track_run(run, FEW, cache).points] == ["cached", "cached"]
    before = key_of(open_for_analysis(run / "checkpoint-9", FEW))
    write(run / "curvature.jsonl", record(8, 0.5, loss=7.0))
    assert key_of(open_for_analysis(run / "checkpoint-9", FEW)) != before


def test_a_log_that_cannot_be_read_is_said_and_costs_nothing_else(tmp_path: Path) -> None:
    run = run_of(tmp_path, 9)
    checkpoint = finished(run, log=[])
    for damage in (lambda file: file.write_text("junk\n"), lambda file: (file.unlink(), os.mkfifo(file))):
        damage(run / "curvature.jsonl")
        found = open_checkpoint(checkpoint)
        assert found.log == ()
        said = [f.message for f in found.findings if f.code == "unread-log"]
        assert len(said) == (run / "curvature.jsonl").is_file()


def test_a_gate_passes_a_finished_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, 300)
    arguments(finished(run, log=[], step=300))
    state = run / "checkpoint-300" / "trainer_state.json"
    state.write_text(json.dumps({"global_step": 300, "max_steps": 300}))
    found = gate(run, max_rho=1.0, data=str(tmp_path / "data/shard.bin"), tokens=128, sequence_length=16)
    assert (found.outcome, found.exit_code) == ("passed", 0), found.outcomes
