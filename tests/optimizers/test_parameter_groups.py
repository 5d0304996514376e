"""Parameter groups that differ: frozen by a learning rate of 0, scaled by one factor, never made alike."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import STEPS, build
from torch import Tensor, nn

from curvcli import analyze
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.documents import Report
from curvcli.errors import CurvError, InputError, UsageError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.given import at_logged, lead, override, scaled
from curvcli.optimizers.preconditioner import live, prepare

RATES = (0.02, 0.01, 0.005)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """Three layers, the second the largest, each with its own rate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    groups = [{"params": model[2 * i].parameters(), "lr": rate, "weight_decay": 0.1} for i, rate in enumerate(RATES)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    x = torch.randn(32, 3, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    return model, optimizer, x


def changed(trained: tuple, **options: list[Any]) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    model, optimizer, x = copy.deepcopy(trained)
    for key, values in options.items():
        for group, value in zip(optimizer.param_groups, values, strict=True):
            group[key] = value
    return model, optimizer, x


def dense_rho(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """Largest eigenvalue of (T P)^(-1/2) H (T P)^(-1/2) over the groups that move, from the whole Hessian."""
    parameters = dict(model.named_parameters())

    def function(*values: Tensor) -> Tensor:
        out = torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,))
        return out.square().mean()

    blocks = torch.autograd.functional.hessian(function, tuple(parameters.values()))
    sizes = [p.numel() for p in parameters.values()]
    hessian = torch.cat(
        [
            torch.cat([b.reshape(n, m) for b, m in zip(row, sizes, strict=True)], 1)
            for row, n in zip(blocks, sizes, strict=True)
        ]
    )
    scale = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            s = optimizer.state[p]
            t, (b1, b2) = float(s["step"]), group["betas"]
            metric = (1 - b1**t) * ((s["exp_avg_sq"] / (1 - b2**t)).sqrt() + group["eps"])
            moves = group["lr"] > 0
            threshold = (2 / group["lr"] - group["weight_decay"]) * (1 + b1) / (1 - b1) if moves else 1.0
            scale.append(((threshold * metric) ** -0.5 * moves).reshape(-1))
    root = torch.cat(scale)
    return float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1])


def measured(trained: tuple, lr: float | None = None) -> Report:
    model, optimizer, x = trained
    return analyze(model, loss, [x], optimizer, lr=lr, tolerance=1e-6, depths=False)


def codes(report: Report) -> set[str]:
    return {f.code for f in report.findings}


def test_a_group_at_rate_0_is_frozen_and_said_to_be(trained: tuple) -> None:
    partly = changed(trained, lr=[0.02, 0.0, 0.005])
    report = measured(partly)
    assert report.full.rho == pytest.approx(dense_rho(*partly), rel=1e-6)
    assert report.full.rho != pytest.approx(dense_rho(*trained), rel=0.01)
    said = next(f.message for f in report.findings if f.code == "frozen-groups")
    assert said.startswith("1 of 3 parameter groups have learning rate 0: their 2 tensors")
    assert report.optimizer.lr == 0.02  # of the largest group that moves
    assert report.checkpoint.parameters == 16 + 12


def test_a_given_rate_scales_all_groups_by_one_factor(trained: tuple) -> None:
    report = measured(trained, lr=0.004)  # of the second group, the largest
    halves = changed(trained, lr=[0.008, 0.004, 0.002])
    assert report.full.rho == pytest.approx(dense_rho(*halves), rel=1e-6)
    assert report.full.rho == pytest.approx(measured(halves).full.rho, rel=1e-9)
    assert (report.optimizer.lr, report.optimizer.lr_source) == (0.004, "option")
    assert "scaled-rates" in codes(report)
    flat = changed(trained, lr=[0.004] * 3)
    assert report.full.rho != pytest.approx(dense_rho(*flat), rel=0.01)


def test_a_given_rate_leaves_frozen_groups_frozen(trained: tuple) -> None:
    report = measured(changed(trained, lr=[0.02, 0.0, 0.005]), lr=0.01)
    assert report.full.rho == pytest.approx(dense_rho(*changed(trained, lr=[0.01, 0.0, 0.0025])), rel=1e-6)
    assert {"scaled-rates", "frozen-groups"} <= codes(report)


def test_equal_groups_are_scaled_without_words(trained: tuple) -> None:
    assert "scaled-rates" not in codes(measured(changed(trained, lr=[0.01] * 3), lr=0.004))


def test_rates_that_are_all_0_are_an_error(trained: tuple) -> None:
    with pytest.raises(UsageError, match="every parameter group is 0"):
        measured(changed(trained, lr=[0.0] * 3))


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_a_given_rate_is_above_0(trained: tuple, lr: float) -> None:
    with pytest.raises(UsageError, match="learning rate given"):
        measured(trained, lr=lr)


def views(rates: list[float | None], **options: list[Any]) -> tuple[OptimizerView, dict[str, Tensor]]:
    parameters = {f"p{i}": torch.zeros(i + 1) for i in range(len(rates))}
    groups = []
    for i, rate in enumerate(rates):
        own = {key: values[i] for key, values in options.items()}
        groups.append(Group((f"p{i}",), {"lr": rate, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, **own}))
    state = {n: {"step": 2, "exp_avg": p + 1, "exp_avg_sq": p + 1} for n, p in parameters.items()}
    return OptimizerView(tuple(groups), state), parameters


def rates_of(view: OptimizerView) -> list[float | None]:
    return [group.lr for group in view.groups]


def test_the_lead_is_the_largest_group_that_moves() -> None:
    assert lead(*views([0.1, 0.2, 0.3])).names == ("p2",)
    assert lead(*views([0.1, 0.2, 0.0])).names == ("p1",)
    assert lead(*views([0.0, 0.0, 0.0])).names == ("p2",)


def test_a_finished_schedule_keeps_the_ratios_that_it_began_with() -> None:
    view, parameters = views([0.0, 0.0, 0.0], initial_lr=[0.4, 0.2, 0.1])
    assert rates_of(scaled(view, parameters, 0.01)) == pytest.approx([0.04, 0.02, 0.01])
    assert rates_of(at_logged(view, 0.01)) == pytest.approx([0.01, 0.005, 0.0025])  # trainers log the first group's
    assert scaled(view, parameters, 0.01).findings[0].code == "scaled-rates"


def test_ratios_that_are_lost_are_not_made_up() -> None:
    view, parameters = views([0.0, 0.0, 0.0])
    for attempt in (lambda: scaled(view, parameters, 0.01), lambda: at_logged(view, 0.01)):
        with pytest.raises(InputError, match="3 parameter groups differed"):
            attempt()


def test_groups_that_differ_in_decay_alone_had_one_rate() -> None:
    view, parameters = views([0.0, 0.0], weight_decay=[0.1, 0.0])
    assert rates_of(scaled(view, parameters, 0.01)) == [0.01, 0.01]
    alike, parameters = views([0.0, 0.0])  # why else would there be two?
    with pytest.raises(InputError, match="2 parameter groups differed"):
        scaled(alike, parameters, 0.01)


def test_a_rate_that_only_some_groups_have_is_not_filled_in() -> None:
    with pytest.raises(InputError, match="some parameter groups have no learning rate"):
        scaled(*views([0.1, None]), 0.01)


@pytest.mark.parametrize(
    ("option", "own", "value"),
    [("betas", [(0.9, 0.99), (0.9, 0.95)], (0.8, 0.9)), ("eps", [1e-8, 1e-6], 1e-7), ("weight_decay", [0.1, 0.0], 0.05)],
)
def test_one_value_is_not_forced_on_groups_that_differ(option: str, own: list[Any], value: Any) -> None:
    view, parameters = views([0.1, 0.1], **{option: own})
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} would give one value") as refused:
        override(view, **{option: value})
    assert refused.value.hint.startswith("leave it out")
    assert prepare(override(view), parameters).threshold  # the remedy
    frozen, _ = views([0.1, 0.0], **{option: own})
    assert override(frozen, **{option: value}).groups[0].options[option] == value
    missing, _ = views([0.1, 0.1], **{option: [own[0], None]})
    assert [g.options[option] for g in override(missing, **{option: value}).groups] == [value, value]


def test_an_option_that_the_optimizer_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="Adam has no momentum"):
        override(views([0.1])[0], momentum=0.9)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trainer's directory at the end of its schedule: two groups, the second at half the first's rate."""
    run = tmp_path_factory.mktemp("finished") / f"checkpoint-{STEPS}"
    model = build()
    named = list(model.named_parameters())
    groups = [{"params": named[:9], "lr": 0.02}, {"params": named[9:], "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for step in range(STEPS):
        ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 0.0
    model.save_pretrained(run)
    torch.save(optimizer.state_dict(), run / "optimizer.pt")
    (run / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "log_history": []}))
    np.random.default_rng(0).integers(0, 64, 2048, dtype=np.uint16).tofile(run.parent / "data.bin")
    return run


def of_file(run: Path, **options: Any) -> Report:
    few = Options(data=run.parent / "data.bin", tokens=64, sequence_length=16, max_hvps=3, depths=False, mode="kept")
    return analyze_checkpoint(run, replace(few, **options))


@pytest.mark.slow
def test_a_finished_run_is_measured_at_the_logged_rate_of_its_first_group(finished: Path, tmp_path: Path) -> None:
    log = [{"step": 2, "learning_rate": 0.004, "loss": 4.0}, {"step": 3, "learning_rate": 0.0, "loss": 4.0}]
    (finished / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "log_history": log}))
    report = of_file(finished)
    (finished / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "log_history": []}))
    given = of_file(finished, lr=report.optimizer.lr)
    assert report.full.rho == pytest.approx(given.full.rho, rel=1e-6)
    sizes = [
        sum(p.numel() for _, p in part)
        for part in (list(build().named_parameters())[:9], list(build().named_parameters())[9:])
    ]
    assert report.optimizer.lr == pytest.approx(0.004 if sizes[0] > sizes[1] else 0.002)
    assert report.optimizer.lr_source == "log"
    assert "scaled-rates" in codes(report)


@pytest.mark.slow
def test_without_a_log_the_remedy_works_or_is_another(finished: Path) -> None:
    with pytest.raises(InputError, match="pass the one in force with --lr"):
        of_file(finished)
    assert of_file(finished, lr=0.004).full.rho
    state = torch.load(finished / "optimizer.pt")
    for group in state["param_groups"]:
        del group["initial_lr"]
    torch.save(state, finished / "optimizer.pt")
    for options in ({}, {"lr": 0.004}):
        with pytest.raises(CurvError, match="nothing in it says how") as refused:
            of_file(finished, **options)
        assert "--optimizer none" in refused.value.hint
    assert of_file(finished, optimizer="none").full.eigenvalue


def test_live_and_saved_views_agree(trained: tuple) -> None:
    model, optimizer, _ = trained
    parameters = dict(model.named_parameters())
    view = live(optimizer, parameters)
    nameless = OptimizerView(view.groups, view.state)
    assert prepare(view, parameters).threshold == prepare(nameless, parameters).threshold


def test_an_option_that_is_missing_is_said_to_be() -> None:
    for options, said in (({}, "'lr' is missing"), ({"lr": None}, "'lr' is None, not a number")):
        with pytest.raises(InputError, match=said):
            Group(("w",), options).number("lr")
