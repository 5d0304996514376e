"""Options of every optimizer against its own steps: finite differences of the update, which know no formula."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvcli import analyze
from curvcli.errors import InputError, UnsupportedError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import Preconditioner, live, prepare
from curvcli.training import CurvatureTracker


class OldAdamW(torch.optim.Optimizer):
    """transformers' AdamW of before release 5, in its own words: `correct_bias`, eps added to the plain root."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.01, correct_bias: bool = True, **options: Any) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.0, "correct_bias": correct_bias}
        super().__init__(params, {**defaults, **options})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                s["step"] += 1
                b1, b2 = group["betas"]
                s["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                s["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                size = group["lr"]
                if group["correct_bias"]:
                    size *= (1 - b2 ** s["step"]) ** 0.5 / (1 - b1 ** s["step"])
                p.addcdiv_(s["exp_avg"], s["exp_avg_sq"].sqrt() + group["eps"], value=-size)
                p.mul_(1 - group["lr"] * group["weight_decay"])


def old_view(optimizer: torch.optim.Optimizer, named: dict[str, Tensor]) -> OptimizerView:
    """As a file holds it: without the class's name."""
    view = live(optimizer, named)
    return OptimizerView(view.groups, view.state, None if isinstance(optimizer, OldAdamW) else view.name, view.vouched)


O = torch.optim  # noqa: E741
ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3}
CASES: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adam": lambda p: O.Adam(p, **ADAM),
    "adam coupled amsgrad": lambda p: O.Adam(p, **ADAM, weight_decay=0.3, amsgrad=True),
    "adam maximize coupled": lambda p: O.Adam(p, **ADAM, weight_decay=0.3, maximize=True),
    "adam decoupled by option": lambda p: O.Adam(p, **ADAM, weight_decay=0.3, decoupled_weight_decay=True),
    "adamw amsgrad": lambda p: O.AdamW(p, **ADAM, weight_decay=0.3, amsgrad=True),
    "adamw maximize": lambda p: O.AdamW(p, **ADAM, weight_decay=0.3, maximize=True),
    "adamw foreach": lambda p: O.AdamW(p, **ADAM, weight_decay=0.3, foreach=True),
    "old adamw": lambda p: OldAdamW(p, weight_decay=0.3),
    "old adamw uncorrected": lambda p: OldAdamW(p, weight_decay=0.3, correct_bias=False),
    "nadam": lambda p: O.NAdam(p, **ADAM, weight_decay=0.3),
    "nadam decoupled": lambda p: O.NAdam(p, **ADAM, weight_decay=0.3, decoupled_weight_decay=True),
    "nadam maximize": lambda p: O.NAdam(p, **ADAM, weight_decay=0.3, maximize=True),
    "radam": lambda p: O.RAdam(p, **{**ADAM, "betas": (0.9, 0.7)}, weight_decay=0.3),
    "radam unrectified": lambda p: O.RAdam(p, **ADAM, weight_decay=0.3),
    "radam decoupled maximize": lambda p: O.RAdam(
        p, **{**ADAM, "betas": (0.9, 0.7)}, weight_decay=0.3, decoupled_weight_decay=True, maximize=True
    ),
    "adamax": lambda p: O.Adamax(p, **ADAM, weight_decay=0.3),
    "adamax maximize": lambda p: O.Adamax(p, **ADAM, weight_decay=0.3, maximize=True),
    "sgd": lambda p: O.SGD(p, lr=0.1, weight_decay=0.3),
    "sgd heavy ball dampening": lambda p: O.SGD(p, lr=0.1, momentum=0.9, dampening=0.4, weight_decay=0.3),
    "sgd nesterov maximize": lambda p: O.SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True, weight_decay=0.3),
    "rmsprop": lambda p: O.RMSprop(p, lr=0.01, eps=1e-3, weight_decay=0.3),
    "rmsprop centered momentum": lambda p: O.RMSprop(p, lr=0.01, eps=1e-3, momentum=0.7, centered=True, weight_decay=0.3),
    "rmsprop maximize": lambda p: O.RMSprop(p, lr=0.01, eps=1e-3, maximize=True, weight_decay=0.3),
    "adagrad": lambda p: O.Adagrad(p, lr=0.01, lr_decay=0.1, weight_decay=0.3, initial_accumulator_value=0.2),
    "adadelta": lambda p: O.Adadelta(p, lr=0.5, eps=1e-4, weight_decay=0.3),
    "adadelta maximize": lambda p: O.Adadelta(p, lr=0.5, eps=1e-4, weight_decay=0.3, maximize=True),
    "adagrad maximize": lambda p: O.Adagrad(p, lr=0.01, weight_decay=0.3, maximize=True),
}


def response(case: str) -> tuple[Preconditioner, torch.optim.Optimizer, Tensor, Tensor, Tensor, Tensor]:
    """After a few steps: the metric after one without a gradient at 0, that step's update, and its derivatives by
    gradient and by weight, entry by entry."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    optimizer = CASES[case]([weight])
    for _ in range(4):
        weight.grad = torch.randn_like(weight) * torch.tensor([[0.1, 3.0]], dtype=torch.float64)
        optimizer.step()

    def update(gradient: float, at: float) -> tuple[torch.optim.Optimizer, Tensor, Tensor]:
        again, moved = copy.deepcopy((optimizer, weight))
        with torch.no_grad():
            moved.fill_(at)
        moved.grad = torch.full_like(moved, gradient)
        again.step()
        return again, moved, moved.detach() - at

    h = 1e-6
    after, moved, still = update(0.0, 0.0)
    by_gradient = (update(h, 0.0)[2] - update(-h, 0.0)[2]) / (2 * h)
    by_weight = (update(0.0, h)[2] - update(0.0, -h)[2]) / (2 * h)
    metric = prepare(old_view(after, {"w": moved}), {"w": moved})
    return metric, after, moved, still, by_gradient, by_weight


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_what_the_rule_says(case: str) -> None:
    metric, optimizer, moved, still, by_gradient, by_weight = response(case)
    group = optimizer.param_groups[0]
    # The step answers a gradient by -rate c / P, with one c for all entries: what of it is taken at once.
    taken = (
        -by_gradient
        / metric.lr
        / metric.root["w"].apply(torch.ones_like(by_gradient)).square()
        * (-1 if metric.ascends else 1)
    )
    if "old" in case:  # its decay comes after the step and shrinks that too
        taken = taken / (1 - group["lr"] * group["weight_decay"])
    if "adadelta" in case:  # its step is by the average of updates before this one, which is in the state by now
        updates = optimizer.state[moved]["acc_delta"] + group["eps"]
        taken = taken * (updates / ((updates - group["eps"]) / group["rho"] + group["eps"])).sqrt()
    if "nadam" not in case:  # whose c changes from step to step
        first = 1 - group["betas"][0] if "betas" in group else 1 - group.get("dampening", 0)
        first *= 1 + group["momentum"] if group.get("nesterov") else 1
        torch.testing.assert_close(taken, torch.full_like(taken, first), rtol=1e-6, atol=0)
    torch.testing.assert_close(taken, taken[0, 0].expand_as(taken), rtol=1e-6, atol=0)
    assert bool((taken > 0).all())
    # Decay: part of what the gradient goes through, or of the weights alone.
    decay = metric.decay.get("w", 0.0)
    plain = 0.0 if decay else -metric.lr * group.get("weight_decay", 0.0)
    torch.testing.assert_close(by_weight, -by_gradient.abs() * decay + plain, rtol=1e-5, atol=1e-12)
    # Without a gradient the step goes along the direction. Nesterov takes part of it from the gradient to come.
    if metric.direction is not None and "nadam" not in case and not group.get("nesterov"):
        shrunk = 1 - group["lr"] * group["weight_decay"] if "old" in case else 1.0
        torch.testing.assert_close(still, -metric.lr * shrunk * metric.direction["w"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", ["adam", "old adamw uncorrected", "sgd heavy ball dampening", "rmsprop centered momentum"])
def test_a_direction_is_there_where_momentum_is(case: str) -> None:
    assert response(case)[0].direction is not None


@pytest.mark.parametrize("make", [O.SGD, O.Adam, O.AdamW])
def test_maximised_curvature_is_that_of_minus_the_loss(make: Callable) -> None:
    torch.manual_seed(1)
    model = nn.Linear(4, 2).double()
    batch = torch.randn(16, 4, dtype=torch.float64)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return -(net(x).tanh() ** 2).mean()

    optimizer = make(model.parameters(), lr=0.05, weight_decay=0.2, maximize=True)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    report = analyze(model, loss, [batch], optimizer, tolerance=1e-6)
    parameters = dict(model.named_parameters())
    metric = prepare(live(optimizer, parameters), parameters)

    def flat(vector: Tensor) -> Tensor:
        parts = dict(zip(parameters, (vector[:8].view(2, 4), vector[8:]), strict=True))
        return loss(lambda x: torch.func.functional_call(model, parts, (x,)), batch)  # type: ignore[arg-type]

    point = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    hessian = torch.autograd.functional.hessian(flat, point)
    scale = torch.cat([metric.root[n].apply(torch.ones_like(p)).reshape(-1) for n, p in parameters.items()])
    decay = 0.0 if make is O.AdamW else 0.2
    expected = torch.linalg.eigvalsh(scale[:, None] * (-hessian + decay * torch.eye(10)) * scale)[-1]
    assert report.full.eigenvalue == pytest.approx(float(expected), rel=1e-6)
    assert report.data.loss == pytest.approx(loss(model, batch).item())
    assert "ascends" in {f.code for f in report.findings}


class Adam(OldAdamW):
    """A class of the user's own, called as torch's."""


@pytest.mark.parametrize(("maximize", "mystery"), [(False, None), (True, None), (False, 3)])
def test_the_tracker_measures_the_same(maximize: bool, mystery: int | None) -> None:
    torch.manual_seed(1)
    model, batch = nn.Linear(4, 2).double(), torch.randn(16, 4, dtype=torch.float64)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).tanh().square().mean()

    optimizer = Adam(model.parameters(), mystery=mystery) if mystery else O.AdamW(model.parameters(), maximize=maximize)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    record = CurvatureTracker(model, optimizer, loss, probe=[batch], tolerance=1e-6, max_hvps=60).step(0)
    report = analyze(model, loss, [batch], optimizer, tolerance=1e-6)
    assert record is not None
    assert record.eigenvalue == pytest.approx(report.full.eigenvalue, rel=1e-6)
    assert record.rho == (None if mystery else pytest.approx(report.full.rho, rel=1e-6))
    assert ("mystery=3" in (record.message or "")) == bool(mystery)
    assert (report.findings[0].code == "unresolved-optimizer") == bool(mystery)


def test_groups_that_climb_and_descend_are_refused() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups: list[dict[str, Any]] = [{"params": [a], "maximize": True}, {"params": [b]}]
    optimizer = O.SGD(groups, lr=0.1)
    with pytest.raises(UnsupportedError, match="not symmetric"):
        prepare(live(optimizer, {"a": a, "b": b}), {"a": a, "b": b})


def adam_view(options: dict[str, Any], name: str | None = None, vouched: bool = False, **state: Any) -> OptimizerView:
    entry = {"step": 3, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2), **state}
    group = Group(("w",), {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, **options})
    return OptimizerView((group,), {"w": entry}, name, vouched)


HARMLESS: dict[str, dict[str, Any]] = {
    "torch": {"foreach": None, "fused": True, "capturable": False, "differentiable": False, "initial_lr": 1e-3},
    "OneCycleLR": {"max_lr": 1e-2, "min_lr": 1e-6, "max_momentum": 0.95, "base_momentum": 0.85},
    "SWALR": {"swa_lr": 1e-3},
    "timm": {"lr_scale": 0.5, "param_names": ["w"], "caution": False, "corrected_weight_decay": False, "amsgrad": False},
    "mmengine": {"lr_mult": 0.5, "decay_mult": 0.0, "group_name": "layer_3_decay", "layer_id": 3},
    "DINOv2": {"lr_multiplier": 0.5, "wd_multiplier": 1.0, "is_last_layer": True, "name": "head"},
    "DeepSpeed": {"moe": True, "name": "experts", "bias_correction": True, "step": 3},
    "Megatron-LM": {"wd_mult": 0.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False},
    "OLMo": {"sharded": True, "max_grad_norm": 1.0, "max_grad_norm_ratio": None, "selective_updates": False, "name": "a"},
    "Muon's auxiliary Adam": {"use_muon": False},
    "bitsandbytes": {"alpha": 0.0, "t_alpha": None, "t_beta3": None},
    "not set": {"anything": None},
}  # fmt: skip


@pytest.mark.parametrize("trainer", HARMLESS)
def test_what_trainers_keep_with_a_group_raises_no_doubt(trainer: str) -> None:
    assert prepare(adam_view(HARMLESS[trainer]), {"w": torch.ones(2)}).doubts == ()


@pytest.mark.parametrize("key", ["weight_decouple", "adam_debias", "use_nesterov", "fixed_decay", "mystery"])
@pytest.mark.parametrize("value", [True, False, 0.5, "on"])
def test_an_unknown_option_takes_the_verdict_away_until_the_optimizer_is_named(key: str, value: Any) -> None:
    metric = prepare(adam_view({key: value}), {"w": torch.ones(2)})
    assert metric.doubts == (f"option {key}={value}",)
    assert prepare(adam_view({key: value}, "AdamW", vouched=True), {"w": torch.ones(2)}).doubts == ()
    assert prepare(adam_view({key: value}, "AdamW"), {"w": torch.ones(2)}).doubts  # some class of that name


def test_a_doubt_leaves_the_report_without_verdict_and_bracket() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    entry = {
        n: {"step": 90, "exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)} for n, p in model.named_parameters()
    }
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "mystery": 2}
    view = OptimizerView((Group(tuple(entry), options),), entry)
    batches = list(torch.randn(4, 8, 3))
    report = analyze(model, lambda m, x: m(x).square().mean(), batches, view)
    assert report.verdict == "unresolved"
    assert report.generalisation.rho_high is None
    assert report.findings[0].code == "unresolved-optimizer"
    assert "mystery=2" in report.findings[0].message
    plain = OptimizerView((Group(tuple(entry), {**options, "mystery": None}),), entry)
    assert analyze(model, lambda m, x: m(x).square().mean(), batches, plain).verdict == "stable"


# Of its release 0.3.3.
OPTIMI = {
    "beta1": 0.9, "beta2": 0.99, "decouple_lr": False, "max_lr": None, "kahan_sum": False, "foreach": False,
    "triton": False, "gradient_release": False, "setup": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "state", "said"),
    [
        ({"caution": True, "amsgrad": False}, {}, "caution=True is on"),
        ({"corrected_weight_decay": True, "amsgrad": False}, {}, "corrected_weight_decay"),
        ({"alpha": 5.0}, {}, "second, slow moment"),
        ({"betas": (0.9, 0.99, 0.9999)}, {}, "AdEMAMix"),
        ({}, {"exp_avg_slow": torch.ones(2)}, "AdEMAMix"),
        ({"caution": False}, {}, "NAdamW"),
        ({"grad_averaging": True, "bias_correction": True}, {}, "LAMB"),
        ({"lookahead_k": 6}, {}, "Lookahead"),
        ({"weight_sum": 3.0}, {}, "schedule-free"),
        ({}, {"exp_avg_var": torch.ones(2)}, "AdaBelief"),
        (OPTIMI, {"kahan_comp": None, "eps_sq": torch.tensor(1e-12)}, "torch-optimi"),  # the Trainer's stable_adamw
        ({**OPTIMI, "decouple_wd": False}, {"kahan_comp": None}, "Adam and RAdam look alike"),
        ({**OPTIMI, "decouple_wd": True, "k": 6}, {"la_param": torch.ones(2)}, "torch-optimi"),  # Ranger
        ({**OPTIMI, "decouple_wd": True, "beta1": "much"}, {}, "torch-optimi"),
        ({}, {"mystery": torch.ones(2)}, "keeps no 'mystery'"),
    ],
)
def test_what_changes_the_update_is_refused_with_the_reason(options: dict, state: dict, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said) as refused:
        prepare(adam_view(options, **state), {"w": torch.ones(2)})
    assert "--optimizer none" in refused.value.hint


@pytest.mark.parametrize("missing", ["step", "exp_avg", "exp_avg_sq"])
def test_missing_state_is_an_error_that_names_it(missing: str) -> None:
    view = adam_view({})
    entry = {k: v for k, v in view.state["w"].items() if k != missing}
    with pytest.raises((InputError, UnsupportedError), match="no steps" if missing == "step" else missing):
        prepare(OptimizerView(view.groups, {"w": entry}, "AdamW"), {"w": torch.ones(2)})


def test_amsgrad_without_its_maximum_is_an_error() -> None:
    with pytest.raises(InputError, match="max_exp_avg_sq"):
        prepare(adam_view({"amsgrad": True}), {"w": torch.ones(2)})


def test_adam_named_and_silent_on_decay_is_coupled() -> None:
    options = {"weight_decay": 0.1}
    assert prepare(adam_view(options, "Adam"), {"w": torch.ones(2)}).decay == {"w": 0.1}
    assert prepare(adam_view(options, "AdamW"), {"w": torch.ones(2)}).decay == {}
    unsaid = prepare(adam_view(options), {"w": torch.ones(2)})
    assert unsaid.decay == {}
    assert [f.code for f in unsaid.findings] == ["decay-assumed"]
