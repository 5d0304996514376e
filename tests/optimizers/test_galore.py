"""GaLore's AdamW against its own steps: P in a subspace, thresholds and files, in which the projector is an object."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import galore
import models
import numpy as np
import pytest
import stepped
import tiny
import torch
from torch import Tensor, nn

import curvcli
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.state.mapping import AmbiguousStateError, map_state, single_order
from curvcli.errors import InputError, UnsupportedError
from curvcli.files.safe import load_pickle
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.training import CurvatureTracker


def trained(kind: str, ours: bool) -> tuple[models.Net, torch.optim.Optimizer, list]:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    net.layers[1].up = nn.Linear(4, 6, bias=False).double()  # a wide one and a tall one
    net.layers[1].down = nn.Linear(6, 4, bias=False).double()
    optimizer = galore.make(galore.groups(list(net.named_parameters()), kind), ours, lr=0.01, weight_decay=0.3, eps=1e-3)
    models.train(net, optimizer, batches, steps=5)
    return net, optimizer, batches


def answers(optimizer: torch.optim.Optimizer, net: nn.Module, h: float = 1e-6) -> tuple[Any, nn.Module, Tensor]:
    """As `stepped.answer`, and for a P of any form: minus the derivative of the step by the gradient, a dense matrix."""
    after, still, _ = stepped.answer(optimizer, net)
    parameters = list(net.parameters())
    blocks = [torch.zeros(p.numel(), p.numel(), dtype=p.dtype) for p in parameters]
    for k in range(max(p.numel() for p in parameters)):
        ends = []
        for sign in (1, -1):
            again, moved = copy.deepcopy((optimizer, net))
            for p in moved.parameters():
                p.grad = torch.zeros_like(p)
                if k < p.numel():
                    p.grad.view(-1)[k] = sign * h
            again.step()
            ends.append([p.detach() for p in moved.parameters()])
        for block, ahead, behind in zip(blocks, *ends, strict=True):
            if k < len(block):
                block[:, k] = (behind - ahead).reshape(-1) / (2 * h)
    return after, still, torch.block_diag(*blocks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", galore.KINDS)
@pytest.mark.parametrize("ours", [True, False])
def test_rho_is_that_of_the_optimizers_own_answer(kind: str, ours: bool) -> None:
    net, optimizer, batches = trained(kind, ours)
    after, still, inverse = answers(optimizer, net)
    # Of a gradient (1 - b) (1 - lr wd) lr / P comes through at once; the edge has the same (1 - lr wd).
    inverse = inverse / (1.9 * (2 - 0.01 * 0.3))
    hessian = models.dense_hessian(still, batches, [n for n, _ in still.named_parameters()])
    truth = float(torch.linalg.eigvals(hessian @ inverse).real.max())
    common: dict[str, Any] = {"weights": models.weights(batches), "tolerance": 1e-4}
    report = curvcli.analyze(still, models.loss, batches, after, **common)
    assert report.optimizer.name == "GaLoreAdamW"
    assert report.full.rho == pytest.approx(truth, rel=1e-5)
    assert report.update.ratio is not None
    said = {f.code: f.message for f in report.findings}
    assert "are projected away" in said["idle-entries"]
    assert "4 matrices move in" in said["projected-updates"]
    metric = prepare(live(after, dict(still.named_parameters())), dict(still.named_parameters()))
    assert metric.idle == len(inverse) - int(torch.linalg.matrix_rank(inverse, rtol=1e-7))
    tracker = CurvatureTracker(still, after, models.loss, probe=batches, max_hvps=80, **common)
    assert tracker.step(0).rho == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_the_optimizer_flips_at_the_threshold(ours: bool, factor: float) -> None:
    """On curvature that is P's own in the subspace and nothing outside, P being held still."""
    weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    options = {"rank": 2, "update_proj_gap": 10**15, "scale": 0.25, "proj_type": "std"}
    optimizer = galore.make(
        [{"params": [weight], **options}], ours, lr=0.1, betas=(0.9, 1 - 1e-9), eps=0.0, weight_decay=3.0
    )
    generator = torch.Generator().manual_seed(0)
    weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    optimizer.step()
    entry = optimizer.state[weight]
    entry["exp_avg"].zero_()
    entry["exp_avg_sq"].copy_(4e6 * (torch.rand(4, 2, generator=generator, dtype=torch.float64) + 0.5))
    entry["step"] = 10**11
    metric = prepare(live(optimizer, {"w": weight}), {"w": weight})
    root, edge = metric.root["w"], metric.threshold
    assert root.idle == 4
    start = 1e-6 * root.apply(torch.ones_like(weight)).detach()
    with torch.no_grad():
        weight.copy_(start)
    norms = []
    for _ in range(600):
        weight.grad = (
            factor * edge * root.invert(root.invert(weight)).detach()
        )  # H = factor T P, so P^(-1) H has one eigenvalue
        optimizer.step()
        norms.append(float(weight.detach().norm()))
    assert (max(norms) > 100 * float(start.norm())) == (factor > 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["save_optimizer", "Trainer's groups"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_file_is_measured_as_the_optimizer_in_memory(how: str, ours: bool, tmp_path: Path) -> None:
    model = tiny.build()
    named = list(model.named_parameters())
    chosen = galore.groups(named, "std", rank=4)
    optimizer = galore.make(chosen, ours, lr=0.01)
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(tiny.STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    if how == "save_optimizer":
        curvcli.save_optimizer(tmp_path, optimizer, model)
    else:
        galore.save(optimizer, tmp_path / "optimizer.pt")
    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    options = Options(
        data=tmp_path / "ids.npy", tokens=128, sequence_length=16, depths=False, device="cpu", mode="kept", tolerance=1e-3
    )
    report = analyze_checkpoint(tmp_path, options)
    assert report.optimizer.name == "GaLoreAdamW"
    assert report.full.rho > 0
    assert "unresolved-optimizer" not in {f.code for f in report.findings}
    parameters = dict(named)
    expected = prepare(live(optimizer, parameters), parameters)
    read = open_checkpoint(tmp_path)
    try:
        view = read.optimizer.view(read.model())
    except AmbiguousStateError as error:  # one assignment of shapes, which the analysis has looked at
        (view,) = error.views
    found = prepare(view, parameters)
    vector = torch.randn(expected.root.space.size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.root.lift(vector), expected.root.lift(vector), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.direction, expected.direction, rtol=1e-4, atol=1e-6)


class Record:
    """As a file's projector is read."""

    name = "galore_torch.galore_projector.GaLoreProjector"

    def __init__(self, **attributes: Any) -> None:
        right = torch.eye(3)[:2]
        self.attributes = {"ortho_matrix": right, "proj_type": "std", "scale": 0.25, "rank": 2, **attributes}


def view(projector: Any, low: tuple[int, ...] = (4, 2), **entry: Any) -> OptimizerView:
    state = {"step": 5, "exp_avg": torch.ones(low), "exp_avg_sq": torch.ones(low), "projector": projector, **entry}
    group = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True}
    group |= {"rank": 2, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return OptimizerView((Group(("w",), group),), {"w": state})


@pytest.mark.parametrize(
    ("attributes", "low", "said"),
    [
        ({"proj_type": "diagonal"}, (4, 2), "of type 'diagonal'"),
        ({"proj_type": ["std"]}, (4, 2), "of type"),
        ({"ortho_matrix": None}, (4, 2), "no matrix"),
        ({"ortho_matrix": "text"}, (4, 2), "no matrix"),
        ({"proj_type": "full"}, (4, 2), "no matrix"),
        ({"ortho_matrix": torch.ones(2, 3).long()}, (4, 2), "no matrix"),
        ({"ortho_matrix": torch.eye(3)}, (4, 2), "its moments"),
        ({"ortho_matrix": torch.eye(5)[:2]}, (4, 2), r"4 x 5 matrix, not \(4, 3\)"),
        ({"ortho_matrix": torch.ones(2, 3)}, (4, 2), "off orthonormal"),
        ({"ortho_matrix": torch.full((2, 3), float("nan"))}, (4, 2), "off orthonormal"),
        ({"scale": 0.0}, (4, 2), "scales by 0"),
        ({"scale": "much"}, (4, 2), "scales by much"),
        ({}, (8,), "no matrices"),
    ],
)
def test_a_damaged_projector_is_an_error(attributes: dict, low: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        prepare(view(Record(**attributes), low), {"w": torch.ones(4, 3)})


def test_a_second_moment_that_is_negative_or_missing_is_an_error() -> None:
    with pytest.raises(InputError, match="negative"):
        prepare(view(Record(), exp_avg_sq=-torch.ones(4, 2)), {"w": torch.ones(4, 3)})
    seen = view(Record())
    state = {k: v for k, v in seen.state["w"].items() if k != "projected_exp_avg_sq"}
    with pytest.raises(InputError, match="no 'exp_avg_sq'"):
        prepare(OptimizerView(seen.groups, {"w": state}, "GaLoreAdamW"), {"w": torch.ones(4, 3)})


def test_projectors_of_others_and_other_galores_are_refused() -> None:
    other = type("Other", (Record,), {"name": "pytorch_optimizer.optimizer.galore_utils.GaLoreProjector"})
    groups = view(Record()).groups
    factors = {"step": 3, "exp_avg_sq_row": torch.ones(4), "exp_avg_sq_col": torch.ones(2), "projector": Record()}
    adafactor = OptimizerView(groups, {"w": factors}), OptimizerView(groups, {}, "GaLoreAdafactor")
    for seen in (view(other()), *adafactor):
        with pytest.raises(UnsupportedError, match="GaLore, and not its AdamW"):
            prepare(seen, {"w": torch.ones(4, 3)})


def test_a_class_that_borrows_adams_name_is_told_by_its_module() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    for module, said in (("apollo_torch.apollo", "APOLLO"), ("c_adamw", "cautious")):
        kind = type("AdamW", (torch.optim.AdamW,), {"__module__": module})
        optimizer = kind([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        with pytest.raises(UnsupportedError, match=said):
            prepare(live(optimizer, {"w": weight}), {"w": weight})


def test_apollo_is_refused_with_the_reason_and_its_step_is_no_linear_map(tmp_path: Path) -> None:
    """By its options, in memory and from a file, whose projector is an object of the package."""
    module = galore.package("apollo_torch.apollo") or pytest.skip("apollo-torch is not installed")
    options = {
        "rank": 2,
        "update_proj_gap": 200,
        "scale": 1.0,
        "proj_type": "std",
        "proj": "random",
        "scale_type": "channel",
    }
    weight = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    optimizer = module.AdamW([{"params": [weight], **options}], lr=0.1, disable_nl=True)
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))

    def step(gradient: Tensor) -> Tensor:
        again, moved = copy.deepcopy((optimizer, weight))
        vars(again).update(scale_front=False, disable_nl=True)
        moved.grad = gradient
        again.step()
        return moved.detach() - 1

    weight.grad = one + two
    optimizer.step()
    with torch.no_grad():
        weight.fill_(1.0)
    entry = optimizer.state[weight]
    entry["exp_avg"].zero_()
    entry["exp_avg_sq"].fill_(1.0).mul_(torch.tensor([1.0, 100.0]))
    optimizer.param_groups[0]["betas"] = (0.9, 1 - 1e-12)  # the second moment stands still
    assert float((step(one) + step(two) - step(one + two)).norm() / step(one + two).norm()) > 0.1
    with pytest.raises(UnsupportedError, match="APOLLO: it scales gradients by a ratio of norms"):
        prepare(live(optimizer, {"w": weight}), {"w": weight})
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    document = load_pickle(tmp_path / "optimizer.pt")
    with pytest.raises(UnsupportedError, match="APOLLO"):
        map_state(document, nn.Linear(3, 4, bias=False), [single_order], path="x")
