"""Thresholds against the real torch optimizers: a quadratic just under each converges, just over diverges.

The preconditioner is held still by a second moment so large, and a beta2 so near 1, that gradients
do not move it; the threshold in use is the rule's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import stepped
import torch

from curvcli.errors import UnsupportedError, UsageError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import live, prepare

ADAPTIVE: dict[str, Any] = {"betas": (0.9, 1 - 1e-9), "eps": 0.0}
RECTIFIED: dict[str, Any] = {"betas": (0.9, 1 - 1e-9), "eps": 0.0}
CASES: dict[str, tuple[Callable, dict[str, float]]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), {}),
    "heavy ball": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {}),
    "dampening": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.4), {}),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), {}),
    "sgd coupled decay": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=2.0), {}),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1, **ADAPTIVE), {"exp_avg": 0, "exp_avg_sq": 4e6, "step": 1e11}),
    "adamw decay": (
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=3.0, **ADAPTIVE),
        {"exp_avg": 0, "exp_avg_sq": 4e6, "step": 1e11},
    ),
    "nadam": (
        lambda p: torch.optim.NAdam(p, lr=0.1, **ADAPTIVE),
        {"exp_avg": 0, "exp_avg_sq": 4e6, "step": 1e11, "mu_product": 0.0},
    ),
    "radam": (lambda p: torch.optim.RAdam(p, lr=0.1, **RECTIFIED), {"exp_avg": 0, "exp_avg_sq": 4e6, "step": 1e11}),
    "radam decoupled": (
        lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=3.0, decoupled_weight_decay=True, **RECTIFIED),
        {"exp_avg": 0, "exp_avg_sq": 4e6, "step": 1e11},
    ),
    "adamax": (
        lambda p: torch.optim.Adamax(p, lr=0.1, betas=(0.9, 1 - 1e-12)),
        {"exp_avg": 0, "exp_inf": 2e3, "step": 1e11},
    ),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=1 - 1e-12), {"square_avg": 4e6, "step": 1.0}),
    "rmsprop momentum": (
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=1 - 1e-12, momentum=0.7),
        {"square_avg": 4e6, "step": 1.0, "momentum_buffer": 0},
    ),
    "adadelta": (
        lambda p: torch.optim.Adadelta(p, lr=0.1, rho=1 - 1e-12),
        {"square_avg": 4e6, "acc_delta": 9.0, "step": 5.0},
    ),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1), {"sum": 4e12, "step": 5.0}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_real_optimizer_flips_at_the_threshold(case: str, factor: float) -> None:
    make, initial = CASES[case]
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([weight])
    for key, value in initial.items():
        shape = () if key in ("step", "mu_product") else (1,)
        optimizer.state[weight][key] = torch.full(shape, float(value), dtype=torch.float64)
    metric = prepare(live(optimizer, {"w": weight}), {"w": weight})
    # lambda = s (h + decay) s, so the curvature h that sits at factor times the threshold is:
    assert metric.threshold is not None
    h = factor * metric.threshold / float(metric.root["w"].apply(torch.ones_like(weight))) ** 2 - metric.decay.get("w", 0.0)
    assert stepped.grows(optimizer, weight, h) == (factor > 1)  # an adaptive one may settle again once its v has grown


@pytest.mark.parametrize("case", ["sgd", "heavy ball", "adam", "adamw decay", "rmsprop"])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_clipped_to_a_share_it_flips_at_that_much_more(case: str, factor: float) -> None:
    """A gradient with a large steady part, at a right angle to the sharp direction, of which clipping leaves a tenth."""
    make, initial = CASES[case]
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = make([weight])
    for key, value in initial.items():
        shape = () if key in ("step", "mu_product") else (2,)
        optimizer.state[weight][key] = torch.full(shape, float(value), dtype=torch.float64)
    share, steady = 0.1, 50.0
    metric = prepare(replace(live(optimizer, {"w": weight}), clip=share), {"w": weight})
    assert metric.threshold is not None
    assert metric.clip == share
    h = factor * metric.threshold / float(metric.root["w"].apply(torch.ones_like(weight))[1]) ** 2
    with torch.no_grad():
        weight[1] = 1e-9
    largest = 0.0
    for _ in range(1500):
        optimizer.zero_grad()
        (steady * weight[0] + 0.5 * h * weight[1] ** 2).backward()
        torch.nn.utils.clip_grad_norm_([weight], share * steady)
        optimizer.step()
        largest = max(largest, abs(float(weight[1].detach())))
        if largest > 1e-6:
            break  # before its own part of the norm counts
    assert (largest > 1e-7) == (factor > 1)


def test_decay_that_is_added_to_what_clipping_left_takes_the_share_away() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    made = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    weight.sum().backward()
    made.step()
    view = live(made, {"w": weight})
    clipped = prepare(replace(view, clip=0.1), {"w": weight})
    assert (clipped.clip, clipped.threshold) == (None, prepare(view, {"w": weight}).threshold)
    assert [finding.code for finding in clipped.findings] == ["clipping-not-counted"]
    assert prepare(replace(view, clip=1.0), {"w": weight}).clip == 1.0


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_what_is_no_share_is_refused(share: float) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    view = replace(live(torch.optim.SGD([weight], lr=0.1), {"w": weight}), clip=share)
    for kind in ("checkpoint", "estimated"):
        with pytest.raises(UsageError, match="of a gradient"):
            prepare(view, {"w": weight}, kind=kind)


@pytest.mark.parametrize(
    ("optimizer", "lr", "expected"),
    [
        (lambda p: torch.optim.Adam(p, lr=1e-3), 1e-3, 38 / 1e-3),
        (lambda p: torch.optim.SGD(p, lr=0.5), 0.5, 2 / 0.5),
        (lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), 0.5, 3.8 / 0.5),
        (lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True), 0.5, 3.8 / (2.8 * 0.5)),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3), 1e-3, 2 / 1e-3),
    ],
)
def test_published_thresholds(optimizer: Callable, lr: float, expected: float) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    made = optimizer([weight])
    weight.sum().backward()
    made.step()
    assert prepare(live(made, {"w": weight}), {"w": weight}).threshold == pytest.approx(expected)


@pytest.mark.parametrize(
    ("state", "options", "name", "said"),
    [
        ({"exp_avg_sq_row": torch.zeros(2), "exp_avg_res_row": torch.zeros(2), "step": 3}, {"lr": 1e-2}, None, "CAME"),
        ({"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2), "GG": []}, {"lr": 1e-2}, None, "Shampoo"),
        ({"state1": torch.zeros(2), "state2": torch.zeros(2), "absmax1": torch.zeros(1)}, {"lr": 1e-2}, None, "8-bit"),
        ({}, {"lr": 1e-2}, "Rprop", "no Euclidean"),
        ({"mystery": torch.zeros(2)}, {"lr": 1e-2}, None, "mystery"),
    ],
)
def test_refused_with_the_reason(state: dict, options: dict, name: str | None, said: str) -> None:
    view = OptimizerView((Group(("w",), options),), {"w": state} if state else {}, name)
    with pytest.raises(UnsupportedError, match=said):
        prepare(view, {"w": torch.zeros(2)})


def test_real_radam_is_not_read_as_adam_nor_adam_as_radam() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    for kind in (torch.optim.RAdam, torch.optim.Adam, torch.optim.NAdam):
        optimizer = kind([weight])
        weight.grad = torch.ones(3)
        optimizer.step()
        view = live(optimizer, {"w": weight})
        named = prepare(OptimizerView(view.groups, view.state), {"w": weight}).name
        assert named == kind.__name__


def test_decay_that_diverges_alone_is_refused() -> None:
    view = OptimizerView(
        (Group(("w",), {"lr": 1.0, "weight_decay": 3.0, "betas": (0.9, 0.99)}),),
        {"w": {"step": 5.0, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}},
    )
    with pytest.raises(UsageError, match="decay 3 alone diverges"):
        prepare(view, {"w": torch.zeros(2)})
