"""Shampoo against its published update: its own steps, its threshold, its files, and what cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import published
import pytest
import stepped
import tiny
import torch
from schedules import schedule
from stepped import metric
from torch import nn

import curvcli
from curvcli.checkpoints import open_checkpoint
from curvcli.errors import InputError, UnsupportedError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.training import ArchitectureWarmup, CurvatureTracker

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decoupled": {"weight_decay": 3.0, "weight_decouple": True},
    "coupled": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.1, "matrix_eps": 0.1},
    "torch_optimizer's": {"kind": published.EarlyShampoo, "epsilon": 1e-3},
}


def trained(kind: Any = published.Shampoo, steps: int = 9, **options: Any) -> tuple[models.Net, Any, list]:
    net, batches = models.Net(seed=2, blocks=1, width=3, vocab=5), models.data(vocab=5)
    optimizer = kind(net.parameters(), lr=0.05, **options)
    models.train(net, optimizer, batches, steps=steps)
    return net, optimizer, batches


@pytest.mark.parametrize("case", OPTIONS)
def test_p_is_the_optimizers_own_answer(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivative of the optimizer's step by its gradient is (1 - b) P^(-1), b its momentum. Roots are held still."""
    net, optimizer, _ = trained(**OPTIONS[case])
    monkeypatch.setattr(published.Shampoo, "every", 10**9)
    after, still, parts = stepped.answers(optimizer, net)
    group, found = after.param_groups[0], metric(after, still)
    b = group["momentum"]
    for name, root in found.root.items():
        weight = still.get_parameter(name).detach()
        matrix = torch.linalg.inv(stepped.as_matrix(root.solve, weight))
        answered = parts[name] / (group["lr"] * (1 - b))
        directions = torch.linalg.matrix_rank(answered)
        assert directions == weight.numel()
        torch.testing.assert_close(matrix - b * torch.eye(len(matrix), dtype=matrix.dtype), torch.linalg.inv(answered))
    assert set(found.decay.values()) == (set() if group.get("weight_decouple") else {group["weight_decay"]})
    assert found.threshold == pytest.approx((2 / 0.05 - (3.0 if case == "decoupled" else 0.0)) / (1 - b))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "torch_optimizer's"])
def test_lambda_is_that_of_the_optimizers_own_answer(case: str) -> None:
    """P by differences of the optimizer's step, the Hessian dense by those of gradients."""
    net, optimizer, batches = trained(**OPTIONS[case])
    after, still, parts = stepped.answers(optimizer, net)
    found, names = metric(after, still), [n for n, _ in still.named_parameters()]
    scale = stepped.root(parts) / 0.05**0.5
    keep = [torch.eye(len(p), dtype=p.dtype) for p in parts.values()]
    for i, name in enumerate(names):  # without the directions along which no gradient ever came
        weight = still.get_parameter(name).detach()
        if found.root[name].idle:
            keep[i] = stepped.as_matrix(found.root[name].apply, weight) @ stepped.as_matrix(found.root[name].invert, weight)
    scale = torch.block_diag(*keep) @ scale
    truth = models.top(scale @ models.dense_hessian(still, batches, names) @ scale.T)
    common: dict[str, Any] = {"weights": models.weights(batches), "tolerance": 1e-4}
    report = curvcli.analyze(still, models.loss, batches, after, **common)
    assert (report.optimizer.name, report.optimizer.preconditioner) == ("Shampoo", "checkpoint")
    assert report.full.eigenvalue == pytest.approx(truth, rel=1e-5)
    tracker = CurvatureTracker(still, after, models.loss, probe=batches, max_hvps=80, **common)
    assert tracker.step(0).rho == pytest.approx(report.full.rho, rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "case",
    ["plain", "momentum", *(pytest.param(c, marks=pytest.mark.slow) for c in ("coupled", "decoupled", "torch_optimizer's"))],
)
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_the_published_update_flips_at_the_threshold(case: str, factor: float) -> None:
    """P is held still, since gradients are so small beside its sums; the momentum is half of its least eigenvalue."""
    torch.manual_seed(1)
    options = {**OPTIONS[case]}
    kind = options.pop("kind", published.Shampoo)
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = kind([weight], lr=0.1, **{**options, "momentum": 0.9 if case == "momentum" else 0.0})
    state: dict[str, torch.Tensor] = {"momentum_buffer": torch.zeros_like(weight).detach()}
    for i, n in enumerate(weight.shape):
        side = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
        values = 1 + torch.rand(n, dtype=torch.float64)
        state[f"{kind.keys[0]}_{i}"] = side @ torch.diag(values) @ side.T * 4
        state[f"{kind.keys[1]}_{i}"] = torch.zeros(n, n, dtype=torch.float64)
    optimizer.state[weight].update(state)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert stepped.leaves(optimizer, weight, factor, steps=250, start=1e-10) == (factor > 1)


def test_saved_state_is_read_as_it_was(tmp_path: Path) -> None:
    model = tiny.build()
    optimizer = published.EarlyShampoo(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(tiny.STEPS):
        optimizer.zero_grad()
        ids = torch.randint(64, (4, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.optimizer is not None
    parameters = dict(model.named_parameters())
    found, expected = prepare(checkpoint.optimizer.view(checkpoint.model()), parameters), metric(optimizer, model)
    assert (found.name, found.step, found.doubts) == ("Shampoo", tiny.STEPS, ())
    assert found.threshold == pytest.approx(expected.threshold)
    for name, root in expected.root.items():
        tensor = torch.randn(parameters[name].shape)
        torch.testing.assert_close(found.root[name].apply(tensor), root.apply(tensor))


def test_a_block_that_joins_late_is_measured_from_its_first_step() -> None:
    net, batches = models.Net(seed=2, blocks=2, width=3, vocab=5), models.data(vocab=5)
    optimizer = published.Shampoo(net.parameters(), lr=0.01)
    warmup = ArchitectureWarmup(net, optimizer, schedule(2, (0, [0]), (1, range(2)), mode="freeze"))
    tracker = CurvatureTracker(net, optimizer, models.loss, probe=batches, weights=models.weights(batches), warmup=warmup)
    for step, measured in ((0, 8), (1, 13)):
        warmup.step(step)
        models.train(net, optimizer, batches, steps=1)
        assert len(metric(optimizer, net).root) == measured
    record = tracker.step(1)
    assert record is not None
    assert record.status in ("converged", "unconverged"), record.message


def view(state: dict[str, Any] | None = None, shape: tuple[int, ...] = (3, 2), **options: Any) -> Any:
    base: dict[str, Any] = {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "matrix_eps": 1e-6, "step": 4}
    entry = {
        "momentum_buffer": torch.ones(shape), **{f"pre_cond_{i}": torch.eye(n) for i, n in enumerate(shape)},
        **{f"inv_pre_cond_{i}": torch.eye(n) for i, n in enumerate(shape)}, **(state or {}),
    }  # fmt: skip
    entry = {k: v for k, v in entry.items() if v is not None}
    return prepare(OptimizerView((Group(("w",), {**base, **options}),), {"w": entry}), {"w": torch.ones(shape)})


def test_directions_without_a_gradient_are_left_out() -> None:
    sums = torch.diag(torch.tensor([1.0, 1e-6, 1.0]))
    found = view({"pre_cond_0": sums})
    assert (found.name, found.root["w"].idle) == ("Shampoo", 2)
    assert found.root["w"].apply(torch.ones(3, 2))[:, 0].tolist() == [1.0, 0.0, 1.0]
    # Before the first root is taken the update is 0.
    with pytest.raises(InputError, match="second moment of every weight is 0"):
        view({"inv_pre_cond_0": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    ("state", "options", "said", "error"),
    [
        ({}, {"fixed_decay": True}, "does not go with the learning rate", UnsupportedError),
        ({}, {"momentum": 0.5, "weight_decay": 0.1}, "momentum and its coupled weight decay", UnsupportedError),
        ({"inv_pre_cond_1": 4 * torch.eye(2)}, {"momentum": 0.5}, "its update grows by itself", InputError),
        ({"inv_pre_cond_1": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, {}, "not symmetric", InputError),
        ({"inv_pre_cond_1": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, {}, "not symmetric and positive", InputError),
        ({"inv_pre_cond_1": torch.eye(3)}, {}, r"'inv_pre_cond' of shapes \[\(3, 3\), \(3, 3\)\]", InputError),
        ({"inv_pre_cond_1": None}, {}, "'inv_pre_cond' of shapes", InputError),
        ({"pre_cond_1": None}, {}, "'pre_cond' of shapes", InputError),
        ({"pre_cond_2": torch.eye(2)}, {}, "'pre_cond' of shapes", InputError),
        ({"momentum_buffer": None}, {}, "a variant of SOAP or Shampoo", UnsupportedError),
        ({"graft": 0, "pre_conditioner": 0}, {}, "Shampoo with grafting", UnsupportedError),
        ({"block_0.shampoo.factor_matrices.0": torch.eye(3)}, {}, "Shampoo with grafting", UnsupportedError),
        ({}, {"matrix_eps": "x"}, "matrix_eps", InputError),
    ],
)
def test_what_changes_the_update_or_is_damaged_is_an_error(
    state: dict, options: dict, said: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=said):
        view(state, **options)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.01}, {"weight_decay": 0.1, "weight_decouple": True}])
@pytest.mark.parametrize("module", ["pytorch_optimizer", "torch_optimizer.shampoo"])
def test_the_packages_own_is_read_as_the_published_one(module: str, options: dict[str, Any]) -> None:
    """Where the package is installed: it is in no extra of this project."""
    early = module != "pytorch_optimizer"
    theirs = pytest.importorskip(module).Shampoo
    ours = published.EarlyShampoo if early else published.Shampoo
    if early and "weight_decouple" in options:
        pytest.skip("it has no decoupled decay")
    generator = torch.Generator().manual_seed(0)
    nets = [
        nn.ParameterList([torch.linspace(-1, 1, 20).view(5, 4), torch.ones(6), torch.ones(3, 2, 6)]).double() for _ in "ab"
    ]
    made = [kind(net.parameters(), lr=0.01, **options) for kind, net in zip((theirs, ours), nets, strict=True)]
    for _ in range(7):
        gradients = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in nets[0]]
        for net, optimizer in zip(nets, made, strict=True):
            for p, gradient in zip(net, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    found, expected = (metric(o, n) for o, n in zip(made, nets, strict=True))
    assert (found.doubts, found.threshold) == ((), pytest.approx(expected.threshold))
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(nets[0][i], nets[1][i])
        torch.testing.assert_close(found.root[str(i)].apply(gradient), expected.root[str(i)].apply(gradient))


def test_without_a_name_neither_muon_nor_sgd_takes_it() -> None:
    net, optimizer, _ = trained(steps=2)
    known = live(optimizer, dict(net.named_parameters()))
    assert prepare(OptimizerView(known.groups, known.state), dict(net.named_parameters())).name == "Shampoo"
