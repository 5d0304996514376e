"""Products, sums and random starts on a GPU, against the CPU's in float64."""

from __future__ import annotations

import copy
import time
from typing import Any

import gpu
import pytest
import torch
from gpu import DEVICE, apart, llama, moved, say, tokens
from torch import Tensor, nn

from curvcli.curvature import resources
from curvcli.curvature.hvp import KeptGraph, Mode, build, choose, graph_bytes, random_direction
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.operator import DenseOperator, Folded, PreconditionedHessian
from curvcli.curvature.precision import all_finite, inner, length, norm, numbers
from curvcli.curvature.problem import Problem, gradient, measurable
from curvcli.curvature.ritz import Extremes
from curvcli.curvature.scratch import Host
from curvcli.curvature.space import OneDevice
from curvcli.data.tasks import causal_loss
from curvcli.errors import UnsupportedError, UsageError
from curvcli.optimizers.preconditioner import identity

pytestmark = gpu.there
MODES: tuple[Mode, ...] = ("kept", "fresh", "forward")


def products(model: nn.Module, batches: list[Any], mode: Mode, names: list[str] | None = None) -> list[Tensor]:
    with measurable(model):
        problem = Problem.create(model, causal_loss, batches)
        chosen = names or list(problem.parameters)
        tangents = dict(zip(problem.parameters, random_direction(problem), strict=True))
        return build(problem, mode).product(chosen, [tangents[n] for n in chosen])


@pytest.fixture(scope="module")
def truth() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    model, batches = llama(), tokens()
    return model, batches, products(copy.deepcopy(model).double(), batches, "fresh")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_products_are_the_cpus(mode: Mode, attention: str, truth: tuple[nn.Module, list[Tensor], list[Tensor]]) -> None:
    model, batches, right = truth
    here = llama(attn_implementation=attention).to(DEVICE)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(here.parameters(), model.parameters(), strict=True))
    found = products(here, moved(batches), mode)
    off = apart(found, right)
    say(f"a product, {mode}, {attention}: {off:.1e} off float64")
    assert {t.device.type for t in found} == {DEVICE.type}
    assert off < 3e-5, (
        f"{mode} under {attention} is {off:.2e} off the CPU's float64, by tensor: "
        f"{[apart([a], [b]) for a, b in zip(found, right, strict=True)]}"
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_alone_is_the_cpus(mode: Mode, truth: tuple[nn.Module, list[Tensor], list[Tensor]]) -> None:
    model, batches, _ = truth
    names = [n for n, _ in model.named_parameters() if ".layers.1." in n]
    right = products(copy.deepcopy(model).double(), batches, "fresh", names)
    off = apart(products(copy.deepcopy(model).to(DEVICE), moved(batches), mode, names), right)
    assert off < 3e-5, f"{mode}: {off:.2e}"


class Bag(nn.Module):
    """A vocabulary so large that the loss goes over its logits in chunks."""

    def __init__(self, vocabulary: int = 5000, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", [None, ["mix.weight", "mix.bias"]])
def test_logits_in_chunks_are_the_cpus(mode: Mode, names: list[str] | None) -> None:
    """Its backward asks the engine which gradients are wanted, on the thread that the engine has for the GPU."""
    batches = tokens(batches=1, rows=8, length=129, vocabulary=5000)

    def plain(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, -2), batch[:, 1:].flatten())

    double = Bag().double()
    problem = Problem.create(double, plain, batches)
    chosen = names or list(problem.parameters)
    tangents = dict(zip(problem.parameters, random_direction(problem), strict=True))
    right = build(problem, "fresh").product(chosen, [tangents[n] for n in chosen])
    off = apart(products(Bag().to(DEVICE), moved(batches), mode, names), right)
    assert off < 3e-5, f"{mode} {names}: {off:.2e}"


def test_a_random_start_is_drawn_on_the_device_and_is_the_same_at_every_call() -> None:
    space = OneDevice(100_001, torch.float32, DEVICE)
    before = torch.random.get_rng_state(), torch.cuda.get_rng_state() if gpu.REAL else None
    one, other, third = (space.random(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert one.device.type == DEVICE.type
    assert torch.equal(one, other)
    assert abs(float(one @ third)) < 5 * len(one) ** 0.5
    assert float(one.square().mean()) == pytest.approx(1.0, abs=0.03)
    generator = torch.Generator().manual_seed(3)
    assert not torch.equal(space.random(generator), space.random(generator)), "a generator goes on"
    problem = Problem.create(llama().to(DEVICE), causal_loss, moved(tokens()))
    first, second = random_direction(problem), random_direction(problem)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    after = torch.random.get_rng_state(), torch.cuda.get_rng_state() if gpu.REAL else None
    llama()  # which draws on the CPU
    assert before[1] is None or torch.equal(before[1], after[1]), "the job's random numbers moved on"


@pytest.mark.parametrize("entries", [3_000_003, pytest.param(150_000_001, marks=gpu.real)])
def test_long_sums_are_right(entries: int) -> None:
    """Of one sign, where a single accumulator stops growing."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    vector = torch.rand(entries, generator=generator, device=DEVICE)
    rows = torch.rand((3, entries), generator=generator, device=DEVICE)
    exactly = [float(row.double() @ vector.double()) for row in rows]
    if gpu.REAL:
        inner(rows, vector)
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = inner(rows, vector).cpu().double()
    took = time.perf_counter() - began
    off = max(abs(float(one) / truth - 1) for one, truth in zip(found, exactly, strict=True))
    plain = abs(float((rows[:1] @ vector)[0]) / exactly[0] - 1)
    say(f"inner products of {entries:,} entries: {off:.1e} off, BLAS alone {plain:.1e}; three rows in {took * 1e3:.2f} ms")
    assert off < 1e-5
    square = float(vector.double().square().sum())
    assert abs(length(vector) / square**0.5 - 1) < 1e-5, (length(vector), square**0.5)
    assert abs(norm([vector, vector]) / (2 * square) ** 0.5 - 1) < 1e-5, (norm([vector, vector]), (2 * square) ** 0.5)


def test_norms_hold_at_both_ends() -> None:
    for size in (1e-30, 1.0, 1e30):
        parts = [torch.full((5,), size, device=DEVICE), torch.full((4,), 2 * size, device=DEVICE)]
        assert norm(parts) == pytest.approx(size * 21**0.5, rel=1e-6)
    bad = [torch.ones(3, device=DEVICE), torch.tensor([1.0, float("nan")], device=DEVICE)]
    assert norm(bad) != norm(bad)
    assert not all_finite(bad)
    assert all_finite(bad[:1])
    assert numbers([torch.tensor(2.5, device=DEVICE), torch.tensor([3.5], device=DEVICE)]) == [2.5, 3.5]


def test_the_graph_is_as_large_as_it_was_counted() -> None:
    """Saved on the engine's own thread for the GPU, where the counter has to be, too."""
    sizes = {}
    for device in (DEVICE, torch.device("cpu")):
        model = llama(width=128).to(device)
        with measurable(model):
            sizes[device.type] = graph_bytes(Problem.create(model, causal_loss, moved(tokens(rows=8, length=65), device)))
    here, there = sizes[DEVICE.type], sizes["cpu"]
    assert here == pytest.approx(there, rel=0.25), f"{here:,} bytes here, {there:,} on the CPU"
    if not gpu.REAL:
        return
    model = llama(width=128).to(DEVICE)
    with measurable(model):
        problem = Problem.create(model, causal_loss, moved(tokens(batches=1, rows=8, length=65)))
        KeptGraph(problem)  # what libraries take once
        before = torch.cuda.memory_allocated()
        kept = KeptGraph(problem)
        held = torch.cuda.memory_allocated() - before
    say(f"a kept graph: counted {here:,} bytes, held {held:,}")
    assert kept
    assert here == pytest.approx(held, rel=0.15), f"counted {here:,} bytes, {held:,} are held"


@gpu.real
@pytest.mark.parametrize("mode", MODES)
def test_a_product_hardly_waits_for_the_gpu(mode: Mode) -> None:
    model, batches = llama().to(DEVICE), moved(tokens())
    with measurable(model):
        problem = Problem.create(model, causal_loss, batches)
        names, tangents = list(problem.parameters), random_direction(problem)
        engine = build(problem, mode)
        engine.product(names, tangents)
        with gpu.waits() as found:
            engine.product(names, tangents)
    say(f"waits in a product of {len(batches)} batches, {mode}: {len(found)} ({gpu.counted(found)})")
    most = 0 if mode == "kept" else 3 * len(batches)
    assert len(found) <= most, f"{len(found)} waits, {most} allowed: {gpu.counted(found)}"


@gpu.real
def test_the_solver_waits_a_few_times_a_product() -> None:
    model, batches = llama().to(DEVICE), moved(tokens(batches=8))
    with measurable(model):
        problem = Problem.create(model, causal_loss, batches)
        root = identity(problem.parameters).root
        engine = build(problem, "kept")
        folds = [(1 / 8, PreconditionedHessian(engine.subset([i]), root)) for i in range(8)]
        operator = Folded(folds)
        with gpu.waits() as found:
            result: Extremes = Lanczos(max_products=12, tolerance=1e-9).extremes(operator)
    each = len(found) / result.products
    say(f"waits a step of Lanczos over 8 folds: {each:.1f} ({gpu.counted(found)})")
    # Finite, two inner products, the basis' own, the coefficients there and back, a norm; and one a fold.
    assert each <= 8 + 9, f"{each:.1f} a product: {gpu.counted(found)}"


def test_modes_are_chosen_by_memory() -> None:
    model, batches = llama().to(DEVICE), moved(tokens())
    with measurable(model):
        problem = Problem.create(model, causal_loss, batches)
        wide, narrow, graph = choose(problem), choose(problem, memory=1e5), graph_bytes(problem)
        held = torch.cuda.memory_allocated() if gpu.REAL else 0
        choose(problem)
        after = torch.cuda.memory_allocated() if gpu.REAL else 0
    assert (wide.mode, narrow.mode) == ("kept", "fresh"), (wide, narrow)
    assert "out of memory" in narrow.refused["kept"]
    # A GPU's own thread of autograd may still be letting go of the last graph.
    assert after <= held + graph / 2, f"{after - held:,} bytes are held after the modes were tried, a graph is {graph:,}"


def test_what_lies_elsewhere_is_refused_in_a_sentence() -> None:
    model = llama()
    if gpu.REAL:
        with pytest.raises(UsageError, match="different devices"):
            gradient(Problem.create(copy.deepcopy(model).to(DEVICE), causal_loss, tokens()), ["lm_head.weight"])
    other = "cpu" if gpu.REAL else "meta"
    model = model.to(DEVICE)
    model.model.embed_tokens.to(other)  # as device_map does
    with pytest.raises(UnsupportedError, match=r"lie on .* and .*device_map"):
        Problem.create(model, causal_loss, moved(tokens()))


@gpu.real
def test_blocks_that_torch_keeps_count_as_free() -> None:
    torch.cuda.empty_cache()
    before = resources.free_bytes(DEVICE)
    large = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    held = resources.free_bytes(DEVICE)
    del large
    after = resources.free_bytes(DEVICE)
    assert torch.cuda.memory_reserved() >= 2**30
    assert before - held == pytest.approx(0.7 * 2**30, rel=0.05), (before, held)
    assert after == pytest.approx(before, rel=0.01), (before, after)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    try:
        assert resources.free_bytes(DEVICE) <= 0.7 * 2**30
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_basis_in_main_memory_gives_the_numbers_of_one_beside_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randn(90, 90, generator=generator, dtype=torch.float64) for _ in range(3)]
    results, folds = [], []
    for store in (None, Host()):
        operator = Folded([(1 / 3, DenseOperator((half + half.T).to(DEVICE))) for half in halves])
        found = Lanczos(bottom_tolerance=0.1, store=store).extremes(operator)
        results.append((found.status, found.products, found.top.value, found.ceiling))
        folds.append(operator.projected())
        assert found.vector.device.type == DEVICE.type
    assert results[0][:2] == results[1][:2], results
    assert results[1][2:] == pytest.approx(results[0][2:], rel=1e-9), results
    torch.testing.assert_close(*folds)
    held = {v.device.type for v in operator.vectors}
    assert held == {"cpu"}, held


@gpu.real
def test_what_lies_in_main_memory_is_copied_fast() -> None:
    fixed = Host().empty(1, 2**28, dtype=torch.float32)
    movable = torch.empty(1, 2**28)
    times = {}
    for name, row in (("fixed", fixed), ("movable", movable)):
        row.fill_(1.0)
        row.to(DEVICE)
        torch.cuda.synchronize()
        start = time.perf_counter()
        row.to(DEVICE)
        torch.cuda.synchronize()
        times[name] = time.perf_counter() - start
    say(", ".join(f"{name} pages: {row.nbytes / 2**30 / seconds:.1f} GiB/s" for name, seconds in times.items()))
    assert times["fixed"] < times["movable"], times
    address = fixed.data_ptr()
    del row, fixed
    again = Host().empty(1, 2**28, dtype=torch.float32)  # most likely at the same place, where nothing may be left
    again.fill_(2.0)
    assert float(again.to(DEVICE).sum()) == 2.0**29, (address, again.data_ptr())
