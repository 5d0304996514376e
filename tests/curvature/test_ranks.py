"""What ranks say to each other, on threads in the place of processes: sums, decisions, and who failed."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import replace
from math import inf
from typing import Any

import models
import pytest
import torch
from threads import Wire, on_ranks, rank_of
from torch import Tensor

from curvcli.curvature.davidson import Davidson
from curvcli.curvature.hvp import build
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.memory import spread
from curvcli.curvature.operator import DenseOperator
from curvcli.curvature.problem import Problem, gradient
from curvcli.curvature.ranks import ALONE, SLOTS, Processes, current, shared, within
from curvcli.curvature.space import OneDevice, Replicated, space_of
from curvcli.errors import CurvError, InputError, LostError, OutOfMemoryError, OutOfTime, RankError


def test_sums_of_small_large_and_strided_tensors() -> None:
    def work(ranks: Processes) -> list[Tensor]:
        torch.manual_seed(0)
        small, large = torch.randn(3, 4) * (ranks.rank + 1), torch.full((70_000,), float(ranks.rank))
        strided, empty = torch.arange(6.0).view(2, 3).T * (ranks.rank + 1), torch.empty(0)
        double = torch.ones(2, dtype=torch.float64)
        found = [small, large, strided, empty, double]
        ranks.sum_(found)
        return found

    torch.manual_seed(0)
    small = torch.randn(3, 4)
    for found in on_ranks(work):
        torch.testing.assert_close(found[0], 6 * small)
        assert bool((found[1] == 3).all())
        torch.testing.assert_close(found[2], 6 * torch.arange(6.0).view(2, 3).T)
        assert bool((found[4] == 3).all())


def test_numbers_and_text_are_those_of_rank_0_in_all() -> None:
    def work(ranks: Processes) -> Any:
        many = [float(i + 100 * ranks.rank) for i in range(2 * SLOTS + 1)]
        text = "é€\n" * 50 if ranks.rank == 0 else "other"
        return ranks.first(many), ranks.first_text(text), ranks.first_text(""), ranks.each(ranks.rank)

    for found in on_ranks(work):
        assert found == ([float(i) for i in range(2 * SLOTS + 1)], "é€\n" * 50, "", [0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (InputError("no such file"), CurvError),
        (MemoryError(), OutOfMemoryError),
        (RuntimeError("out of memory"), OutOfMemoryError),
        (OutOfTime(), OutOfTime),
        (KeyError("bug"), RankError),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_and_says_where(error: BaseException, heard: type[BaseException]) -> None:
    def work(ranks: Processes) -> None:
        with ranks.together():
            with ranks.together():  # the inner one has told it, the outer one has nothing to add
                if ranks.rank == 1:
                    raise error
            ranks.sum_([torch.ones(2)])

    found = on_ranks(work)
    assert found[1] is error
    for rank in (0, 2):
        assert type(found[rank]) is heard
        assert shared(found[rank])
        assert heard is OutOfTime or str(found[rank]).startswith("rank 1 of 3: ")
    assert getattr(found[1], "of_rank", None) == "rank 1 of 3: "


def test_what_fails_alike_on_all_is_no_ranks_doing() -> None:
    def work(ranks: Processes) -> None:
        with ranks.together():
            raise InputError("no such file")

    found = on_ranks(work)
    assert [str(error) for error in found] == ["no such file"] * 3
    assert {error.of_rank for error in found} == {""}


def test_none_is_past_the_end_before_all_are_there() -> None:
    seen: list[str] = []

    def work(ranks: Processes) -> None:
        with ranks.together():
            time.sleep(0.1 * ranks.rank)
            seen.append("in")
        seen.append("out")

    assert on_ranks(work) == [None] * 3
    assert seen == ["in"] * 3 + ["out"] * 3


def test_ranks_out_of_step_are_an_error_and_no_number() -> None:
    def sizes(ranks: Processes) -> None:
        ranks.sum_([torch.ones(2 + ranks.rank)])

    def doings(ranks: Processes) -> None:
        ranks.first([1.0]) if ranks.rank == 1 else ranks.sum_([torch.ones(1)])

    for work in (sizes, doings):
        for found in on_ranks(work):
            assert type(found) is LostError
            assert "out of step" in str(found)
            assert "rank 1" in str(found)


def test_an_alarm_knows_when_a_rank_is_speaking() -> None:
    seen: list[bool] = []

    def work(ranks: Processes) -> None:
        end = ranks._dist
        met = end.wire.met

        def watched(rank: int, part: Tensor) -> list[Tensor]:
            seen.append(ranks.speaking)
            return met(rank, part)

        end.wire.met = watched
        ranks.sum_([torch.ones(1)])
        seen.append(ranks.speaking)

    assert on_ranks(work, world=1) == [None]
    assert seen == [True, True, False]


def test_one_process_asks_nobody() -> None:
    assert current() is ALONE
    assert (ALONE.first([1.0]), ALONE.each(2.0), ALONE.first_text("a")) == ([1.0], [2.0], "a")
    assert type(space_of(3, torch.float32, torch.device("cpu"))) is OneDevice


def test_who_measured_alone_within_ranks_is_with_them_again() -> None:
    pair = rank_of(Wire(2), 0, 2)
    with within(pair):
        with within(ALONE):
            assert current() is ALONE
        assert current() is pair
    assert current() is ALONE


def test_solvers_go_by_rank_0() -> None:
    def work(ranks: Processes) -> Any:
        space = Replicated(2, torch.float32, torch.device("cpu"), ranks)
        return space.agree(5.0 + ranks.rank, ranks.rank == 0, inf)

    assert on_ranks(work) == [[5.0, 1.0, inf]] * 3

    def solved(ranks: Processes) -> Any:
        operator = DenseOperator(matrix * (1 + 1e-5 * ranks.rank))  # as if the others had rounded
        operator.space = Replicated(20, torch.float64, torch.device("cpu"), ranks)
        found = Lanczos(tolerance=1e-7, bottom_tolerance=1e-3).extremes(operator)
        warm = Davidson(tolerance=1e-7).extremes(operator, [found.vector])
        return [replace(one, vector=None) for one in (found, warm)]

    matrix = torch.randn(20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = matrix + matrix.T
    results = on_ranks(solved)
    assert results == [results[0]] * 3
    assert results[0][0].top.value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]))
    with within(rank_of(Wire(2), 0, 2)):
        assert type(space_of(3, torch.float32, torch.device("cpu"))) is Replicated


NET = models.Net()  # copied: its seed is that of all threads


def _shard() -> Problem:
    batches = models.data()
    return Problem.create(deepcopy(NET), models.loss, batches, models.weights(batches))


@pytest.mark.parametrize("mode", ["kept", "fresh"])  # forward AD's levels are those of all threads
@pytest.mark.parametrize("world", [2, 3])
def test_products_gradient_and_loss_are_those_of_one_process(mode: Any, world: int) -> None:
    whole = _shard()
    names = list(whole.parameters)
    vectors = [torch.ones_like(p) for p in whole.parameters.values()]
    expected = build(whole, mode).product(names, vectors)

    def work(ranks: Processes) -> Any:
        part = spread(_shard(), ranks)
        engine = build(part, mode)
        fold = [i for i, origin in enumerate(part.origins) if origin == 1]
        return (
            engine.product(names, vectors), gradient(part, names), part.mean_loss(),
            engine.subset(fold).product(names, vectors), len(part.own),
        )  # fmt: skip

    for product, found, loss, fold, own in on_ranks(work, world):
        torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found, gradient(whole, names), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fold, build(whole.subset([1]), mode).product(names, vectors), rtol=1e-9, atol=1e-12)
        assert loss == pytest.approx(whole.mean_loss(), rel=1e-12)
        assert own


def test_batches_are_halved_until_work_is_even_and_keep_their_fold() -> None:
    def work(ranks: Processes) -> Any:
        part = spread(_shard(), ranks)
        load = [sum(w for w, o in zip(part.weights, part.owners, strict=True) if o == r) for r in range(ranks.world)]
        return part.owners, part.origins, load, sum(part.weights), part.most

    found = on_ranks(work, 4)
    owners, origins, load, total, most = found[0]
    assert all(one == found[0] for one in found)
    assert set(origins) == {0, 1}
    assert max(load) <= 1.2 / 4
    assert total == pytest.approx(1)
    assert most == max(owners.count(rank) for rank in range(4))


def test_rows_that_depend_on_each_other_stay_together_and_ranks_idle() -> None:
    def norm_loss(model: Any, batch: Any) -> Tensor:
        return model(batch[0]).std() + models.loss(model, batch)  # over the batch

    def work(ranks: Processes) -> Any:
        part = Problem.create(deepcopy(NET), norm_loss, models.data(), [16.0, 32.0])
        part = spread(part, ranks)
        return part.owners, part.mean_loss()

    one = Problem.create(deepcopy(NET), norm_loss, models.data(), [16.0, 32.0]).mean_loss()
    for owners, loss in on_ranks(work, 3):
        assert sorted(owners) == [0, 1]
        assert loss == pytest.approx(one, rel=1e-12)


def test_a_gradient_that_is_not_finite_names_the_rank() -> None:
    def work(ranks: Processes) -> Any:
        part = spread(_shard(), ranks)
        if ranks.rank == 1:
            with torch.no_grad():
                next(iter(part.parameters.values())).fill_(float("nan"))
        return gradient(part, list(part.parameters))

    for found in on_ranks(work, 2):
        assert "rank 1" in str(found)
        assert "rank 0" not in str(found)
