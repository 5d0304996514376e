"""AdEMAMix against its published update: its own steps, its threshold, and state as three packages store it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import published
import pytest
import stepped
import tiny
import torch

import curvcli
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.errors import InputError, UnsupportedError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.training import CurvatureTracker

OPTIONS: dict[str, dict[str, Any]] = {
    "late": {},
    "warming up": {"alpha_warmup": 17, "beta3_warmup": 23, "weight_decay": 0.3},
    "b3 warming up": {"beta3_warmup": 2000, "alpha": 8.0},
    "slow": {"betas": (0.8, 0.99, 0.95), "alpha": 8.0},
}


def trained(**options: Any) -> tuple[models.Net, published.AdEMAMix, list]:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    optimizer = published.AdEMAMix(net.parameters(), lr=0.01, eps=1e-3, **options)
    models.train(net, optimizer, batches, steps=5)
    return net, optimizer, batches


@pytest.mark.parametrize("case", OPTIONS)
def test_lambda_is_that_of_the_optimizers_own_answer(case: str) -> None:
    net, optimizer, batches = trained(**OPTIONS[case])
    after, still, parts = stepped.answer(optimizer, net)
    group, names = after.param_groups[0], [n for n, _ in still.named_parameters()]
    # What of the gradient comes through at once, by the last parameter's answer and v: the same for all.
    last = list(still.parameters())[-1]
    p = (after.state[last]["exp_avg_sq"] / (1 - group["betas"][1] ** 6)).sqrt() + group["eps"]
    through = float((parts[names[-1]] * p).mean() / group["lr"])
    scale = stepped.scale(parts) / (group["lr"] * through) ** 0.5
    truth = models.top(scale[:, None] * models.dense_hessian(still, batches, names) * scale)
    common: dict[str, Any] = {"weights": models.weights(batches), "tolerance": 1e-4}
    report = curvcli.analyze(still, models.loss, batches, after, **common)
    assert report.optimizer.name == "AdEMAMix"
    assert report.full.eigenvalue == pytest.approx(truth, rel=1e-5)
    tracker = CurvatureTracker(still, after, models.loss, probe=batches, max_hvps=80, **common)
    assert tracker.step(0).rho == pytest.approx(report.full.rho, rel=1e-5)  # type: ignore[union-attr]
    # A step without a gradient goes along the direction that the metric has, but for the decay.
    metric = prepare(live(after, dict(still.named_parameters())), dict(still.named_parameters()))
    assert metric.direction is not None
    assert report.update.status != "unavailable"
    shrunk = 1 - group["lr"] * group["weight_decay"]
    for name, before in net.named_parameters():
        moved = dict(still.named_parameters())[name] - before * shrunk
        torch.testing.assert_close(moved, -group["lr"] * metric.direction[name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 40, pytest.param(10**9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_the_published_update_flips_at_the_threshold(case: str, step: int, factor: float) -> None:
    """The step is held still, and with it alpha, b3 and the correction of the first average; P is, by a large v."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    options = {**OPTIONS[case], "weight_decay": 3.0 if case == "warming up" else 0.0}
    betas = options.pop("betas", (0.9, 0.99, 0.9999))
    optimizer = published.AdEMAMix([weight], lr=0.1, betas=(betas[0], 1 - 1e-12, betas[2]), eps=0.0, **options)
    entry = optimizer.state[weight]
    entry.update({key: torch.zeros_like(weight).detach() for key in ("exp_avg_fast", "exp_avg_slow")})
    entry["exp_avg_sq"] = torch.full_like(weight, 4e6 * (1 - (1 - 1e-12) ** step)).detach()
    entry["step"] = step
    metric = prepare(live(optimizer, {"w": weight}), {"w": weight})
    assert metric.threshold is not None
    curvature = factor * metric.threshold / float(metric.root["w"].apply(torch.ones(1, dtype=torch.float64))) ** 2

    def hold() -> None:
        entry["step"] = step - 1

    hold()
    assert stepped.grows(optimizer, weight, curvature, hold) == (factor > 1)


def test_late_in_a_run_the_threshold_is_the_plain_formula() -> None:
    state = {"step": 10**9, **{k: torch.ones(2) for k in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")}}
    options = {"lr": 1e-3, "betas": (0.9, 0.999, 0.999), "eps": 1e-8, "alpha": 5.0, "weight_decay": 0.1}
    metric = prepare(OptimizerView((Group(("w",), options),), {"w": state}), {"w": torch.ones(2)})
    assert metric.threshold == pytest.approx((2 / 1e-3 - 0.1) / (0.1 / 1.9 + 5 * 0.001 / 1.999))


# The same state as packages other than the authors' keep it, and what they call the warm-ups.
def by_pytorch_optimizer(entry: dict, group: dict) -> tuple[dict, dict]:
    moments = {"exp_avg": entry["exp_avg_fast"], "exp_avg_sq": entry["exp_avg_sq"], "exp_avg_slow": entry["exp_avg_slow"]}
    kept = {k: group[k] for k in ("lr", "betas", "eps", "alpha", "weight_decay")}
    return moments, {
        **kept, "weight_decouple": True, "fixed_decay": False, "t_alpha_beta3": 17, "foreach": None, "step": entry["step"],
    }  # fmt: skip


def by_bitsandbytes(entry: dict, group: dict) -> tuple[dict, dict]:
    both = torch.stack([entry["exp_avg_fast"], entry["exp_avg_slow"]])
    nested = {"__bnb_optimizer_quant_state__": {"state1": both, "state2": entry["exp_avg_sq"]}}
    kept = {k: group[k] for k in ("lr", "betas", "eps", "alpha", "weight_decay")}
    return {"step": entry["step"], **nested}, {**kept, "t_alpha": 17, "t_beta3": 17}


def flat(entry: dict, group: dict) -> tuple[dict, dict]:
    kept, options = by_bitsandbytes(entry, group)
    return {"step": kept["step"], **kept["__bnb_optimizer_quant_state__"]}, options


@pytest.mark.parametrize("save", [None, by_pytorch_optimizer, by_bitsandbytes, flat])
def test_every_packages_file_is_read(save: Callable | None, tmp_path: Path) -> None:
    model = tiny.build()
    optimizer = published.AdEMAMix(model.parameters(), lr=0.01, alpha_warmup=17, beta3_warmup=17, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(tiny.STEPS):
        optimizer.zero_grad()
        ids = torch.randint(64, (4, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    saved = optimizer.state_dict()
    if save is not None:
        converted = {i: save(entry, saved["param_groups"][0]) for i, entry in saved["state"].items()}
        options = converted[0][1]
        saved = {"state": {i: c[0] for i, c in converted.items()}, "param_groups": [{**options, "params": list(converted)}]}
    torch.save(saved, tmp_path / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.optimizer is not None
    parameters = dict(model.named_parameters())
    found, expected = (
        prepare(checkpoint.optimizer.view(checkpoint.model()), parameters),
        prepare(live(optimizer, parameters), parameters),
    )
    assert (found.name, found.step, found.doubts) == ("AdEMAMix", tiny.STEPS, ())
    assert found.threshold == pytest.approx(expected.threshold)
    assert found.direction is not None
    assert expected.direction is not None
    for name, root in expected.root.items():
        ones = torch.ones_like(parameters[name])
        torch.testing.assert_close(found.root[name].apply(ones), root.apply(ones))
        torch.testing.assert_close(found.direction[name], expected.direction[name])


@pytest.mark.slow
def test_a_saved_checkpoint_is_analysed_by_name(tmp_path: Path) -> None:
    model = tiny.build()
    optimizer = published.AdEMAMix(model.parameters(), lr=0.01)
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(tiny.STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    curvcli.save_optimizer(tmp_path, optimizer, model)
    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    report = analyze_checkpoint(
        tmp_path,
        Options(data=tmp_path / "ids.npy", tokens=128, sequence_length=16, depths=False, device="cpu", mode="kept"),
    )
    assert report.optimizer.name == "AdEMAMix"
    assert report.full.rho is not None


@pytest.mark.parametrize("module", ["pytorch_optimizer", "bitsandbytes"])
def test_the_packages_own_is_read_as_the_published_one(module: str) -> None:
    """Where the package is installed: it is in no extra of this project."""
    kind = getattr(pytest.importorskip(module), "optim", importlib.import_module(module)).AdEMAMix
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2)]
    warm = {"t_alpha_beta3": 9, "weight_decouple": True} if module == "pytorch_optimizer" else {"t_alpha": 9, "t_beta3": 9}
    common: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99, 0.9999), "alpha": 5.0, "weight_decay": 0.1, "eps": 1e-8}
    made = [kind([weights[0]], **common, **warm)]
    made.append(published.AdEMAMix([weights[1]], **common, alpha_warmup=9, beta3_warmup=9))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        gradient = torch.randn(3, 4, generator=generator)
        for weight, optimizer in zip(weights, made, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])
    theirs, ours = (prepare(live(o, {"w": w}), {"w": w}) for o, w in zip(made, weights, strict=True))
    assert (theirs.doubts, theirs.threshold) == ((), pytest.approx(ours.threshold))
    torch.testing.assert_close(theirs.root["w"].apply(gradient), ours.root["w"].apply(gradient))


@pytest.mark.parametrize(
    ("options", "said", "error"),
    [
        ({"fixed_decay": True}, "fixed_decay", UnsupportedError),
        ({"stable_adamw": True}, "stable_adamw", UnsupportedError),
        ({"cautious": True}, "cautious", UnsupportedError),
        ({"betas": (0.9, 0.99, 1.0)}, "three in", InputError),
        ({"alpha": None}, "alpha", InputError),
        ({"t_beta3": "x"}, "t_beta3", InputError),
    ],
)
def test_what_changes_the_update_or_is_missing_is_an_error(options: dict, said: str, error: type[Exception]) -> None:
    state = {"step": 5, **{k: torch.ones(2) for k in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}}
    group = Group(("w",), {"lr": 1e-3, "betas": (0.9, 0.999, 0.999), "eps": 1e-8, "alpha": 5.0, **options})
    with pytest.raises(error, match=said):
        prepare(OptimizerView((group,), {"w": state}), {"w": torch.ones(2)})
