"""Products in threads: the digits of one thread, at the same time, and torch as it was."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import curvcli
from curvcli.analysis import solve
from curvcli.curvature.hvp import build, random_direction
from curvcli.curvature.problem import Problem
from curvcli.curvature.threads import in_order
from curvcli.documents import Report


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Python's; torch has one of its own, as in all tests, for which there are no cores to spare."""
    monkeypatch.setattr("curvcli.curvature.threads.available", lambda: 2)


def test_results_come_in_order_in_the_caller_s_thread() -> None:
    gate, seen = threading.Event(), []

    def first() -> int:
        assert gate.wait(10)  # until the second is done, which has to run beside it
        return 1

    def second() -> int:
        gate.set()
        return 2

    in_order([first, second], lambda index, found: seen.append((index, found, threading.current_thread())))
    assert seen == [(0, 1, threading.main_thread()), (1, 2, threading.main_thread())]


def test_torch_s_threads_are_divided_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.undo()
    torch.set_num_threads(4)
    found: list[int] = []
    in_order([torch.get_num_threads] * 2, lambda index, threads: found.append(threads))
    assert found == [2, 2]
    assert torch.get_num_threads() == 4
    with pytest.raises(ZeroDivisionError):
        in_order([lambda: 1 // 0] * 3, lambda index, result: None)
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


def test_no_more_are_begun_than_there_are_threads() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def task() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        torch.randn(200, 200).exp().sum()
        with lock:
            running -= 1

    in_order([task] * 20, lambda index, result: None)
    assert most <= 2


def test_a_task_s_own_tasks_stay_in_its_thread() -> None:
    def threads() -> set[int]:
        inner: set[int] = {threading.get_ident()}
        in_order([threading.get_ident] * 3, lambda index, ident: inner.add(ident))
        return inner

    found: list[set[int]] = []
    in_order([threads] * 2, lambda index, idents: found.append(idents))
    assert [len(idents) for idents in found] == [1, 1]


class Met(torch.autograd.Function):
    """The identity, which in the second backward pass waits for another batch's."""

    met = threading.Barrier(2, timeout=10)

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        if not torch.is_grad_enabled():
            Met.met.wait()
        return gradient.clone()


class Stack(nn.Module):
    """Two residual layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        out: Tensor = self.head(x)
        return out


def _problem(batches: int = 5) -> Problem:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch)
        return out.square().mean() + out[:, 0].exp().mean()

    shard = torch.randn(batches, 4, 7, generator=torch.Generator().manual_seed(1))
    return Problem.create(Stack(), loss, list(shard), [float(i + 1) for i in range(batches)])


def test_products_have_the_digits_of_one_thread() -> None:
    problem = _problem()
    names, tangents = list(problem.parameters), random_direction(problem)
    for part, along in ((names, tangents), (names[:2], tangents[:2])):
        alone = build(problem, "kept").product(part, along)
        together = build(problem, "kept", threads=True).product(part, along)
        assert all(map(torch.equal, alone, together))
        assert all(bool(t.any()) for t in together)


def test_batches_are_walked_at_the_same_time() -> None:
    problem = _problem(2)
    inner = problem.loss

    def waiting(model: nn.Module, batch: Tensor) -> Tensor:
        return inner(lambda rows: Met.apply(model(rows)), batch)  # type: ignore[arg-type, no-untyped-call]

    names, tangents = list(problem.parameters), random_direction(problem)
    engine = build(Problem.create(problem.model, waiting, problem.batches), "kept", threads=True)
    found = engine.product(names, tangents)  # one after the other would break the barrier
    plain = build(Problem.create(problem.model, inner, problem.batches), "kept").product(names, tangents)
    assert all(map(torch.equal, found, plain))


def test_a_report_has_the_digits_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def report() -> Report:
        problem = _problem()
        return curvcli.analyze(
            problem.model, problem.loss, problem.batches, torch.optim.SGD(problem.model.parameters(), lr=0.1),
            weights=problem.weights, mode="kept", depths=False,
        )  # fmt: skip

    calls: list[int] = []

    def counted(tasks: list[object], use: object) -> None:
        calls.append(len(tasks))
        in_order(tasks, use)  # type: ignore[arg-type]

    monkeypatch.setattr("curvcli.curvature.hvp.in_order", counted)
    monkeypatch.setattr("curvcli.curvature.operator.in_order", counted)
    together = report()
    assert calls.count(5) >= together.full.hvps > 0  # folds of the full model, and batches of layers
    monkeypatch.setattr(solve, "LARGE", 0)
    calls.clear()
    alone = report()
    assert not calls
    same = {"full", "layers", "cumulative", "generalisation", "update"}
    assert together.model_dump(include=same) == alone.model_dump(include=same)
    assert together.cost.hvps == alone.cost.hvps
