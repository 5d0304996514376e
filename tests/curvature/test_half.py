"""Weights in half precision are measured as float32 copies, and are not touched."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from wide import data, loss, network

from curvcli import analyze
from curvcli.curvature.hvp import FreshGraph, random_direction
from curvcli.curvature.precision import lift, mapped, norm
from curvcli.curvature.problem import Problem, measurable
from curvcli.curvature.untouched import restored
from curvcli.errors import UnsupportedError


class Kept(nn.Module):
    """Weights in every place where a module can keep them; buffers, a frozen one, one that stays in float32."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)  # a list of its own
        self.norm = nn.Linear(8, 8)
        register_parametrization(self.norm, "weight", nn.Tanh())
        self.many = nn.ParameterList([nn.Parameter(torch.ones(8))])
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.register_buffer("scale", torch.full((8,), 0.7))
        self.table = torch.linspace(-1, 1, 8, dtype=torch.bfloat16)  # neither a parameter nor a buffer
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.cell(self.embed(ids))[0] * self.scale * self.many[0] + self.table
        return self.head(torch.tanh(self.frozen(self.norm(x))))


def kept(dtype: torch.dtype = torch.bfloat16) -> Kept:
    torch.manual_seed(3)
    model = Kept().to(dtype)
    model.norm.float()  # mixed
    model.register_forward_pre_hook(lambda module, arguments: None)
    return model


def next_ids(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def windows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, (4, 7), generator=generator) for _ in range(2)]


def raised(model: Kept) -> Kept:
    """The same numbers in float32, made without curv."""
    copy = Kept()
    copy.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    copy.table = copy.table.float()
    return copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_as_its_float32_copy(dtype: torch.dtype) -> None:
    model = kept(dtype)
    found, truth = analyze(model, next_ids, windows()), analyze(raised(model), next_ids, windows())
    assert found.full.status == "converged"
    assert found.full.eigenvalue == pytest.approx(truth.full.eigenvalue, rel=1e-5)
    assert found.full.most_negative == pytest.approx(truth.full.most_negative, rel=1e-5)
    assert found.checkpoint.parameters == truth.checkpoint.parameters
    (said,) = (f for f in found.findings if f.code == "lifted-weights")
    assert f"of {len(list(model.named_parameters()))} weight tensors" in said.message
    assert str(dtype).removeprefix("torch.") in said.message
    assert "lifted-weights" not in {f.code for f in truth.findings}


def trace(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Of every tensor a module holds: the object, memory, type, values, gradient and hooks."""
    found: dict[str, tuple[Any, ...]] = {}
    for where, module in model.named_modules():
        held = {**vars(module), **module._parameters, **module._buffers}
        held |= {f"flat{i}": w for i, w in enumerate(vars(module).get("_flat_weights", ()))}
        for name, value in held.items():
            if isinstance(value, Tensor):
                facts = id(value), value.data_ptr(), value.dtype, value.requires_grad, value.detach().float().tolist()
                gradient = None if not value.is_leaf or value.grad is None else (id(value.grad), value.grad.tolist())
                hooks = dict(value._backward_hooks or {})
                found[f"{where}.{name}"] = (*facts, gradient, hooks, value._version)
        found[f"{where}()"] = (list(module._parameters), list(module._buffers), module.training, module._forward_pre_hooks)
    return found


def accumulators(model: nn.Module) -> list[Any]:
    """What DistributedDataParallel hooks into: it is gone where a parameter's type changes in place."""
    return [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters() if p.requires_grad]  # type: ignore[union-attr]


def failing(model: nn.Module, ids: Tensor) -> Tensor:
    next_ids(model, ids)
    raise KeyError("a loss that fails")


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_model_in_half_precision_is_touched(fails: bool) -> None:
    model = kept()
    tied = model.embed.weight
    tied.grad = torch.ones_like(tied)
    tied.register_hook(lambda g: g)
    before, nodes = trace(model), accumulators(model)
    if fails:
        with pytest.raises(KeyError):
            analyze(model, failing, windows())
    else:
        analyze(model, next_ids, windows())
    assert trace(model) == before
    assert all(a is b for a, b in zip(accumulators(model), nodes, strict=True))
    assert model.head.weight is tied
    assert model.calls == 0


def test_lifted_weights_stay_tied_frozen_and_in_order() -> None:
    model = kept()
    names = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with restored(model):
        lifted = lift(model)
        assert model.head.weight is model.embed.weight
        assert model.cell._flat_weights[0] is model.cell.weight_ih_l0
        assert [(n, p.requires_grad) for n, p in model.named_parameters()] == names
        assert {p.dtype for p in (*model.parameters(), *model.buffers(), model.table)} == {torch.float32}
        assert set(lifted.names) == {n for n, _ in names if not n.startswith("norm.")}
        assert lifted.dtypes == ("bfloat16",)


def test_half_precision_was_asymmetric_before() -> None:
    """What lifting is for: without it products of a model in bfloat16 are not symmetric."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    batches = [(torch.randn(16, 16), torch.randn(16, 4))]

    def skew(model: nn.Module, batches: Any) -> float:
        problem = Problem.create(model, loss, batches)
        names = list(problem.parameters)
        u = random_direction(problem)
        v = [torch.roll(t.flatten(), 1).view(t.shape) for t in u]
        hu, hv = (FreshGraph(problem).product(names, t) for t in (u, v))

        def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
            return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))  # type: ignore[return-value]

        return abs(float(inner(v, hu) - inner(u, hv))) / norm(hu)

    half = model.bfloat16()
    inputs = [tuple(t.bfloat16() for t in batch) for batch in batches]
    assert skew(half, inputs) > 1e-4
    with measurable(half) as lifted:
        assert skew(half, [lifted.batch(batch) for batch in inputs]) < 1e-6


def test_batches_in_half_precision_are_lifted_with_the_model() -> None:
    half = [tuple(t.bfloat16() for t in batch) for batch in data()]
    truth = analyze(network().bfloat16().float(), loss, [tuple(t.float() for t in batch) for batch in half])
    assert analyze(network().bfloat16(), loss, half).full.eigenvalue == pytest.approx(truth.full.eigenvalue, rel=1e-5)
    # With a model in float32 the loss casts them itself.
    found = analyze(network().bfloat16().float(), lambda m, b: loss(m, [t.float() for t in b]), half)
    assert found.full.eigenvalue == pytest.approx(truth.full.eigenvalue, rel=1e-5)


def test_a_loss_that_keeps_to_half_precision_is_told() -> None:
    model, batches = network().bfloat16(), data()
    with pytest.raises(UnsupportedError, match=r"bfloat16, and the loss does not run on copies.*deepcopy"):
        analyze(model, lambda m, b: loss(m, [t.bfloat16() for t in b]), batches)
    weight = model[0].weight  # type: ignore[index]
    with pytest.raises(UnsupportedError, match=r"past the modules that hold them.*deepcopy"):
        analyze(model, lambda m, b: loss(m, b) + weight.float().square().mean(), batches)


class Pair(NamedTuple):
    x: Tensor
    y: Any


def test_batches_keep_their_containers() -> None:
    batch = {"a": [torch.ones(2), "text"], "b": Pair(torch.ones(2), None), "c": (1, torch.ones(2))}
    found = mapped(batch, lambda t: t * 2)
    assert found["a"][1] == "text"
    assert isinstance(found["b"], Pair)
    assert found["c"][0] == 1
    assert all(torch.equal(t, torch.full((2,), 2.0)) for t in (found["a"][0], found["b"].x, found["c"][1]))
    assert torch.equal(batch["a"][0], torch.ones(2))  # type: ignore[arg-type]
