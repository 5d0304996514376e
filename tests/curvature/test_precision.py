"""Whatever a caller has set, products are those of float32, and the caller's settings stand afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_settings import deterministic
from wide import data, loss, network

from curvcli import analyze
from curvcli.curvature.hvp import random_direction
from curvcli.curvature.precision import exact, norm
from curvcli.curvature.problem import Problem


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
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # a test of the way of torch 2.9 came before in this process
        before = "highest"
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def test_a_direction_is_the_same_whatever_the_default_type_is() -> None:
    problem = Problem.create(network(), loss, data())
    before = random_direction(problem)
    with default_dtype(torch.float64):
        assert all(torch.equal(a, b) for a, b in zip(before, random_direction(problem), strict=True))


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


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_norm_neither_overflows_nor_underflows(size: float) -> None:
    tensors = [torch.arange(6.0) * size, torch.full((3,), -2.0) * size, torch.zeros(0)]
    truth = float(torch.cat([t.double() for t in tensors]).norm())
    assert norm(tensors) == pytest.approx(truth, rel=1e-6)
    assert norm([torch.zeros(3)]) == 0
    assert not norm([torch.tensor([1.0, float("nan")])]) <= 1
