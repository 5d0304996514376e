"""Schedule-Free AdamW and SGD against the package itself: its steps, its threshold, its files in both modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import stepped
import tiny
import torch

import curvcli
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.errors import InputError, UnsupportedError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.training import CurvatureTracker

schedulefree = pytest.importorskip("schedulefree")

MAKERS: dict[str, Callable] = {
    "AdamWScheduleFree": lambda p, **o: schedulefree.AdamWScheduleFree(p, **{"lr": 0.01, "eps": 1e-3, **o}),
    "SGDScheduleFree": lambda p, **o: schedulefree.SGDScheduleFree(p, **{"lr": 0.1, **o}),
}


def trained(kind: str, **options: Any) -> tuple[models.Net, torch.optim.Optimizer, list]:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    optimizer = MAKERS[kind](net.parameters(), **options)
    optimizer.train()
    models.train(net, optimizer, batches, steps=5)
    return net, optimizer, batches


def share(optimizer: torch.optim.Optimizer) -> float:
    """c of the last step, by its definition: what the last step added to the sum of weights."""
    group = optimizer.param_groups[0]
    return group["k"] ** group["r"] * group["lr_max"] ** group["weight_lr_power"] / group["weight_sum"]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "warmup_steps": 9, "r": 1.5, "weight_lr_power": 1.0}])
def test_lambda_is_that_of_the_optimizers_own_answer_at_y(kind: str, options: dict) -> None:
    net, optimizer, batches = trained(kind, **options)
    after, still, parts = stepped.answer(optimizer, net)
    group = after.param_groups[0]
    b, c = group["betas"][0] if "betas" in group else group["momentum"], share(after)
    # y answers a gradient by lr (1 - b (1 - c)) / P at once.
    scale = stepped.scale(parts) / (group["scheduled_lr"] * (1 - b * (1 - c))) ** 0.5
    hessian = models.dense_hessian(still, batches, [n for n, _ in still.named_parameters()])
    if kind == "SGDScheduleFree":
        hessian += group["weight_decay"] * torch.eye(len(hessian), dtype=hessian.dtype)
    truth = models.top(scale[:, None] * hessian * scale)
    common: dict[str, Any] = {"weights": models.weights(batches), "tolerance": 1e-4}
    report = curvcli.analyze(still, models.loss, batches, after, **common)
    assert report.optimizer.name == kind
    assert report.full.eigenvalue == pytest.approx(truth, rel=1e-5)
    decay = group["weight_decay"] if "betas" in group else 0.0
    edge = 2 / (group["scheduled_lr"] * ((1 - b) + b * c / (2 - c))) - decay
    assert report.optimizer.threshold == pytest.approx(edge)
    assert report.full.rho == pytest.approx(truth / edge, rel=1e-5)
    assert "measured-at-y" in {f.code for f in report.findings}
    record = CurvatureTracker(
        still, after, models.loss, probe=batches, tolerance=1e-4, max_hvps=80, weights=common["weights"]
    )
    assert record.step(0).rho == pytest.approx(truth / edge, rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("c", [pytest.param(0.9, marks=pytest.mark.slow), 0.3, pytest.param(1e-3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 3.0}, {"warmup_steps": 10**6}])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_the_package_flips_at_the_threshold(kind: str, c: float, options: dict, factor: float) -> None:
    """c is held still, as P is, and stands for what changes slowly."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    adaptive = {"betas": (0.9, 1 - 1e-9), "eps": 0.0} if kind == "AdamWScheduleFree" else {}
    optimizer = MAKERS[kind]([weight], **{"lr": 0.1, **adaptive, **options})
    optimizer.train()
    group = optimizer.param_groups[0]
    optimizer.state[weight]["z"] = torch.full_like(weight, 1e-6).detach()
    steps = 500_000 if options.get("warmup_steps") else 10**6
    root = 1.0
    if adaptive:
        optimizer.state[weight]["exp_avg_sq"] = torch.full_like(weight, 4e6 * (1 - adaptive["betas"][1] ** steps)).detach()
        root = 2e3

    def hold() -> None:
        # The step takes the sum without its own weight, and counts itself.
        lr = group["lr"] * min(1.0, steps / (group["warmup_steps"] or 1))
        group.update(k=steps - 1, lr_max=lr, weight_sum=lr**2 * (1 / c - 1))

    hold()
    lr = group["lr"] * min(1.0, steps / (group["warmup_steps"] or 1))
    seen = Group(("w",), {**{k: v for k, v in group.items() if k != "params"}, "k": steps, "weight_sum": lr**2 / c})
    metric = prepare(OptimizerView((seen,), {"w": optimizer.state[weight]}, kind), {"w": weight})
    assert float(metric.root["w"].apply(torch.ones(1, dtype=torch.float64))) == pytest.approx(root**-0.5)
    assert metric.threshold is not None
    curvature = factor * metric.threshold * root - metric.decay.get("w", 0.0)
    assert stepped.grows(optimizer, weight, curvature, hold) == (factor > 1)


def causal(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("named", [True, False])
def test_a_file_of_either_mode_is_measured_at_y(kind: str, named: bool, tmp_path: Path) -> None:
    model = tiny.build()
    optimizer = MAKERS[kind](model.parameters())
    optimizer.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(tiny.STEPS):
        optimizer.zero_grad()
        causal(model, torch.randint(64, (4, 16), generator=generator)).backward()
        optimizer.step()
    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    options = Options(
        data=tmp_path / "ids.npy", tokens=128, sequence_length=16, depths=False, device="cpu", mode="kept", tolerance=1e-3
    )
    reports = {}
    at_y = copy.deepcopy(model)
    for mode in ("train", "eval"):
        getattr(optimizer, mode)()
        place = tmp_path / mode
        model.save_pretrained(place)
        if named:
            curvcli.save_optimizer(place, optimizer, model)
        else:
            torch.save(optimizer.state_dict(), place / "optimizer.pt")
        reports[mode] = analyze_checkpoint(place, options)
    assert not torch.equal(at_y.lm_head.weight, model.lm_head.weight)
    y, x = reports["train"], reports["eval"]
    assert x.optimizer.name == y.optimizer.name == kind
    assert x.optimizer.step == y.optimizer.step == tiny.STEPS
    assert x.data.loss == pytest.approx(y.data.loss, rel=1e-6)
    assert x.full.rho == pytest.approx(y.full.rho, rel=1e-3)
    # In memory it says what to call, and changes nothing.
    batches = [torch.arange(16)[None], torch.arange(16, 32)[None]]
    with pytest.raises(InputError, match="evaluation mode") as refused:
        curvcli.analyze(model, causal, batches, optimizer, depths=False)
    assert "optimizer.train()" in refused.value.hint
    record = CurvatureTracker(model, optimizer, causal, probe=batches).step(0)
    assert record is not None
    assert record.rho is None
    assert "evaluation mode" in (record.message or "")


def view(kind: str = "AdamWScheduleFree", **changed: Any) -> OptimizerView:
    net, optimizer, _ = trained(kind)
    groups = live(optimizer, dict(net.named_parameters())).groups
    state = {name: optimizer.state[p] for name, p in net.named_parameters()}
    return OptimizerView(tuple(Group(g.names, {**g.options, **changed}) for g in groups), state)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train_mode": None}, "whether the weights are x or y"),
        ({"weight_sum": 1e-9}, "no share"),
        ({"weight_sum": float("nan")}, "weight_sum"),
        ({"k": None}, "no steps"),
        ({"lr_max": -1.0}, "lr_max"),
    ],
)
def test_what_the_threshold_needs_is_asked_for(changed: dict, said: str) -> None:
    parameters = dict(models.Net(seed=2, blocks=2, width=4).named_parameters())
    with pytest.raises(InputError, match=said):
        prepare(view(**changed), parameters)


OTHERS: dict[str, Callable] = {
    "RAdamScheduleFree": lambda p: schedulefree.RAdamScheduleFree(p),
    "AdamWScheduleFreeReference": lambda p: schedulefree.AdamWScheduleFreeReference(p),
    "ScheduleFreeWrapper": lambda p: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1, momentum=0.9)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_packages_others_are_refused_by_name_and_by_state(kind: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = OTHERS[kind]([weight])
    optimizer.train()
    weight.grad = torch.ones(3)
    optimizer.step()
    groups = tuple(Group(("w",), {k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups)
    for name in (kind, None):
        with pytest.raises(UnsupportedError, match="schedule-free"):
            prepare(OptimizerView(groups, {"w": optimizer.state[weight]}, name), {"w": weight})
