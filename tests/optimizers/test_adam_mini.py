"""Adam-mini against its authors' package: its own steps, thresholds and files, and pytorch_optimizer's layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from curvcli.errors import InputError, UsageError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.training import CurvatureTracker

adam_mini = pytest.importorskip("adam_mini")


class Attention(models.Block):
    """A block whose matrices are called as those of which Adam-mini takes heads and rows."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.q_proj, self.mlp = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(torch.tanh(self.q_proj(super().forward(x))))


def make(named: Iterable[tuple[str, Tensor]], lr: float = 0.01, **options: Any) -> torch.optim.Optimizer:
    return adam_mini.Adam_mini(named, lr=lr, dim=4, n_heads=2, verbose=False, **options)


def trained() -> tuple[models.Net, torch.optim.Optimizer, list]:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    net.layers[1] = Attention(4).double()
    optimizer = make(net.named_parameters(), eps=1e-3, weight_decay=0.3)
    models.train(net, optimizer, batches, steps=5)
    return net, optimizer, batches


@pytest.mark.slow
def test_rho_is_that_of_the_optimizers_own_answer() -> None:
    net, optimizer, batches = trained()
    after, still, parts = stepped.answer(optimizer, net)
    kinds = {tuple(sorted(k for k in entry if k not in ("m", "step"))) for entry in after.state.values()}
    assert len(kinds) == 4  # heads, rows, whole tensors and Adam's biases
    # Of a gradient (1 - b) lr / P comes through at once; the edge of lambda is (2/lr - wd)(1 + b)/(1 - b).
    decays = {n: g["weight_decay"] for (n, _), g in zip(still.named_parameters(), after.param_groups, strict=True)}
    scale = stepped.scale({n: part / (1.9 * (2 - 0.01 * decays[n])) for n, part in parts.items()})
    hessian = models.dense_hessian(still, batches, [n for n, _ in still.named_parameters()])
    truth = models.top(scale[:, None] * hessian * scale)
    common: dict[str, Any] = {"weights": models.weights(batches), "tolerance": 1e-4}
    report = curvcli.analyze(still, models.loss, batches, after, **common)
    assert report.optimizer.name == "AdamMini"
    assert report.full.rho == pytest.approx(truth, rel=1e-5)
    assert report.update.ratio is not None
    tracker = CurvatureTracker(still, after, models.loss, probe=batches, max_hvps=80, **common)
    assert tracker.step(0).rho == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("q_proj.weight", 3.0),
        *(pytest.param(n, d, marks=pytest.mark.slow) for n in ("mlp.weight", "norm.weight", "bias") for d in (0.0, 3.0)),
    ],
)
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_the_package_flips_at_the_threshold(name: str, decay: float, factor: float) -> None:
    """P is held still by a second moment so large, and a beta2 so near 1, that gradients do not move it."""
    weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizer = make([(name, weight)], lr=0.1, betas=(0.9, 1 - 1e-9), eps=0.0, weight_decay=decay)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    entry = optimizer.state[weight]
    generator = torch.Generator().manual_seed(0)
    key = "v" if "v" in entry else "vmean"
    entry[key] = 4e6 * (torch.rand(entry[key].shape, generator=generator, dtype=torch.float64) + 0.5)
    entry["step"] = 10**11
    metric = prepare(live(optimizer, {"w": weight}), {"w": weight})
    p = metric.root["w"].apply(torch.ones_like(weight)).detach() ** -2
    assert stepped.grows(optimizer, weight, factor * metric.threshold * p, steps=600) == (factor > 1)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_a_file_is_measured_as_the_optimizer_in_memory(named: bool, tmp_path: Path) -> None:
    """Without our names too, by those in its groups, which are in lower case."""
    model = tiny.build()
    optimizer = adam_mini.Adam_mini(model.named_parameters(), lr=0.01, dim=16, n_heads=2, verbose=False)
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
    assert report.optimizer.name == "AdamMini"
    assert report.optimizer.step == tiny.STEPS
    assert not [f for f in report.findings if f.code == "unresolved-optimizer"]
    assert report.full.rho > 0
    parameters = dict(model.named_parameters())
    expected = prepare(live(optimizer, parameters), parameters)
    read = open_checkpoint(tmp_path)
    found = prepare(read.optimizer.view(read.model()), parameters)
    vector = torch.randn(expected.root.space.size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.root.lift(vector), expected.root.lift(vector))
    torch.testing.assert_close(found.direction, expected.direction)
    # Rows of tokens that never came are left out, as with Adam.
    never = {int(i) for i in range(64)} - set(ids.flatten().tolist())
    assert expected.idle >= 16 * len(never) > 0
    with pytest.raises(UsageError, match="has no momentum"):
        analyze_checkpoint(tmp_path, Options(**{**vars(options), "momentum": 0.9}))


def view(options: dict[str, Any], **entry: Any) -> OptimizerView:
    state = {"step": 5, "m": torch.ones(2, 6), "vmean": torch.tensor([[4.0], [9.0]]), **entry}
    group = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 0.0, "weight_decay": 0.0, "name": "w", **options}
    group, state = ({k: v for k, v in each.items() if v is not None} for each in (group, state))
    return OptimizerView((Group(("w",), group),), {"w": state})


@pytest.mark.parametrize(
    ("shape", "mean", "expected"),
    [
        ((2, 6), torch.tensor([2.0, 3.0]), [2.0] * 6 + [3.0] * 6),  # a head each
        ((2, 2, 3), torch.tensor([[2.0, 3.0], [4.0, 5.0]]), [2.0] * 3 + [3.0] * 3 + [4.0] * 3 + [5.0] * 3),  # query groups
        ((4, 3), torch.tensor(2.0), [2.0] * 12),
    ],
)
def test_the_layout_of_pytorch_optimizer(shape: tuple[int, ...], mean: Tensor, expected: list[float]) -> None:
    """Counts of steps and betas in the group, `v_mean` without the blocks' inner dimensions."""
    options = {"beta1": None, "beta2": None, "betas": (0.9, 0.99), "step": 7, "parameter_per_head": 6}
    seen = view(options, step=None, vmean=None, m=torch.ones(shape), v_mean=mean**2, dimension=torch.tensor(12.0))
    metric = prepare(seen, {"w": torch.ones(4, 3)})
    assert metric.doubts == ()
    p = metric.root["w"].apply(torch.ones(4, 3)) ** -2
    want = torch.tensor(expected).view(4, 3) / (1 - 0.99**7) ** 0.5 * (1 - 0.9**7)
    torch.testing.assert_close(p, want)


@pytest.mark.parametrize(
    ("options", "entry", "said"),
    [
        ({"beta1": 1.5}, {}, "beta1"),
        ({"beta2": None}, {}, "'beta2' is missing"),
        ({}, {"step": None}, "no 'step'"),
        ({}, {"step": 0}, "counts 0 steps"),
        ({}, {"vmean": None, "v_mean": torch.ones(3)}, "in blocks of"),
        ({}, {"m": torch.ones(2, 5)}, "in blocks of"),
        ({}, {"vmean": torch.tensor([[-1.0], [1.0]])}, "negative"),
        ({}, {"vmean": torch.tensor([[float("nan")], [1.0]])}, "NaN"),
        ({}, {"v": torch.ones(3)}, "has shape"),
    ],
)
def test_what_is_missing_or_damaged_is_an_error(options: dict, entry: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        prepare(view(options, **entry), {"w": torch.ones(4, 3)})


def test_a_tensor_that_never_had_a_gradient_is_left_out() -> None:
    both = view({})
    still = {"step": 0, "m": torch.zeros(4, 3), "vmean": torch.tensor(0.0), "block_numel": 12.0, "reduced": False}
    groups = (*both.groups, Group(("b",), {**both.groups[0].options, "name": "b"}))
    metric = prepare(OptimizerView(groups, {**both.state, "b": still}), {"w": torch.ones(4, 3), "b": torch.ones(4, 3)})
    assert metric.left_out == ("b",)
