"""Adafactor of torch.optim and of transformers: their own steps, thresholds and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import stepped
import tiny
import torch
from transformers.optimization import Adafactor as Transformers

import curvcli
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.errors import InputError, UnsupportedError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.training import CurvatureTracker

PLAIN: dict[str, Any] = {"scale_parameter": False, "relative_step": False}
CASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "torch, late": lambda p: torch.optim.Adafactor(p, lr=10.0),  # 1/sqrt(t) is less
    "torch, decay": lambda p: torch.optim.Adafactor(p, lr=0.02, weight_decay=0.3, eps=(1e-3, 1e-3)),
    "Trainer's": lambda p: Transformers(p, lr=0.02, **PLAIN),
    "first moment": lambda p: Transformers(p, lr=0.02, beta1=0.8, **PLAIN),
    "scaled": lambda p: Transformers(p, lr=0.02, scale_parameter=True, relative_step=False),
    "relative": lambda p: Transformers(p),
    "warming up": lambda p: Transformers(p, warmup_init=True),
}


def trained(case: str) -> tuple[models.Net, torch.optim.Optimizer, list]:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    optimizer = CASES[case](net.parameters())
    models.train(net, optimizer, batches, steps=5)
    return net, optimizer, batches


@pytest.mark.parametrize("case", CASES)
def test_rho_is_that_of_the_optimizers_own_answer(case: str) -> None:
    """Which has each tensor's learning rate in it, whatever that depends on."""
    net, optimizer, batches = trained(case)
    after, still, parts = stepped.answer(optimizer, net)
    group = after.param_groups[0]
    b = group.get("beta1") or 0.0
    # Of a gradient (1 - b) lr / P comes through at once; the edge of lambda is (2/lr - wd)(1 + b)/(1 - b).
    scale = stepped.scale(parts) / ((1 + b) * (2 - (group["lr"] or 0.0) * group["weight_decay"])) ** 0.5
    if case == "torch, decay":  # the step's rate was by the weights before they shrank, and the next one's is by these
        scale = scale * (1 - group["lr"] * group["weight_decay"]) ** 0.5
    hessian = models.dense_hessian(still, batches, [n for n, _ in still.named_parameters()])
    truth = models.top(scale[:, None] * hessian * scale)
    common: dict[str, Any] = {"weights": models.weights(batches), "tolerance": 1e-4}
    report = curvcli.analyze(still, models.loss, batches, after, **common)
    assert report.optimizer.name == "Adafactor"
    assert report.full.rho == pytest.approx(truth, rel=1e-5)
    assert (report.update.status == "unavailable") == (b == 0)
    tracker = CurvatureTracker(still, after, models.loss, probe=batches, max_hvps=80, **common)
    assert tracker.step(0).rho == pytest.approx(truth, rel=1e-5)  # type: ignore[union-attr]


FLIPS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **CASES,
    "decay": lambda p: Transformers(p, lr=0.02, weight_decay=3.0, beta1=0.8, **PLAIN),
}


# One with the optimizer's own lr and one without for every day; the others change one option each.
@pytest.mark.parametrize("case", [c if c in ("scaled", "decay") else pytest.param(c, marks=pytest.mark.slow) for c in FLIPS])
@pytest.mark.parametrize("factored", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_the_real_optimizer_flips_at_the_threshold(case: str, factored: bool, factor: float) -> None:
    """P is held still by moments so large, and so late a step, that gradients do not move them."""
    weight = torch.nn.Parameter(torch.zeros((2, 3) if factored else (6,), dtype=torch.float64))
    optimizer = FLIPS[case]([weight])
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 for n in (2, 3))
    entry = optimizer.state[weight]
    entry["step"] = torch.tensor(1e9, dtype=torch.float64) if case.startswith("torch") else 10**9
    big = 4e6
    if case.startswith("torch"):
        entry.update(
            {"row_var": big * rows[:, None], "col_var": big * columns[None]}
            if factored
            else {"variance": big * torch.outer(rows, columns).reshape(-1)}
        )
    elif factored:
        entry.update(exp_avg_sq_row=big * rows, exp_avg_sq_col=big * columns)
    else:
        entry["exp_avg_sq"] = big * torch.outer(rows, columns).reshape(-1)
    if not case.startswith("torch"):
        entry["RMS"] = 0.0
    if optimizer.param_groups[0].get("beta1"):
        entry["exp_avg"] = torch.zeros_like(weight).detach()
    metric = prepare(live(optimizer, {"w": weight}), {"w": weight})
    assert metric.threshold is not None
    p = metric.root["w"].apply(torch.ones_like(weight)).detach() ** -2
    # From so near that updates are not clipped, which caps those of the size of the learning rate.
    assert stepped.grows(optimizer, weight, factor * metric.threshold * p, start=1e-12) == (factor > 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["torch", "Trainer's", "relative"])
@pytest.mark.parametrize("named", [True, False])
def test_a_file_is_measured_as_the_optimizer_in_memory(case: str, named: bool, tmp_path: Path) -> None:
    model = tiny.build()
    optimizer = CASES[case](model.parameters())
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(tiny.STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    if named:
        curvcli.save_optimizer(tmp_path, optimizer, model)
    else:
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    options = Options(
        data=tmp_path / "ids.npy", tokens=128, sequence_length=16, depths=False, device="cpu", mode="kept", tolerance=1e-3
    )
    report = analyze_checkpoint(tmp_path, options)
    parameters = dict(model.named_parameters())
    assert report.optimizer.name == "Adafactor"
    assert report.optimizer.step == tiny.STEPS
    assert report.optimizer.threshold == pytest.approx(prepare(live(optimizer, parameters), parameters).threshold)
    assert report.full.rho is not None
    # Rows of tokens that never came are left out, as with Adam.
    never = {int(i) for i in range(64)} - set(ids.flatten().tolist())
    assert prepare(live(optimizer, parameters), parameters).idle >= 16 * len(never) > 0


def view(options: dict[str, Any], **entry: Any) -> OptimizerView:
    state = {"step": 5, "exp_avg_sq_row": torch.ones(2), "exp_avg_sq_col": torch.ones(3), "RMS": 1.0, **entry}
    state = {key: value for key, value in state.items() if value is not None}
    group = {"lr": 1e-2, "eps": (1e-30, 1e-3), "weight_decay": 0.0, "beta1": None, **PLAIN, **options}
    return OptimizerView((Group(("w",), group),), {"w": state})


@pytest.mark.parametrize(
    ("options", "entry", "said"),
    [
        ({"eps": 1e-8}, {}, "not Adafactor's two"),
        ({"eps": (float("nan"), 1e-3)}, {}, "'eps'"),
        ({"beta1": 1.5}, {}, "beta1"),
        ({"lr": None, "relative_step": True}, {"step": 0}, "steps"),
        ({}, {"exp_avg_sq_row": torch.ones(3)}, "no factor"),
        ({}, {"exp_avg_sq_col": None}, "no factor"),
        ({}, {"exp_avg_sq_col": torch.tensor([1.0, -1.0, 1.0])}, "negative"),
        ({}, {"exp_avg_sq_col": torch.full((3,), float("nan"))}, "NaN"),
        ({"relative_step": 7}, {}, "relative_step"),
    ],
)
def test_what_is_missing_or_damaged_is_an_error(options: dict, entry: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        prepare(view(options, **entry), {"w": torch.ones(2, 3)})


def test_a_matrix_without_factors_is_an_error_where_others_have_them() -> None:
    both = view({})
    (group,) = both.groups
    state = {**both.state, "b": {"step": 5}}
    with pytest.raises(InputError, match="no 'exp_avg_sq'"):
        prepare(OptimizerView((Group(("w", "b"), group.options),), state), {"w": torch.ones(2, 3), "b": torch.ones(4)})


def test_came_is_refused_though_it_keeps_the_same_factors() -> None:
    with pytest.raises(UnsupportedError, match="CAME"):
        prepare(view({}, exp_avg_res_row=torch.ones(2)), {"w": torch.ones(2, 3)})
