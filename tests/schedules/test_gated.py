"""Schedules of residual gates: planned from depth, held to their rules, drawn, and verified on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from real import curv
from schedules import gated as made
from tiny import build

import curvcli
from curvcli.documents import Schedule, load_schedule
from curvcli.errors import UsageError
from curvcli.render.schedule_plot import plot
from curvcli.render.series import schedule_series
from curvcli.schedules import gated
from curvcli.training.naming import with_names
from curvcli.training.verify import lock_problems, phase_problems


def test_gates_open_in_proportion_to_depth() -> None:
    plan = gated(4, open_at=100)
    assert (plan.mode, plan.lock, plan.gates) == ("grow", "residual-gate", [25, 50, 75, 100])
    assert plan.alphas_at(0) == [0, 0, 0, 0]
    assert plan.alphas_at(50) == pytest.approx([1, 1, 2 / 3, 0.5])
    assert plan.alphas_at(100) == plan.alphas_at(10**9) == [1, 1, 1, 1]
    assert plan.locked_at(0) == frozenset()
    assert gated(48).gates[-1] == 3500
    assert Schedule.read(plan.to_json()) == plan


def test_impossible_plans() -> None:
    with pytest.raises(UsageError, match="12 gates cannot open one after the other by step 11"):
        gated(12, open_at=11)
    with pytest.raises(UsageError, match="open at step 500, and the run ends at 500"):
        gated(12, open_at=500, total_steps=500)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gates": None}, "gates belong to lock residual-gate"),
        ({"lock": "zero-output"}, "gates belong to lock residual-gate"),
        ({"gates": [1, 2]}, "2 gates for depth 3"),
        ({"gates": [1, 2, -3]}, "greater than or equal to 0"),
        ({"resting": [{"name": "a", "block": 0, "value": 0.0}]}, "nothing rests behind gates"),
        ({"mode": "freeze"}, "the mode is grow, and all blocks train in one phase"),
    ],
)
def test_a_document_that_says_something_else(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Schedule.model_validate({**made(1, 2, 3).model_dump(), **change})
    fewer = made(1, 2, 3).model_dump()
    fewer["phases"][0]["active"] = [0, 1]
    with pytest.raises(ValidationError, match="all blocks train in one phase"):
        Schedule.model_validate(fewer)


def test_from_python_and_the_command_line(tmp_path: Path) -> None:
    plan = curvcli.schedule(depth=8, lock="residual-gate", gate_steps=80, lr=1e-3, warmup_steps=5, total_steps=200)
    assert (plan.gates, plan.lr_schedule.peak) == ([10 * k for k in range(1, 9)], 1e-3)
    done = curv("schedule", "--depth", "8", "--lock", "residual-gate", "--gate-steps", "80", "-o", tmp_path / "s.json")
    assert done.returncode == 0
    said = " ".join(done.stdout.split())
    assert "grow 8 blocks behind residual gates: the first is open at step 10, the last at 80" in said
    assert load_schedule(tmp_path / "s.json").gates == plan.gates


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lock": "gate"}, "--lock gate is not planned"),
        ({"gate_steps": 9}, "takes no --gate-steps"),
        ({"lock": "residual-gate", "start": 2}, "takes no --start"),
        ({"lock": "residual-gate", "order": "last"}, "takes no --order"),
        ({"lock": "residual-gate", "groups": 2}, "takes no --groups"),
        ({"lock": "residual-gate", "warmup_steps": 2}, "takes no --warmup-steps"),
        ({"lock": "residual-gate", "depth": None, "resume": "x.json"}, "takes no --lock"),
        ({"lock": "residual-gate", "depth": None, "report": "x.json"}, "takes no --lock"),
    ],
)
def test_usage(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        curvcli.schedule(**{"depth": 8, **options})


def test_picture() -> None:
    steps, depths = schedule_series(gated(4, open_at=100))["depth"]
    drawn = dict(zip(steps, depths, strict=True))
    assert (drawn[0], drawn[100]) == (0, 4)
    assert drawn[50] == pytest.approx(1 + 1 + 2 / 3 + 0.5)
    assert plot(gated(4, open_at=100), "svg").startswith(b"<?xml")


def test_verify(caplog: pytest.LogCaptureFixture) -> None:
    plan = gated(2, open_at=100)
    model = build()
    ids = torch.arange(16)[None]

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    assert lock_problems(plan, model, loss, step=0) == []
    assert not caplog.records, "no warning of a job's own"
    named = with_names(plan, model)
    assert (named.resting, named.blocks) == (None, ["model.layers.0", "model.layers.1"])
    short = curvcli.schedule(depth=2, lock="residual-gate", gate_steps=100, lr=1.0, warmup_steps=0, total_steps=101)
    assert phase_problems(short) == []
    late = short.model_copy(update={"gates": [50, 101]})
    assert [p.code for p in phase_problems(late)] == ["past-the-end"]

    def written(module: Any, args: Any) -> None:
        args[0].add_(1.0)

    model.model.layers[0].input_layernorm.register_forward_pre_hook(written)
    (problem,) = lock_problems(plan, model, loss, step=0)
    assert problem.code == "no-identity"
    assert "writes into the states" in problem.message
