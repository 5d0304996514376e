"""Lion and Muon: balls against the real optimizers' own steps, where Z settles when they run, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from normalised import Lion, MuonWithAuxAdam, split
from torch import Tensor, nn

from curvcli.curvature.steepest import FrankWolfe, distance
from curvcli.errors import InputError, UnsupportedError, UsageError
from curvcli.optimizers.adam import Adam
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.muon import Muon
from curvcli.optimizers.preconditioner import live, prepare


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_of(make: Callable[[nn.Parameter], torch.optim.Optimizer], shape: tuple[int, ...]) -> tuple[Any, Tensor, Tensor]:
    """What is prepared of an optimizer that has made a step, the gradient, and the step over the learning rate."""
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = make(weight)
    weight.grad = drawn(*shape)
    optimizer.step()
    found = prepare(live(optimizer, {"w": weight}), {"w": weight})
    return found, weight.grad, -weight.detach() / optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (12, 12)])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_the_ball_has_the_length_of_torchs_own_step(shape: tuple[int, int], adjust: str | None) -> None:
    """Its five steps of Newton-Schulz leave singular values between 0.7 and 1.2: the length tells the radius."""
    found, gradient, step = step_of(lambda p: torch.optim.Muon([p], lr=0.1, adjust_lr_fn=adjust), shape)
    (ball,) = found.balls.values()
    ideal = ball.steepest(gradient)
    assert float((step * ideal).sum() / (step.norm() * ideal.norm())) > 0.97
    assert 0.75 < float(step.norm() / ideal.norm()) < 1.2
    assert (found.name, found.threshold, found.lr, found.ball_lr, len(found.root)) == ("Muon", None, 0.1, 0.1, 0)
    assert [f.code for f in found.findings] == []


def test_the_balls_of_the_authors_muon_and_lion_are_their_steps() -> None:
    found, gradient, step = step_of(lambda p: MuonWithAuxAdam([p], []), (9, 4))
    torch.testing.assert_close(found.balls["w"].steepest(gradient), step)
    torch.testing.assert_close(found.direction["w"], step)
    assert [f.code for f in found.findings] == ["muon-scale"]
    found, gradient, step = step_of(lambda p: Lion([p], lr=0.1, weight_decay=3.0), (9, 4))
    torch.testing.assert_close(found.balls["w"].steepest(gradient), step)
    assert (found.name, found.decay, found.threshold) == ("Lion", {}, None)


def test_moonlight_keeps_all_in_one_group() -> None:
    """github.com/MoonshotAI/Moonlight: a flag in each parameter's state, moments by number, 0.2 sqrt(max(A, B))."""
    options = {
        "lr": 0.02, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "adamw_betas": (0.9, 0.95),
        "adamw_eps": 1e-8,
    }  # fmt: skip
    state: dict[str, Any] = {
        "w": {"use_muon": True, "momentum_buffer": drawn(9, 4)},
        "b": {"use_muon": False, "step": 3, "moment1": drawn(4), "moment2": drawn(4).square()},
    }
    parameters = {"w": torch.zeros(9, 4), "b": torch.zeros(4)}
    found = prepare(OptimizerView((Group(("w", "b"), options),), state), parameters)
    assert (found.name, found.balls["w"].radius, list(found.root)) == ("Muon with AdamW", pytest.approx(0.6), ["b"])
    # Its AdamW adds eps before it corrects: p -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps).
    first, second = 1 - 0.9**3, 1 - 0.95**3
    expected = state["b"]["moment1"] * second**0.5 / first / (state["b"]["moment2"].sqrt() + 1e-8)
    assert found.direction is not None
    torch.testing.assert_close(found.direction["b"], expected.float())
    assert found.threshold == pytest.approx((2 / 0.02 - 0.1) * 1.9 / 0.1)


def test_groups_learning_rates_are_in_the_radii_and_a_frozen_group_is_left_out() -> None:
    a, b, c = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "lr": 0.3}, {"params": [c], "lr": 0.0}]
    optimizer = Lion(groups, lr=0.1)
    for p in (a, b, c):
        p.grad = torch.ones(4)
    optimizer.step()
    found = prepare(live(optimizer, {"a": a, "b": b, "c": c}), {"a": a, "b": b, "c": c})
    assert {n: ball.radius for n, ball in found.balls.items()} == {"a": 1.0, "b": pytest.approx(3.0)}
    assert found.moving == {"a", "b"}
    assert set(found.without({"b"}).balls) == {"a"}
    with pytest.raises(ValueError, match="at least one"):
        found.without({"a", "b"})
    optimizer.param_groups[1]["lr"] = -0.1
    with pytest.raises(UsageError, match=r"learning rate of a parameter group is -0\.1"):
        prepare(live(optimizer, {"a": a, "b": b, "c": c}), {"a": a, "b": b, "c": c})


def settled(make: Callable[[nn.Parameter], torch.optim.Optimizer], steps: int = 1500) -> float:
    """Median Z over the last third of a run on a convex quadratic, tr(W' A W B) / 2, full gradients."""
    a, b = (m @ m.T / len(m) for m in (drawn(8, 8, seed=1), drawn(5, 5, seed=2)))
    weight = nn.Parameter(drawn(8, 5, seed=3))
    optimizer = make(weight)
    values, lr, sharpness = [], optimizer.param_groups[0]["lr"], 0.0
    for step in range(steps):
        weight.grad = a @ weight.detach() @ b
        optimizer.step()
        if not sharpness:
            (ball,) = prepare(live(optimizer, {"w": weight}), {"w": weight}).balls.values()
            starts = {str(seed): [drawn(8, 5, seed=seed)] for seed in range(4, 10)}
            sharpness = FrankWolfe(1e-6, 400).sharpest(lambda d: [a @ d[0] @ b], [ball], starts).value or 0.0
        if step > 2 * steps // 3:
            values.append(distance(lr, sharpness, ball.dual(weight.grad)) or 0.0)
    return float(torch.tensor(values).median())


@pytest.mark.parametrize(
    ("make", "low", "high"),
    [
        (lambda p: Lion([p], lr=1e-2, betas=(0.0, 0.99)), 0.8, 1.2),
        (lambda p: Lion([p], lr=1e-2, betas=(0.9, 0.99)), 0.3, 1.4),
        (lambda p: torch.optim.Muon([p], lr=1e-2, momentum=0.0, nesterov=False, weight_decay=0.0), 1.0, 1.4),
        (lambda p: torch.optim.Muon([p], lr=1e-2, weight_decay=0.0), 0.8, 1.4),
        (lambda p: torch.optim.Muon([p], lr=1e-2, nesterov=False, weight_decay=0.0), 0.6, 1.2),
    ],
    ids=["sign descent", "Lion", "no momentum", "Nesterov", "heavy ball"],
)
def test_where_the_real_optimizers_settle(make: Callable, low: float, high: float) -> None:
    """At Z about 1 without momentum, and with it near there too: not at (1 + b)/(1 - b) = 39 times it."""
    assert low < settled(make) < high


def test_a_hybrid_is_both_adam_for_the_rest_and_balls_for_matrices() -> None:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    matrices, others = split(net)
    optimizer = MuonWithAuxAdam(matrices, others, lr=0.02, rest_lr=3e-3)
    models.train(net, optimizer, batches, steps=5)
    parameters = dict(net.named_parameters())
    found = prepare(live(optimizer, parameters), parameters)
    inside = {n for n, p in parameters.items() if any(p is m for m in matrices)}
    assert (set(found.balls), set(found.root)) == (inside, set(parameters) - inside)
    assert found.threshold == pytest.approx(2 / 3e-3 * 1.9 / 0.1)
    assert found.direction is not None
    # One learning rate is quoted, the largest group's; the direction of the others is over it.
    assert (found.lr, found.ball_lr, found.name) == (3e-3, 0.02, "Muon with AdamW")
    expected = found.balls[min(inside)].steepest(optimizer.state[parameters[min(inside)]]["momentum_buffer"]) * 0.02 / 3e-3
    torch.testing.assert_close(found.direction[min(inside)], expected)


def test_two_optimizers_in_memory_are_one_where_they_are_muon_and_adam() -> None:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    matrices, others = split(net)
    pair = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3)]
    for optimizer in pair:
        models.train(net, optimizer, batches, steps=2)
    parameters = dict(net.named_parameters())
    view = live(pair, parameters)
    assert view.vouched
    found = prepare(view, parameters)
    assert (found.name, len(found.balls), found.moving) == ("Muon with AdamW", 4, set(parameters))
    assert live(pair[1:], parameters).name == "AdamW"
    with pytest.raises(UnsupportedError, match=r"2 optimizers \(Muon, SGD\)"):
        live([pair[0], torch.optim.SGD(others)], parameters)
    with pytest.raises(UsageError, match="empty list"):
        live([], parameters)


MUON = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
ONE = {"momentum_buffer": torch.ones(3, 2)}


@pytest.mark.parametrize(
    ("options", "state", "name", "error", "said"),
    [
        ({**MUON, "use_muon": True, "adjust_lr_fn": "other"}, ONE, None, UnsupportedError, "adjust_lr_fn is 'other'"),
        ({**MUON, "use_muon": True}, {"momentum_buffer": torch.ones(3)}, None, InputError, "shape"),
        ({**MUON, "use_muon": True}, {"exp_avg": torch.ones(3, 2), "exp_avg_sq": torch.ones(3, 2)}, None,
         UnsupportedError, "it orthogonalises the update"),
        ({**MUON, "use_muon": True}, {"exp_avg": torch.ones(3, 2), "exp_avg_sq": torch.ones(3, 2)}, "Muon", InputError,
         "no 'momentum_buffer'"),
        ({**MUON, "use_muon": True, "mystery": 1}, {**ONE, "mystery": torch.ones(3, 2)}, None, UnsupportedError, "mystery"),
        ({**MUON, "use_muon": "perhaps"}, ONE, None, InputError, "use_muon"),
        (MUON, ONE, None, UnsupportedError, "no rule for optimizer of unknown name"),
        ({**MUON, "algorithm": "muon"}, {"momentum": torch.ones(3, 2), "variance": torch.ones(3, 2)}, None, UnsupportedError,
         "a variant of Muon"),
        (MUON, ONE, "AdaMuon", UnsupportedError, "a variant of Muon"),
        ({"lr": 0.1, "betas": (0.9, 0.99), "cautious_factor": 0.0}, {"exp_avg": torch.ones(3, 2)}, None, UnsupportedError,
         "cautious_factor is 0"),
        ({"lr": 0.1, "betas": (0.9, 0.99)}, {"exp_avg": torch.full((3, 2), float("nan"))}, None, InputError, "NaN"),
        ({"lr": 0.1, "betas": (0.9, 0.99)}, {}, "Lion", UnsupportedError, "Lion has no state yet"),
        ({"lr": 0.1}, {"exp_avg": torch.ones(3, 2)}, None, UnsupportedError, "no rule"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(options: dict, state: dict, name: str | None, error: type, said: str) -> None:
    view = OptimizerView((Group(("w",), options),), {"w": state} if state else {}, name)
    with pytest.raises(error, match=said):
        prepare(view, {"w": torch.zeros(3, 2)})


def test_a_vector_is_no_matrix() -> None:
    view = OptimizerView((Group(("w",), {**MUON, "use_muon": True}),), {"w": {"momentum_buffer": torch.ones(3)}})
    with pytest.raises(InputError, match=r"moves a parameter of shape \(3,\), which is no matrix"):
        prepare(view, {"w": torch.zeros(3)})


def test_variants_of_muon_are_marked_and_a_momentum_of_sgds_is_no_part_of_it() -> None:
    view = OptimizerView((Group(("w",), MUON),), {"w": {**ONE, "second_momentum_buffer": torch.ones(3, 1)}}, "NorMuon")
    assert [f.code for f in prepare(view, {"w": torch.zeros(3, 2)}).findings] == ["muon-scale", "muon-variant"]
    sgd = Group(("v",), {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": False})
    both = OptimizerView((Group(("w",), {**MUON, "ns_steps": 5}), sgd), {"w": ONE, "v": {"momentum_buffer": torch.ones(2)}})
    with pytest.raises(InputError, match="v has no 'exp_avg'"):
        prepare(both, {"w": torch.zeros(3, 2), "v": torch.zeros(2)})
    assert Muon().needed(sgd, {}) == Adam.state


class MuonAdamW(torch.optim.Optimizer):
    """State as nanochat's MuonAdamW lays it out: of all matrices of a group on top of each other, with the first."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter]) -> None:
        muon = {
            "params": matrices,
            "kind": "muon",
            "lr": 0.02,
            "momentum": 0.95,
            "ns_steps": 5,
            "beta2": 0.9,
            "weight_decay": 0.0,
        }
        adam = {"params": others, "kind": "adamw", "lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        super().__init__([adam, muon], {})
        for place, p in enumerate(others):
            self.state[p] = {"step": 3, "exp_avg": drawn(*p.shape, seed=place), "exp_avg_sq": drawn(*p.shape).square() + 1}
        count, (rows, columns) = len(matrices), matrices[0].shape
        self.state[matrices[0]] = {
            "momentum_buffer": drawn(count, rows, columns, seed=9), "second_momentum_buffer": torch.ones(count, rows, 1)
        }  # fmt: skip

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


def test_state_on_top_of_each_other_is_taken_apart() -> None:
    net = models.Net(seed=2, blocks=2, width=4)
    matrices, others = split(net)
    parameters = dict(net.named_parameters())
    optimizer = MuonAdamW(matrices, others)
    found = prepare(live(optimizer, parameters), parameters)
    assert (len(found.balls), found.doubts, found.moving) == (len(matrices), (), set(parameters))
    assert [f.code for f in found.findings] == ["muon-scale", "muon-variant"]
    assert found.direction is not None
    buffer = optimizer.state[matrices[0]]["momentum_buffer"]
    for place, matrix in enumerate(matrices):
        name = next(n for n, p in parameters.items() if p is matrix)
        u, _, vh = torch.linalg.svd(buffer[place])
        assert found.lr is not None
        torch.testing.assert_close(found.direction[name], u @ vh * 0.02 / found.lr)
    optimizer.state[matrices[0]]["momentum_buffer"] = buffer[:-1]
    with pytest.raises(InputError, match="shape"):
        prepare(live(optimizer, parameters), parameters)
