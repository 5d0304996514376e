"""torch-optimi's Adam and AdamW against torch's: the same steps, from averages that are corrected as they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curvcli.errors import InputError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import Preconditioner, prepare

STEPS, BETAS = 7, (0.9, 0.95)


def both(**options: Any) -> tuple[OptimizerView, OptimizerView, dict[str, Tensor]]:
    """What torch's AdamW keeps after a few steps, and torch-optimi's of the same gradients, by its release 0.3.3.

    There the betas at step t are b (1 - b^(t-1)) / (1 - b^t), and the step has no correction (optimi/adam.py).
    """
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    torch_s = torch.optim.AdamW([weight], lr=1e-2, betas=BETAS, eps=1e-8, weight_decay=0.1)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in range(1, STEPS + 1):
        weight.grad = torch.randn_like(weight)
        first, second = ((b**t - b) / (b**t - 1) for b in BETAS)
        mean = first * mean + (1 - first) * weight.grad
        square = second * square + (1 - second) * weight.grad.square()
        torch_s.step()
    group = {
        "lr": 1e-2, "beta1": BETAS[0], "beta2": BETAS[1], "eps": 1e-8, "weight_decay": 0.1, "decouple_wd": True,
        "decouple_lr": False, "max_lr": None, "kahan_sum": None, "foreach": None, "triton": False,
        "gradient_release": False, "setup": True, "step": torch.tensor(STEPS, dtype=torch.int32), **options,
    }  # fmt: skip
    known = {k: v for k, v in torch_s.param_groups[0].items() if k != "params"}
    return (
        OptimizerView((Group(("w",), known),), {"w": dict(torch_s.state[weight])}),
        OptimizerView((Group(("w",), group),), {"w": {"exp_avg": mean, "exp_avg_sq": square, "kahan_comp": None}}),
        {"w": weight.detach()},
    )


def same(found: Preconditioner, expected: Preconditioner) -> None:
    assert (found.name, found.doubts) == (expected.name, ())
    assert found.threshold == pytest.approx(expected.threshold)
    one = torch.ones(4, 3, dtype=torch.float64)
    torch.testing.assert_close(found.root["w"].solve(one), expected.root["w"].solve(one))
    torch.testing.assert_close(found.direction["w"], expected.direction["w"])


@pytest.mark.parametrize("compensation", [None, torch.zeros(1, dtype=torch.uint8)])
def test_its_adamw_is_torchs(compensation: Tensor | None) -> None:
    expected, found, weights = both()
    found.state["w"]._entry["kahan_comp"] = compensation  # type: ignore[attr-defined]
    same(prepare(found, weights), prepare(expected, weights))
    assert [f.code for f in found.findings] == ["class-assumed"]
    # A file's views are made anew with what the user says.
    again = OptimizerView(found.groups, found.state, "AdamW", vouched=True)
    same(prepare(again, weights), prepare(expected, weights))


def test_decay_that_does_not_go_with_the_learning_rate_goes_with_its_share_of_the_largest() -> None:
    expected, found, weights = both(decouple_lr=True, weight_decay=2e-3, max_lr=2e-2)
    same(prepare(found, weights), prepare(expected, weights))


def test_its_adam_in_memory_is_torchs_adam() -> None:
    _, found, weights = both()
    options = {"lr": 1e-2, "beta1": BETAS[0], "beta2": BETAS[1], "eps": 1e-8, "weight_decay": 0.1, "decouple_wd": False}
    options |= {"decouple_lr": False, "gradient_release": False, "step": STEPS}
    view = OptimizerView((Group(("w",), options),), {"w": dict(found.state["w"]._entry)}, "Adam")  # type: ignore[attr-defined]
    assert prepare(view, weights).decay == {"w": 0.1}
    assert view.findings == ()


@pytest.mark.parametrize("step", [None, "seven", 0])
def test_without_its_steps_it_is_an_error(step: object) -> None:
    _, found, weights = both(step=step)
    with pytest.raises(InputError, match="steps"):
        prepare(found, weights)
