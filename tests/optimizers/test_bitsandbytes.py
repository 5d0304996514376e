"""Moments in 8 bits as bitsandbytes stores them: by its source's definition, and by the package where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvcli
from curvcli.checkpoints.state.mapping import map_state, single_order
from curvcli.errors import CurvError, InputError, UnsupportedError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.bitsandbytes import dequantised
from curvcli.optimizers.preconditioner import live, prepare

NESTED = "__bnb_optimizer_quant_state__"
OPTIONS: dict[str, Any] = {
    "lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.0, "t_alpha": None, "t_beta3": None,
}  # fmt: skip


def dynamic(signed: bool) -> Tensor:
    """The 256 values of `create_dynamic_map`: in each of seven decades evenly spaced, twice as many as in that below."""
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        means = 10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2
        values += [*means.tolist(), *((-means).tolist() if signed else [])]
    return torch.tensor(sorted(values))


def quantised(tensor: Tensor, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes, and the largest magnitude of each block; block by block, entry by entry."""
    codes, scales = [], []
    for block in tensor.reshape(-1).split(size):
        scales.append(block.abs().max())
        codes.append((block[:, None] / scales[-1].clamp_min(1e-38) - values).abs().argmin(dim=1))
    return torch.cat(codes).to(torch.uint8).view(tensor.shape), torch.stack(scales)


def entry(m: Tensor, v: Tensor, size: int = 256) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for number, moment, signed in ((1, m, True), (2, v, False)):
        values = dynamic(signed)
        found[f"qmap{number}"] = values
        codes, scales = zip(
            *(quantised(part, values, size) for part in (moment if moment.dim() > 2 else [moment])), strict=True
        )
        stacked = moment.dim() > 2
        found[f"state{number}"] = torch.stack(codes) if stacked else codes[0]
        found[f"absmax{number}"] = torch.stack(scales) if stacked else scales[0]
    return found


def test_the_values_are_256() -> None:
    assert all(len(dynamic(signed)) == 256 == len(dynamic(signed).unique()) for signed in (True, False))


@pytest.mark.parametrize("size", [256, 2048])
def test_numbers_come_back_to_half_a_step(size: int) -> None:
    tensor = torch.randn(67, 71, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 67)[:, None]
    codes, scales = quantised(tensor, dynamic(True), size)
    assert len(scales) == -(-tensor.numel() // size)
    found = dequantised(codes, dynamic(True), scales)
    by_hand = torch.cat([dynamic(True)[c.long()] * s for c, s in zip(codes.reshape(-1).split(size), scales, strict=True)])
    assert torch.equal(found.reshape(-1), by_hand)
    off = (found - tensor).abs().reshape(-1) / scales.repeat_interleave(size)[: tensor.numel()]
    assert float(off.max()) < 0.9 / 64 / 2 + 1e-6


@pytest.mark.parametrize(
    ("codes", "values", "scales"),
    [
        (torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(256), torch.ones(3)),
        (torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(17), torch.ones(16)),
        (torch.zeros(64, 64, dtype=torch.int32), torch.zeros(256), torch.ones(16)),
    ],
)
def test_what_is_damaged_is_an_error(codes: Tensor, values: Tensor, scales: Tensor) -> None:
    with pytest.raises(InputError, match="quantised moment has 4096 entries"):
        dequantised(codes, values, scales)


class Pair(nn.Module):
    """A matrix that is quantised and a vector that is too small to be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(64, 72)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).tanh()


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def trained() -> tuple[Pair, torch.optim.AdamW, list[Tensor]]:
    model, batches = Pair(), list(torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(12):
        optimizer.zero_grad()
        loss(model, batches[step % 4]).backward()
        optimizer.step()
    return model, optimizer, batches


@pytest.mark.parametrize("layout", ["nested", "flat", "distributed"])
@pytest.mark.parametrize("three", [False, True])
def test_a_file_is_measured_as_the_float32_one_to_its_rounding(layout: str, three: bool) -> None:
    """Adam's, and AdEMAMix' whose two averages lie on top of each other."""
    model, optimizer, batches = trained()
    options, state = OPTIONS, {}
    if three:
        options = {**OPTIONS, "betas": (0.9, 0.99, 0.999), "alpha": 5.0}
    for index, p in enumerate(model.parameters()):
        s = optimizer.state[p]
        m = torch.stack([s["exp_avg"], s["exp_avg"] / 3]) if three else s["exp_avg"]
        inner = entry(m, s["exp_avg_sq"]) if p.numel() >= 4096 else {"state1": m, "state2": s["exp_avg_sq"]}
        kept = {"nested": {NESTED: inner}, "flat": inner, "distributed": {f"{NESTED}.{k}": v for k, v in inner.items()}}
        state[index] = {"step": 12, **kept[layout]}
    view = map_state(
        {"state": state, "param_groups": [{**options, "params": [0, 1]}]}, model, [single_order], path="optimizer.pt"
    )
    parameters = dict(model.named_parameters())
    whole = {n: dict(optimizer.state[p]) for n, p in parameters.items()}
    if three:
        whole = {n: {**s, "exp_avg_slow": s["exp_avg"] / 3} for n, s in whole.items()}
    exact = OptimizerView((Group(tuple(parameters), options),), whole)
    found, expected = (curvcli.analyze(model, loss, batches, v, depths=False, tolerance=1e-4) for v in (view, exact))
    assert found.optimizer.name == ("AdEMAMix" if three else "AdamW")
    assert found.optimizer.threshold == pytest.approx(expected.optimizer.threshold)
    assert found.full.rho == pytest.approx(expected.full.rho, rel=0.02)
    assert found.full.rho != expected.full.rho
    assert found.update.ratio == pytest.approx(expected.update.ratio, rel=0.05)
    assert "quantised-moments" in {f.code for f in found.findings}
    assert "quantised-moments" not in {f.code for f in expected.findings}
    # What is not quantised is as it was, to the bit.
    metrics = [prepare(v, parameters) for v in (view, exact)]
    one = torch.ones(72)
    assert torch.equal(*(metric.root["up.bias"].apply(one) for metric in metrics))


def test_what_is_too_small_for_8_bits_is_counted_and_left_out() -> None:
    m, v = torch.ones(64, 64), torch.ones(64, 64)
    v[3, :5] = 1e-9
    state = {"w": {"step": 9, **entry(m, v)}}
    metric = prepare(OptimizerView((Group(("w",), OPTIONS),), state), {"w": torch.ones(64, 64)})
    assert metric.idle == 5
    (finding,) = (f for f in metric.findings if f.code == "quantised-moments")
    assert finding.severity == "warning"
    assert "4,096 second moments" in finding.message
    assert " 5 of them" in finding.message


@pytest.mark.parametrize("missing", ["qmap2", "absmax2", "state2"])
def test_incomplete_state_is_refused(missing: str) -> None:
    kept = entry(torch.ones(64, 64), torch.ones(64, 64))
    del kept[missing]
    with pytest.raises(UnsupportedError, match="8-bit"):
        prepare(OptimizerView((Group(("w",), OPTIONS),), {"w": {"step": 9, **kept}}), {"w": torch.ones(64, 64)})


def test_averages_that_are_not_two_are_an_error() -> None:
    options = {**OPTIONS, "betas": (0.9, 0.99, 0.999), "alpha": 5.0}
    state = {"w": {"step": 9, "state1": torch.ones(3, 4, 4), "state2": torch.ones(4, 4)}}
    with pytest.raises(InputError, match="not two averages"):
        prepare(OptimizerView((Group(("w",), options),), state), {"w": torch.ones(4, 4)})


@pytest.mark.parametrize("key", ["qmap1", "absmax1", "state1", "qmap2", "absmax2", "state2"])
@pytest.mark.parametrize("value", [None, "x", torch.ones(7), torch.zeros(7, dtype=torch.uint8), float("nan")], ids=str)
def test_damaged_state_is_an_error_of_ours(key: str, value: object) -> None:
    kept = {**entry(torch.ones(64, 64), torch.ones(64, 64)), key: value}
    with pytest.raises(CurvError):
        prepare(OptimizerView((Group(("w",), OPTIONS),), {"w": {"step": 9, **kept}}), {"w": torch.ones(64, 64)})


@pytest.mark.parametrize("kind", ["Adam8bit", "AdEMAMix8bit"])
def test_the_packages_own_state_holds_the_moments_of_its_gradients(kind: str, tmp_path: Path) -> None:
    """Where it is installed: it is in no extra of this project. v is averaged beside it, on the very same gradients."""
    package = pytest.importorskip("bitsandbytes")
    model, batches = Pair(), list(torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(1)))
    optimizer = getattr(package.optim, kind)(model.parameters(), lr=3e-3, eps=1e-8)
    square = torch.zeros_like(model.up.weight)
    for step in range(40):
        optimizer.zero_grad()
        loss(model, batches[step % 4]).backward()
        assert model.up.weight.grad is not None
        square.mul_(0.999).addcmul_(model.up.weight.grad, model.up.weight.grad, value=0.001)
        optimizer.step()
    parameters = dict(model.named_parameters())
    saved = optimizer.state_dict()
    view = map_state(saved, model, [single_order], path="optimizer.pt")
    for seen in (view, live(optimizer, parameters)):
        found = seen.state["up.weight"]["exp_avg_sq"]
        assert float((found / square).log().abs().median()) < 0.03
    exact = {n: dict(view.state[n]) for n in parameters}
    exact["up.weight"]["exp_avg_sq"] = square
    right = curvcli.analyze(model, loss, batches, OptimizerView(view.groups, exact), depths=False, tolerance=1e-4)
    found_rho = curvcli.analyze(model, loss, batches, optimizer, depths=False, tolerance=1e-4).full.rho
    assert found_rho == pytest.approx(right.full.rho, rel=0.03)
