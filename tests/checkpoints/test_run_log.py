"""The run's own log as the Trainer writes it: losses that are no numbers are no losses, and are not forgotten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.base import Logged
from curvcli.checkpoints.clipping import Clipping, clipping, remembered
from curvcli.checkpoints.formats.deepspeed import _clipped
from curvcli.checkpoints.formats.huggingface import run_log, trainer_state
from curvcli.optimizers.base import Group, OptimizerView


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


LOG = {"log_history": [{"step": n, "grad_norm": norm} for n, norm in enumerate((0.2, 0.7, 1.5, 3.0))]}
CLIPPED = ", which raises lambda as the optimizer sees it"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "2 of 4 logged gradient norms exceed 1, to which the run clipped them"),
        ({"max_grad_norm": 0.5}, "3 of 4 logged gradient norms exceed 0.5, to which the run clipped them"),
        ({"max_grad_norm": 3.0}, None),
        ({"max_grad_norm": 0.0}, None),
        ({"max_grad_norm": None}, None),
    ],
)
def test_what_a_run_was_clipped_to_is_in_its_arguments(settings: dict, said: str | None, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    torch.save(TrainingArguments(str(tmp_path), use_cpu=True, **settings), tmp_path / "training_args.bin")
    found = clipping(tmp_path, LOG).notes
    assert found == ({"clipped-moments": f"{said}: the second moment is of clipped gradients{CLIPPED}"} if said else {})


@pytest.mark.parametrize("file", ["none", "damaged", "of another class"])
def test_without_arguments_the_default_is_said_to_be_one(file: str, tmp_path: Path) -> None:
    if file == "damaged":
        (tmp_path / "training_args.bin").write_bytes(b"nothing")
    if file == "of another class":
        torch.save({"max_grad_norm": 0.5}, tmp_path / "training_args.bin")
    assert (
        clipping(tmp_path, LOG)
        .notes["clipped-moments"]
        .startswith("2 of 4 logged gradient norms exceed 1.0, the Trainer's default")
    )
    assert clipping(tmp_path, {"log_history": [{"step": 1, "grad_norm": 0.9}]}).notes == {}
    assert clipping(tmp_path, None) == Clipping()


@pytest.mark.parametrize(
    ("limit", "log", "said"),
    [
        (0.0, LOG, None),  # DeepSpeed then clips nothing, whatever the Trainer's arguments are
        (2.0, LOG, "1 of 4 logged gradient norms exceed 2, to which the run clipped them"),
        (3.0, LOG, None),
        (2.0, None, "gradients were clipped to a norm of 2"),
        (2.0, {"log_history": [{"step": 1, "loss": 3.0}]}, "gradients were clipped to a norm of 2"),
        (0.0, None, None),
        (None, LOG, "2 of 4 logged gradient norms exceed 1.0, the Trainer's default max_grad_norm"),
        (None, None, None),
    ],
)
def test_deepspeeds_own_limit_comes_first(limit: float | None, log: dict | None, said: str | None, tmp_path: Path) -> None:
    found = _clipped(SimpleNamespace(head={"clip_grad": limit}), tmp_path, log)
    assert [text.partition(":")[0] for text in found.notes.values()] == ([said] if said else [])


@pytest.mark.parametrize(
    ("limit", "norms", "share"),
    [
        (0.0, (), 1.0),  # nothing is clipped
        (1.0, (2.0, 4.0, 0.5, 1.0, 8.0), (0.5 + 0.25 + 1 + 1 + 0.125) / 5),
        (1.0, (float("nan"), float("inf"), 2.0, 4.0, 0.5, 1.0, 8.0), (0.5 + 0.25 + 1 + 1 + 0.125) / 5),
        (1.0, (100.0,) * 30 + (2.0,) * 20, 0.5),  # the newest alone
        (1.0, (2.0,) * 4, None),  # too few
        (1e-200, (1.0,) * 20, None),  # such a share would make any rho safe
        (None, (2.0,) * 20, None),  # the Trainer's default may not have been in force
    ],
)
def test_the_share_that_clipping_left(limit: float | None, norms: tuple[float, ...], share: float | None) -> None:
    assert Clipping(limit, norms).share == (None if share is None else pytest.approx(share))


def test_a_note_says_what_was_left() -> None:
    said = Clipping(0.5, (1.0,) * 20).notes["clipped-moments"]
    assert said.endswith("; 0.5 of a gradient was left of late")
    said = Clipping(1.0, (2.0,) + (0.5,) * 30).notes["clipped-moments"]
    assert said.endswith("; of late nothing was clipped")


@pytest.mark.parametrize("limit", [float("inf"), float("nan"), -1.0, 10**400])
def test_a_limit_that_no_norm_is_over_clips_nothing(limit: float, tmp_path: Path) -> None:
    found = _clipped(SimpleNamespace(head={"clip_grad": limit}), tmp_path, None)
    assert (found.share, found.notes) == (1.0, {})


@pytest.mark.parametrize("step", [-1e9, 0.0, float("nan"), float("-inf"), float("inf"), 2.0])
def test_what_the_second_moment_remembers_whatever_the_steps_are(step: float) -> None:
    entry = {"exp_avg_sq": torch.full((3,), 0.75), "step": torch.tensor(step)}
    view = OptimizerView((Group(("w",), {"betas": (0.9, 0.5)}),), {"w": entry}, "Adam")
    assert remembered(view) == pytest.approx((2.25 / (0.75 if step == 2 else 1.0)) ** 0.5)


@pytest.mark.parametrize(
    ("share", "said"), [(0.1, "smoothed labels by 0.1 "), (0.0, None), (True, None), ("0.1", None), (float("nan"), None)]
)
@pytest.mark.parametrize("place", ["checkpoint-60", "."])
def test_smoothed_labels_are_a_finding(share: object, said: str | None, place: str, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    run = tmp_path / "checkpoint-60"
    shutil.copytree("sample_checkpoints/calm/checkpoint-60", run)
    given = TrainingArguments(str(tmp_path), use_cpu=True)
    given.label_smoothing_factor = share  # type: ignore[assignment]
    torch.save(given, tmp_path / place / "training_args.bin")
    found = [finding for finding in open_checkpoint(run).findings if finding.code == "label-smoothing"]
    assert [finding.severity for finding in found] == (["warning"] if said else [])
    assert not said or said in found[0].message
