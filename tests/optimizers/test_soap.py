"""SOAP against its published update: its own steps, its threshold, its files, and what cannot be read."""

from __future__ import annotations

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
import torch.distributed.checkpoint as dcp
from schedules import schedule
from stepped import metric
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import curvcli
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.state.evidence import contradictions, gather
from curvcli.checkpoints.state.soundness import state_findings
from curvcli.curvature.rotated import Rotated
from curvcli.errors import InputError, UnsupportedError, UsageError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.optimizers.soap import merged
from curvcli.training import ArchitectureWarmup, CurvatureTracker

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "vectors too": {"precondition_1d": True, "weight_decay": 3.0, "shampoo_beta": 0.8},
    "a side too large": {"max_precond_dim": 4, "correct_bias": False},
    "merged": {"merge_dims": True},
    "in the weights' basis": {"kind": published.EarlySOAP, "betas": (0.9, 0.99)},
}


def trained(kind: Callable = published.SOAP, **options: Any) -> tuple[models.Net, published.SOAP, list]:
    net, batches = models.Net(seed=2, blocks=1, width=3, vocab=5), models.data(vocab=5)
    optimizer = kind(net.parameters(), lr=0.01, eps=1e-3, **{"precondition_frequency": 4, **options})
    models.train(net, optimizer, batches, steps=6)
    return net, optimizer, batches


@pytest.mark.parametrize("case", OPTIONS)
def test_p_is_the_optimizers_own_answer(case: str) -> None:
    """P^(-1) is the derivative of the optimizer's step by its gradient, which differences find."""
    net, optimizer, _ = trained(**OPTIONS[case])
    after, still, parts = stepped.answers(optimizer, net)
    group, found = after.param_groups[0], metric(after, still)
    for name, root in found.root.items():
        weight = still.get_parameter(name).detach()
        matrix = stepped.as_matrix(root.solve, weight)
        rate, noise = group["lr"] * (1 - group["betas"][0]), 1e-6 * float(parts[name].abs().max())
        torch.testing.assert_close(rate * matrix, parts[name], rtol=1e-5, atol=noise)
        half = stepped.as_matrix(root.apply, weight)
        torch.testing.assert_close(half @ half, matrix)
        vector = torch.randn_like(weight)
        torch.testing.assert_close(root.invert(root.apply(vector)), vector)
        assert root.positive
        assert root.idle == 0
    rotated = {name for name, root in found.root.items() if isinstance(root, Rotated)}
    assert ("head.bias" in rotated) == (case == "vectors too")
    assert "layers.0.up.weight" in rotated
    # A step without a gradient goes along the direction that the metric has, but for the decay.
    assert found.direction is not None
    shrunk = 1 - group["lr"] * group["weight_decay"]
    for name, before in net.named_parameters():
        moved = still.get_parameter(name) - before * shrunk
        torch.testing.assert_close(moved, -group["lr"] * found.direction[name], rtol=1e-9, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS)
def test_lambda_is_that_of_the_optimizers_own_answer(case: str) -> None:
    """P by differences of the optimizer's step, the Hessian dense by those of gradients."""
    net, optimizer, batches = trained(**OPTIONS[case])
    after, still, parts = stepped.answers(optimizer, net)
    group, names = after.param_groups[0], [n for n, _ in still.named_parameters()]
    scale = stepped.root(parts) / (group["lr"] * (1 - group["betas"][0])) ** 0.5
    truth = models.top(scale @ models.dense_hessian(still, batches, names) @ scale)
    common: dict[str, Any] = {"weights": models.weights(batches), "tolerance": 1e-4}
    report = curvcli.analyze(still, models.loss, batches, after, **common)
    assert (report.optimizer.name, report.optimizer.preconditioner) == ("SOAP", "checkpoint")
    assert report.full.eigenvalue == pytest.approx(truth, rel=1e-5)
    tracker = CurvatureTracker(still, after, models.loss, probe=batches, max_hvps=80, **common)
    assert tracker.step(0).rho == pytest.approx(report.full.rho, rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("decay", [3.0])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_the_published_update_flips_at_the_threshold(decay: float, factor: float) -> None:
    """On a quadratic whose Hessian has no axis in common with SOAP's basis, which is held still, as v is by its size."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = published.SOAP(
        [weight], lr=0.1, betas=(0.9, 1 - 1e-12), eps=0.0, weight_decay=decay, precondition_frequency=10**9, shampoo_beta=1.0
    )
    sides = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in weight.shape]
    v = 4e6 * torch.rand_like(weight).detach() + 1e6
    optimizer.state[weight].update(
        step=10**12, exp_avg=torch.zeros_like(v), exp_avg_sq=v, Q=sides, GG=[torch.zeros_like(s) for s in sides]
    )
    assert metric(optimizer, nn.ParameterDict({"w": weight})).threshold == pytest.approx((2 / 0.1 - decay) * 1.9 / 0.1)
    assert stepped.leaves(optimizer, weight, factor) == (factor > 1)
    assert float((optimizer.state[weight]["exp_avg_sq"] / v - 1).abs().max()) < 1e-3


def saved(tmp_path: Path, save: Callable, **options: Any) -> tuple[nn.Module, published.SOAP]:
    model = tiny.build()
    optimizer = published.SOAP(model.parameters(), lr=0.01, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(tiny.STEPS):
        optimizer.zero_grad()
        ids = torch.randint(64, (4, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    save(tmp_path, optimizer, model)
    return model, optimizer


def by_us(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    curvcli.save_optimizer(path, optimizer, model)


def by_torch(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    torch.save(optimizer.state_dict(), path / "optimizer.pt")


def by_dcp(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    (path / "model.safetensors").unlink()
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path)


LARGE = {"max_precond_dim": 60}  # less than the vocabulary


@pytest.mark.parametrize(
    ("save", "options"), [(by_torch, {}), (by_us, LARGE), pytest.param(by_dcp, LARGE, marks=pytest.mark.slow)]
)
def test_saved_state_is_read_as_it_was(save: Callable, options: dict, tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path, save, **options)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.optimizer is not None
    view = checkpoint.optimizer.view(checkpoint.model())
    parameters = dict(model.named_parameters())
    found, expected = prepare(view, parameters), metric(optimizer, model)
    assert (found.name, found.step, found.doubts) == ("SOAP", tiny.STEPS - 1, ())
    assert found.threshold == pytest.approx(expected.threshold)
    assert found.direction is not None
    for name, root in expected.root.items():
        tensor = torch.randn(parameters[name].shape)
        torch.testing.assert_close(found.root[name].apply(tensor), root.apply(tensor))
        torch.testing.assert_close(found.direction[name], expected.direction[name])
    # The step that SOAP skips is no sign of two checkpoints, and a rotated second moment breaks no bound.
    assert [f.code for f in state_findings(view, tiny.STEPS, tmp_path)] == []
    assert [f.code for f in state_findings(view, tiny.STEPS + 1, tmp_path)] == ["step-mismatch"]


@pytest.mark.slow
def test_a_saved_checkpoint_is_analysed(tmp_path: Path) -> None:
    saved(tmp_path, by_torch)
    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    options = Options(data=tmp_path / "ids.npy", tokens=128, sequence_length=16, depths=False, device="cpu", mode="kept")
    report = analyze_checkpoint(tmp_path, options)
    assert (report.optimizer.name, report.optimizer.step) == ("SOAP", tiny.STEPS - 1)
    assert report.full.rho is not None
    assert report.full.status == "converged"
    assert report.update.ratio is not None
    assert not {"step-mismatch", "absurd-moment", "moments-contradict-gradient"} & {f.code for f in report.findings}


def test_moments_are_told_apart_in_the_weights_basis() -> None:
    """Swapped state is found by gradients, to which a second moment in SOAP's own basis would say nothing."""
    net, batches = models.Net(seed=1, blocks=2, width=16, vocab=24), models.data(vocab=24, rows=400)
    optimizer = published.SOAP(net.parameters(), lr=1e-3)
    models.train(net, optimizer, batches, steps=12)
    view = live(optimizer, dict(net.named_parameters()))
    evidence = gather(net, models.loss, batches)
    assert contradictions(view, evidence, "file") == []
    swapped = {n: view.state[n.replace("up", "x").replace("down", "up").replace("x", "down")] if n.endswith(
        "weight") and "layers" in n and "norm" not in n else e for n, e in view.state.items()}  # fmt: skip
    fits = [
        np.mean([evidence.fit(n, _second(OptimizerView(view.groups, s), n)) for n in swapped if "up.weight" in n])
        for s in (view.state, swapped)
    ]
    assert fits[0] > fits[1] + 0.3


def _second(view: OptimizerView, name: str) -> torch.Tensor:
    from curvcli.checkpoints.state.evidence import _second as second

    found = second(view, name)
    assert found is not None
    return found


def test_a_block_that_joins_late_is_measured_from_its_first_step() -> None:
    """SOAP skips a tensor's first gradient: until its second it has not moved, and is left out."""
    net, batches = models.Net(seed=2, blocks=2, width=3, vocab=5), models.data(vocab=5)
    optimizer = published.SOAP(net.parameters(), lr=0.01, eps=1e-3, weight_decay=0.0, precondition_frequency=3)
    warmup = ArchitectureWarmup(net, optimizer, schedule(2, (0, [0]), (3, range(2)), mode="freeze"))
    tracker = CurvatureTracker(
        net,
        optimizer,
        models.loss,
        probe=batches,
        weights=models.weights(batches),
        tolerance=1e-4,
        max_hvps=80,
        warmup=warmup,
    )
    for step in range(5):
        warmup.step(step)
        models.train(net, optimizer, batches, steps=1)
        if step not in (0, 3, 4):
            continue
        record = tracker.step(step)
        assert record is not None
        if step == 0:
            assert record.status == "failed"
            continue
        found = metric(optimizer, net)
        own = {n for n in net.state_dict() if not n.startswith("layers.1.")}
        assert set(found.root) == (own if step < 4 else set(net.state_dict())) - set(found.left_out)
        assert all(n.startswith("layers.1.") for n in found.left_out)
        unit = torch.eye(found.root.space.size, dtype=torch.float64)
        root = torch.stack([found.root.flatten(found.root.apply(found.root.split(row))) for row in unit])
        truth = models.top(root @ models.dense_hessian(net, batches, list(found.root)) @ root)
        assert record.status == "converged", record.message
        assert record.eigenvalue == pytest.approx(truth, rel=1e-3)


def view(state: dict[str, Any] | None = None, shape: tuple[int, ...] = (3, 2), **options: Any) -> Any:
    base: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.1, "max_precond_dim": 9}
    entry = {
        "step": 5, "exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape), "Q": [torch.eye(n) for n in shape],
        "GG": [torch.eye(n) for n in shape], **(state or {}),
    }  # fmt: skip
    return prepare(
        OptimizerView((Group(("w",), {**base, **options}),), {"w": {k: v for k, v in entry.items() if v is not None}}),
        {"w": torch.ones(shape)},
    )


def test_without_a_class_name_it_is_known_by_its_state() -> None:
    found = view()
    assert (found.name, found.doubts) == ("SOAP", ())
    assert found.threshold == pytest.approx((2 / 1e-3 - 0.1) * 1.9 / 0.1)
    # m and v do not tell in which of two equal bases m is, and a direction that is guessed is none.
    assert found.direction is None
    assert view(max_precond_dim=None, max_precondition_dim=9).direction is not None


def test_a_step_that_only_made_the_basis_corrects_no_bias() -> None:
    """pytorch_optimizer counts it, in the group; the authors' file does not count it, and counts each tensor's."""
    ones = torch.ones(3, 2)
    group: dict[str, Any] = {"max_precond_dim": None, "max_precondition_dim": 9, "step": 6}
    theirs, own = view({"step": None}, **group), view()
    torch.testing.assert_close(theirs.root["w"].apply(ones), own.root["w"].apply(ones))
    p = (1 - 0.9**5) / (1 - 0.9**5) ** 0.5 * (1 + 1e-8) / (1 - 1e-4)
    torch.testing.assert_close(own.root["w"].solve(ones), ones / p)
    for bare in (view(correct_bias=False), view(bias_correction=False)):
        torch.testing.assert_close(bare.root["w"].solve(ones), ones * (1 - 1e-4) / (1 + 1e-8))


def test_a_direction_that_is_a_guess_is_none() -> None:
    torch.manual_seed(0)
    sides = [torch.linalg.qr(torch.randn(n, n))[0] for n in (30, 20)]
    v = torch.rand(30, 20)
    state = {"exp_avg": torch.randn(30, 20), "exp_avg_sq": v, "Q": sides, "GG": sides}
    assert view(state, shape=(30, 20)).direction is None
    assert view({**state, "exp_avg": v.sqrt()}, shape=(30, 20)).direction is not None


def test_moments_in_a_basis_of_their_own_are_not_held_to_bounds_of_one_that_stays(tmp_path: Path) -> None:
    """Q turns under v, which is not turned with it: m over its root has no bound, and parts of v are tiny."""
    v = torch.cat([torch.full((1, 30), 1e3), torch.full((29, 30), 1e-14)])
    state = {"step": 5, "exp_avg": torch.ones(30, 30), "exp_avg_sq": v, "Q": [torch.eye(30)] * 2, "GG": [torch.eye(30)] * 2}
    group = Group(("w",), {"lr": 1e-3, "betas": (0.9, 0.9)})
    assert state_findings(OptimizerView((group,), {"w": state}), 6, tmp_path) == []
    plain = {k: s for k, s in state.items() if k not in ("Q", "GG")}
    with pytest.raises(InputError, match="no gradients"):
        state_findings(OptimizerView((group,), {"w": plain}), 5, tmp_path)


@pytest.mark.parametrize(
    ("state", "options", "said", "error"),
    [
        ({}, {"normalize_grads": True}, "divides each tensor's update by its size", UnsupportedError),
        ({}, {"normalize_gradient": True}, "divides each tensor's update by its size", UnsupportedError),
        ({}, {"warmup_steps": 1}, "corrects its averages", UnsupportedError),
        ({"Q": [torch.eye(3), 2 * torch.eye(2)]}, {}, r"'Q_1' of shape \(2, 2\) is no orthogonal basis", InputError),
        ({}, {"amsgrad": True}, "amsgrad is on", UnsupportedError),
        ({"Q": [torch.eye(3), torch.ones(2)]}, {}, "no orthogonal basis .not square", InputError),
        ({"Q": [torch.eye(3), torch.ones(2, 3)]}, {}, "no orthogonal basis .not square", InputError),
        ({"Q": [torch.eye(3), torch.eye(2).int()]}, {}, "no orthogonal basis .not square", InputError),
        ({"Q": [torch.eye(3), torch.full((2, 2), float("nan"))]}, {}, "NaN or inf", InputError),
        ({"Q": [torch.eye(3), []]}, {}, "no basis 'Q_1'", InputError),
        ({"Q": [torch.eye(2), torch.eye(3)]}, {}, "another model", InputError),
        ({"Q": [torch.eye(3), torch.eye(2), torch.eye(2)]}, {}, "another model", InputError),
        ({"Q": [torch.eye(2)] * 9}, {}, "keeps no 'Q_8'", UnsupportedError),
        ({"exp_avg_sq": -torch.ones(3, 2)}, {}, "negative", InputError),
        ({"step": 0}, {}, "counts 0 steps", InputError),
        ({"exp_avg_sq": torch.zeros(3, 2)}, {}, "second moment of every weight is 0", InputError),
        ({}, {"lr": 1.0, "weight_decay": 1.5}, "takes more than the weight", UsageError),
        ({"GG": None, "Q": None, "scale_by_kl_soap_Q_0": torch.eye(3)}, {}, "variant of SOAP", UnsupportedError),
    ],
)
def test_what_changes_the_update_or_is_damaged_is_an_error(
    state: dict, options: dict, said: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=said):
        view(state, **options)


def test_merged_convolutions_are_refused() -> None:
    assert view(shape=(3, 2, 2, 1)).name == "SOAP"
    with pytest.raises(UnsupportedError, match="channels came first or last"):
        view(shape=(3, 2, 2, 1), merge_dims=True)


@pytest.mark.parametrize(
    ("shape", "sides", "found"),
    [
        ((3, 2), (3, 2), (3, 2)),
        ((30, 2), (None, 2), (30, 2)),
        ((3, 2, 4), (6, 4), (6, 4)),
        ((3, 2, 4), (24, None), (24, 1)),
        ((30, 2, 4), (None, 8), (30, 8)),
        ((30, 1, 4), (None, 1, 4), (30, 1, 4)),
        ((1, 3, 1), (3,), (3,)),
        ((7,), (None,), (7,)),
        ((), (), ()),
    ],
)
def test_sides_say_how_dimensions_were_merged(shape: tuple, sides: tuple, found: tuple) -> None:
    assert merged(shape, tuple(None if n is None else torch.eye(n) for n in sides)) == found


@pytest.mark.parametrize("options", [{}, {"precondition_1d": True}, {"max_precondition_dim": 4}, {"correct_bias": False}])
def test_the_packages_own_is_read_as_the_published_one(options: dict[str, Any]) -> None:
    """Where pytorch_optimizer is installed: it is in no extra of this project. It takes QR factors in float32."""
    kind = pytest.importorskip("pytorch_optimizer").SOAP
    generator = torch.Generator().manual_seed(0)
    nets = [
        nn.ParameterList([torch.linspace(-1, 1, 20).view(5, 4), torch.ones(6), torch.ones(3, 2, 6)]).double() for _ in "ab"
    ]
    ours = {("max_precond_dim" if k == "max_precondition_dim" else k): v for k, v in options.items()}
    common: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "precondition_frequency": 6}
    made = [kind(nets[0].parameters(), **common, **options), published.EarlySOAP(nets[1].parameters(), **common, **ours)]
    for _ in range(8):
        gradients = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in nets[0]]
        for net, optimizer in zip(nets, made, strict=True):
            for p, gradient in zip(net, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    theirs, mine = (metric(o, n) for o, n in zip(made, nets, strict=True))
    assert (theirs.doubts, theirs.threshold) == ((), pytest.approx(mine.threshold))
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(nets[0][i], nets[1][i], rtol=1e-6, atol=1e-8)
        # Bases that were rounded apart have the same P but for columns that have turned round.
        name = str(i)
        torch.testing.assert_close(
            theirs.root[name].apply(theirs.root[name].apply(gradient)),
            mine.root[name].apply(mine.root[name].apply(gradient)), rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        expected = mine.root[name].solve(made[1].state[nets[1][i]]["exp_avg"])
        torch.testing.assert_close(theirs.direction[name], expected, rtol=1e-4, atol=1e-5)
