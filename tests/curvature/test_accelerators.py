"""What a GPU asks of the code, held where there is none: by a CPU that says it is another device."""

from __future__ import annotations

from typing import Any

import metal
import models
import pytest
import torch
from metal import MPS, Metal, to_metal
from torch import Tensor

from curvcli.curvature import resources
from curvcli.curvature.davidson import Davidson
from curvcli.curvature.operator import DenseOperator
from curvcli.curvature.precision import SUMMED, all_finite, inner, norm, numbers
from curvcli.curvature.problem import Problem, gradient
from curvcli.curvature.space import OneDevice
from curvcli.errors import UnsupportedError, UsageError, exhausted

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "held", "kept", "share", "expected"),
    [
        (10, 2, 2, 1.0, 10),
        (10, 2, 7, 1.0, 15),  # five of what torch keeps are free to it
        (60, 2, 2, 0.25, 18),  # a quarter of 80, of which two are held
        (60, 30, 30, 0.25, 0),
    ],
)
def test_what_torch_keeps_is_free_and_a_jobs_own_limit_holds(
    free: float, held: float, kept: float, share: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: kept * GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share, raising=False)
    assert resources.free_bytes(torch.device("cuda", 0)) == pytest.approx(0.7 * expected * GIB)


def test_numbers_are_fetched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []  # the device, which waits for it
    done = metal._done

    def watched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        to_cpu = func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        if to_cpu or func is torch.ops.aten._local_scalar_dense.default:
            left.append(func)
        return done(func, args, kwargs)

    monkeypatch.setattr(metal, "_done", watched)
    parts = [Metal(torch.full((5,), float(i))) for i in range(1, 5)]
    assert numbers([part.sum() for part in parts]) == [5.0, 10.0, 15.0, 20.0]
    assert len(left) == 1
    assert norm(parts) == pytest.approx((5 * 30) ** 0.5)
    assert len(left) == 3
    assert all_finite(parts)
    assert len(left) == 4
    assert not all_finite([*parts, Metal(torch.tensor([float("inf")]))])


@pytest.mark.parametrize("extra", [0, 3000])
def test_long_inner_products_are_of_all_entries(extra: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, vector = (torch.rand(*shape, 2 * SUMMED + extra, generator=generator) for shape in ((3,), ()))
    found = inner(Metal(rows), Metal(vector)).cpu()
    torch.testing.assert_close(found.double(), rows.double() @ vector.double(), rtol=2e-5, atol=0)


class Elsewhere(OneDevice):
    """A space whose memory is taken as soon as it is asked for."""

    rows: list[int]

    def __init__(self, size: int) -> None:
        super().__init__(size, torch.float64, torch.device("cpu"))
        object.__setattr__(self, "rows", [])

    def empty(self, rows: int) -> Tensor:
        self.rows.append(rows)
        return super().empty(rows) if rows else torch.empty((0, self.size), device="meta")


@pytest.mark.parametrize(("basis", "products"), [(24, 5), (6, 40)])
def test_a_basis_takes_memory_as_it_grows(basis: int, products: int) -> None:
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    plain, other = DenseOperator(square + square.T), DenseOperator(square + square.T)
    space = other.space = Elsewhere(60)
    solver = Davidson(tolerance=1e-9, max_products=products, basis=basis)
    truth, found = solver.extremes(plain), solver.extremes(other)
    assert found.products == truth.products <= products
    assert found.top is not None
    assert truth.top is not None
    assert found.top.value == pytest.approx(truth.top.value, rel=1e-9)
    assert sum(space.rows) == 2 * 8  # of basis and images, in fours: five vectors, or the six there is room for


def test_weights_on_several_devices_are_refused() -> None:
    net = models.Net()
    net.head.to("meta")
    with pytest.raises(UnsupportedError, match=r"lie on cpu and meta: .*without device_map"):
        Problem.create(net, models.loss, models.data(), [1.0, 2.0])
    with pytest.raises(UnsupportedError, match="meta device"):
        Problem.create(net.to("meta"), models.loss, models.data(), [1.0, 2.0])


def test_batches_elsewhere_are_refused_in_a_sentence() -> None:
    net = to_metal(models.Net().float())
    assert next(net.parameters()).device == MPS
    problem = Problem.create(net, models.loss, models.data(), [1.0, 2.0])
    with pytest.raises(UsageError, match=r"different devices: .*; move the batches"):
        gradient(problem, ["head.bias"])


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "CUDA error: out of memory",
    ],
)
def test_libraries_that_find_no_room_are_out_of_memory(said: str) -> None:
    assert exhausted(RuntimeError(said))
    assert not exhausted(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"))
