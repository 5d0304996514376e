"""Which checkpoint a run means: the newest complete one, and what was skipped is named everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from formats import trainer
from tiny import config

from curvcli.analysis.cache import NoCache
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.analysis.inspection import inspect_checkpoint
from curvcli.analysis.track import track_run
from curvcli.checkpoints import find_checkpoints, open_checkpoint, step_of
from curvcli.errors import CurvError, InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer(tmp_path_factory.mktemp("made") / "checkpoint-3")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """Complete checkpoints of steps 3 and 6."""
    for step in (3, 6):
        path = shutil.copytree(made, tmp_path / "run" / f"checkpoint-{step}")
        state = json.loads((path / "trainer_state.json").read_text())
        (path / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    return tmp_path / "run"


def _only_config(path: Path) -> None:
    shutil.rmtree(path)
    config().save_pretrained(path)


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _cut(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-100])


# What is done to a copy of checkpoint-6 at checkpoint-9, and what is said of it.
HALF: dict[str, tuple[Callable[[Path], object], str]] = {
    "no optimizer": (lambda path: (path / "optimizer.pt").unlink(), "no optimizer state"),
    "an empty optimizer": (lambda path: (path / "optimizer.pt").write_bytes(b""), "empty"),
    "a cut optimizer": (_cut("optimizer.pt"), "optimizer.pt"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no weights"),
    "empty weights": (lambda path: (path / "model.safetensors").write_bytes(b""), "empty"),
    "cut weights": (_cut("model.safetensors"), "cannot be read as safetensors"),
    "a cut header": (lambda path: (path / "model.safetensors").write_bytes(b"\x10"), "cannot be read as safetensors"),
    "a configuration alone": (_only_config, "no weights"),
    "nothing": (_empty, "holds no checkpoint"),
    "a cut log": (_cut("trainer_state.json"), "trainer_state.json"),
    "its staging name": (lambda path: path.rename(path.with_name("tmp-checkpoint-9")), "did not finish or was set aside"),
    "a suffix": (lambda path: path.rename(path.with_name("checkpoint-9.tmp")), "did not finish or was set aside"),
}


@pytest.mark.parametrize("kind", HALF)
def test_a_half_written_checkpoint_is_skipped_and_named(kind: str, run: Path) -> None:
    half, said = HALF[kind]
    half(shutil.copytree(run / "checkpoint-6", run / "checkpoint-9"))
    checkpoint = open_checkpoint(run)
    assert (checkpoint.path.name, checkpoint.step) == ("checkpoint-6", 6)
    assert [(f.code, f.severity) for f in checkpoint.findings] == [("skipped-checkpoint", "warning")]
    assert said in checkpoint.findings[0].message
    assert "checkpoint-9" in checkpoint.findings[0].message
    # The remedy is given where it works.
    newer = next(path for path in run.iterdir() if "checkpoint-9" in path.name)
    if "give its own path" in checkpoint.findings[0].message:
        assert open_checkpoint(newer).model() is not None
    else:
        assert kind not in ("no optimizer", "its staging name", "a suffix")
    assert inspect_checkpoint(run)["findings"] == {"skipped-checkpoint": checkpoint.findings[0].message}


OPTIONS = Options(tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")


@pytest.mark.slow
def test_everyone_says_so(run: Path, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    options = Options(**{**vars(OPTIONS), "data": tmp_path / "ids.npy"})
    (shutil.copytree(run / "checkpoint-6", run / "checkpoint-9") / "optimizer.pt").unlink()
    shutil.copytree(run / "checkpoint-6", run / "tmp-checkpoint-12")
    report = analyze_checkpoint(run, options)
    assert report.checkpoint.step == 6
    assert sum(f.code == "skipped-checkpoint" for f in report.findings) == 2
    alone = analyze_checkpoint(run / "checkpoint-9", options)
    assert (alone.checkpoint.step, alone.optimizer.preconditioner) == (6, "estimated")  # the log is a copy
    assert "incomplete-checkpoint" in {f.code for f in alone.findings}
    for last, measured in ((None, [3, 6]), (1, [6])):
        track = track_run(run, options, NoCache(), last=last)
        assert [p.step for p in track.points if p.report] == measured
        assert "no optimizer state" in track.points[-1].message
        assert "tmp-checkpoint-12" in next(f.message for f in track.findings if f.code == "skipped-checkpoint")


def test_runs_that_keep_no_optimizer_are_as_they_are(run: Path) -> None:
    for step in (3, 6):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    for path in (run, run / "checkpoint-6"):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.step, checkpoint.optimizer, checkpoint.findings) == (6, None, ())


def test_where_none_is_complete_the_newest_speaks(run: Path) -> None:
    for step in (3, 6):
        (run / f"checkpoint-{step}" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"checkpoint-6 has a config\.json and no weights"):
        open_checkpoint(run)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-60", 60),
        ("step_60", 60),
        ("global_step60", 60),
        ("iter_0000060", 60),
        ("epoch=0-step=60-v1.ckpt", 60),
        ("gpt2_ckpt_60.pt", 60),
        ("ep0-ba60-rank0.pt", 60),
        ("tmp-checkpoint-60", None),
        (".checkpoint-60", None),
        ("checkpoint-60.tmp", None),
        ("checkpoint-60-incomplete", None),
        ("checkpoint-60~", None),
        ("old-step=60.ckpt", None),
        ("timestep60.pt", None),
        ("temp=0.7-step=60.ckpt", 60),
    ],
)
def test_steps_in_names(name: str, step: int | None) -> None:
    assert step_of(Path(name)) == step


def test_links(run: Path) -> None:
    (run / "latest").symlink_to("checkpoint-3")
    (run / "gone").symlink_to("checkpoint-12")
    assert [p.name for p in find_checkpoints(run)] == ["checkpoint-3", "checkpoint-6"]
    assert (open_checkpoint(run / "latest").step, open_checkpoint(run / "latest").findings) == (3, ())
    with pytest.raises(InputError, match="link to nothing"):
        open_checkpoint(run / "gone")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1" + "0" * 400, "null", "[]"])
@pytest.mark.parametrize("key", ["loss", "learning_rate", "grad_norm", "step"])
def test_numbers_of_a_log_that_are_none(key: str, number: str, run: Path) -> None:
    entry = {"loss": "2.5", "learning_rate": "0.001", "grad_norm": "0.5", "step": "6", key: number}
    log = "{" + ", ".join(f'"{k}": {v}' for k, v in entry.items()) + "}"
    (run / "checkpoint-6" / "trainer_state.json").write_text(
        f'{{"global_step": 6, "best_metric": NaN, "log_history": [{log}]}}'
    )
    checkpoint = open_checkpoint(run)
    assert (checkpoint.path.name, checkpoint.step) == ("checkpoint-6", 6)
    assert checkpoint.training_loss == (None if key in ("loss", "step") else 2.5)
    assert checkpoint.last_lr == (None if key in ("learning_rate", "step") else 0.001)


def test_an_explicit_half_is_an_error_of_its_own(run: Path) -> None:
    (run / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    checkpoint = open_checkpoint(run / "checkpoint-6")
    with pytest.raises(CurvError, match="empty"):
        checkpoint.optimizer.view(checkpoint.model())
