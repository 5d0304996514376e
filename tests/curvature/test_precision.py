"""Whatever a caller has set, products are those of float32; weights in half precision are measured as copies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from curvcli import analyze
from curvcli.curvature.precision import exact, lift, mapped, norm
from curvcli.curvature.problem import measurable
from curvcli.curvature.untouched import restored
from curvcli.errors import UnsupportedError

WIDTH = 128  # wide enough for the kernels that mkldnn takes in bfloat16


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(32, WIDTH, generator=generator, dtype=torch.float32),
            torch.randn(32, 4, generator=generator, dtype=torch.float32),
        )
        for _ in range(2)
    ]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)).float()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def numbers(found: Any) -> tuple[float | None, ...]:
    return found.full.eigenvalue, found.full.most_negative, found.full.residual, found.data.loss


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def matmul(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "medium": lambda: matmul("medium"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "deterministic": deterministic,
}


@pytest.fixture(scope="module")
def plain() -> tuple[float | None, ...]:
    return numbers(analyze(network(), loss, data(), mode="kept"))


@pytest.mark.parametrize("name", AROUND)
def test_what_a_caller_has_set_changes_no_bit(name: str, plain: tuple[float | None, ...]) -> None:
    model, batches = network(), data()
    with AROUND[name]():
        assert numbers(analyze(model, loss, batches, mode="kept")) == plain


@pytest.mark.parametrize("made_of", ["model", "batches"])
def test_what_inference_mode_made_can_be_measured(made_of: str, plain: tuple[float | None, ...]) -> None:
    with torch.inference_mode():
        model = network() if made_of == "model" else None
        batches = data() if made_of == "batches" else None
    model, batches = model or network(), batches or data()
    before = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
    assert numbers(analyze(model, loss, batches, mode="kept")) == plain
    assert all(p is before[n][0] and p.data_ptr() == before[n][1] for n, p in model.named_parameters())


def autocasting(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss(model, batch)


def test_autocast_that_the_loss_enters_is_off(plain: tuple[float | None, ...]) -> None:
    """As trainers wrap a model's forward; on other threads, and afterwards, autocast is as it was."""
    inside: list[bool] = []

    def elsewhere() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside.append(torch.is_autocast_enabled("cpu"))

    def watched(model: nn.Module, batch: Any) -> Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return autocasting(model, batch)

    entered = torch.autocast.__enter__
    assert numbers(analyze(network(), watched, data(), mode="kept")) == plain
    assert inside
    assert all(inside)
    assert torch.autocast.__enter__ is entered
    assert autocasting(network(), data()[0]) != loss(network(), data()[0])


def settings() -> dict[str, Any]:
    """Each switch as it is itself: a special one that is not set reads as the general one."""
    found: dict[str, Any] = {
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "default": torch.get_default_dtype(),
    }
    backends: Any = torch.backends
    for name, read in {
        "matmul": torch.get_float32_matmul_precision,
        "cuda": lambda: backends.cuda.matmul.allow_tf32,
        "cudnn": lambda: backends.cudnn.allow_tf32,
    }.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "mixed"
    if not hasattr(backends, "fp32_precision"):
        return found
    general = {"all": backends, "mkldnn": backends.mkldnn, "cudnn own": backends.cudnn}
    found |= {name: switch.fp32_precision for name, switch in general.items()}
    for switch in general.values():
        switch.fp32_precision = "none"
    found |= {f"mkldnn {part}": getattr(backends.mkldnn, part).fp32_precision for part in ("matmul", "conv", "rnn")}
    found |= {f"cudnn {part}": getattr(backends.cudnn, part).fp32_precision for part in ("conv", "rnn")}
    found["cublas"] = backends.cuda.matmul.fp32_precision
    for name, switch in general.items():
        switch.fp32_precision = found[name]
    return found


@contextmanager
def switched(switch: Any, value: str) -> Iterator[None]:
    before = switch.fp32_precision
    switch.fp32_precision = value
    try:
        yield
    finally:
        switch.fp32_precision = before


def _new() -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return {}
    return {
        "all tf32": lambda: switched(backends, "tf32"),
        "mkldnn bf16": lambda: switched(backends.mkldnn.matmul, "bf16"),
        "cublas tf32": lambda: switched(backends.cuda.matmul, "tf32"),
        "cudnn ieee": lambda: switched(backends.cudnn.conv, "ieee"),
    }


@pytest.mark.parametrize("name", ["nothing", "high", *AROUND, *_new()])
@pytest.mark.parametrize("fails", [False, True])
def test_settings_are_what_they_should_be_and_put_back(name: str, fails: bool) -> None:
    around = {"nothing": nullcontext, "high": lambda: matmul("high"), **AROUND, **_new()}[name]
    backends: Any = torch.backends
    with around():
        before = settings()
        with pytest.raises(ValueError, match="of a model") if fails else nullcontext(), exact():
            assert not torch.is_autocast_enabled("cpu")
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert torch.get_deterministic_debug_mode() < 2
            if name not in _new():  # where a caller has used both ways, torch can read neither
                assert torch.get_float32_matmul_precision() == "highest"
                assert not backends.cuda.matmul.allow_tf32
                assert not backends.cudnn.allow_tf32
            if hasattr(backends, "fp32_precision"):
                special = [backends.cuda.matmul, *(getattr(backends.mkldnn, part) for part in ("matmul", "conv", "rnn"))]
                special += [backends.cudnn.conv, backends.cudnn.rnn]
                assert {switch.fp32_precision for switch in special} == {"ieee"}
            if fails:
                raise ValueError("of a model")
        assert settings() == before


def test_a_product_without_a_deterministic_form_is_measured() -> None:
    """`put_` has none on any device: in the caller's mode it would raise, and read as a model without second derivatives."""

    def putting(model: nn.Module, batch: Any) -> Tensor:
        torch.zeros(4).put_(torch.tensor([1]), torch.ones(1))
        return loss(model, batch)

    with deterministic():
        with pytest.raises(RuntimeError, match="deterministic"):
            putting(network(), data()[0])
        with pytest.warns(UserWarning, match="deterministic"):
            assert analyze(network(), putting, data()).full.status == "converged"


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
    from curvcli.curvature.hvp import FreshGraph, random_direction
    from curvcli.curvature.problem import Problem

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


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_norm_neither_overflows_nor_underflows(size: float) -> None:
    tensors = [torch.arange(6.0) * size, torch.full((3,), -2.0) * size, torch.zeros(0)]
    truth = float(torch.cat([t.double() for t in tensors]).norm())
    assert norm(tensors) == pytest.approx(truth, rel=1e-6)
    assert norm([torch.zeros(3)]) == 0
    assert not norm([torch.tensor([1.0, float("nan")])]) <= 1
