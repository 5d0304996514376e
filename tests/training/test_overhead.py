"""What measuring costs: the ledger against a clock that a test moves, and the budget that goes by it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from warmup_job import Job, batch, build, same

from curvcli.documents import Record
from curvcli.errors import LostError, UsageError
from curvcli.training import ArchitectureWarmup, CurvatureTracker
from curvcli.training.callbacks import Callbacks
from curvcli.training.overhead import SETTLING, TRIAL, WANTED, Budget, Ledger


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def job(
    share: float, *, step: float = 1.0, product: float = 0.5, batches: int = 8, steps: int = 5000, products: int = 6
) -> tuple[Budget, list[tuple[int, int]]]:
    """A job's steps and measurements, in made-up seconds; when was measured, and on how many batches."""
    clock = Clock()
    budget = Budget(share, batches=batches, most=20, ledger=Ledger(clock))
    found = []
    for number in range(steps):
        clock.now += step
        budget.ledger.enter()
        if budget.due:
            found.append((number, budget.batches))
            spent = min(products, budget.products)
            clock.now += product * budget.batches * spent
            budget.paid(budget.ledger.charge(), spent)
        else:
            budget.ledger.rest()
    return budget, found


def test_the_ledger_tells_training_from_measuring() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    clock.now += 7  # before the first visit: not a step that was seen
    ledger.enter()
    assert ledger.share is None
    clock.now += 2
    assert ledger.charge() == 2
    clock.now += 10
    ledger.enter()
    clock.now += 1
    ledger.rest()
    clock.now += 3
    assert ledger.charge() == 3
    assert (ledger.trained, ledger.spent, ledger.steps) == (11, 5, 2)
    assert ledger.share == pytest.approx(5 / 11)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("product", [0.01, 0.5])
def test_the_share_is_kept_and_used(share: float, product: float) -> None:
    budget, found = job(share, product=product)
    used = budget.ledger.share
    assert used is not None
    one = budget.cost(budget.batches) / budget.ledger.trained
    assert share - 2 * one - 1e-3 * share < used <= share + 1e-9
    assert found[0] == (0, 1)
    assert len(found) > 10


def test_as_much_of_the_probe_as_is_measured_every_fifty_steps() -> None:
    cheap, dear = job(0.05, product=0.01), job(0.05, product=0.2, batches=8)
    assert cheap[0].batches == 8
    # 50 steps of 1 s earn 2.5 s, and a batch takes 6 products of 0.2 s.
    assert dear[0].batches == 2
    gaps = [b - a for (a, _), (b, _) in pairwise(dear[1][-10:])]
    assert all(40 <= gap <= WANTED for gap in gaps)
    assert len({size for _, size in dear[1][SETTLING:]}) == 1, "rho of probes of other sizes cannot be compared"
    assert job(0.05, product=5.0)[0].batches == 1, "one batch is measured, however seldom"


def test_a_probe_becomes_smaller_where_it_has_come_to_take_twice_and_not_before() -> None:
    for slower, wanted in ((1.8, 4), (3.0, 1)):
        budget, _ = job(0.05, product=0.1)
        assert budget.batches == 4
        for _ in range(SETTLING):
            budget.ledger.clock.now += 200  # type: ignore[attr-defined]
            budget.ledger.enter()
            budget.ledger.clock.now += slower * 0.1 * 6 * budget.batches  # type: ignore[attr-defined]
            budget.paid(budget.ledger.charge(), 6)
        assert (budget.batches == 4) is (wanted == 4)


def test_a_pause_earns_no_burst() -> None:
    clock = Clock()
    budget = Budget(0.05, batches=1, most=20, ledger=Ledger(clock))
    measured = []
    for step in range(400):
        clock.now += 10_000 if step == 100 else 1  # an evaluation
        budget.ledger.enter()
        if budget.due:
            clock.now += 2
            budget.paid(budget.ledger.charge(), 4)
            measured.append(step)
    after = [step for step in measured if step >= 100]
    assert min(b - a for a, b in pairwise(after)) >= 20


def test_a_first_measurement_that_fails_is_tried_again() -> None:
    clock = Clock()
    budget = Budget(0.05, batches=4, most=20, ledger=Ledger(clock))
    budget.ledger.enter()
    assert budget.due
    clock.now += 0.01
    budget.paid(budget.ledger.charge(), 0)
    assert not budget.due
    clock.now += 3
    budget.ledger.enter()
    assert budget.due
    assert budget.products == 20
    clock.now += 1
    budget.paid(budget.ledger.charge(), 4)
    cost = budget.cost(1)
    clock.now += 0.01
    budget.paid(budget.ledger.charge(), 0)
    assert budget.cost(1) == cost, "what failed says nothing of what others take"


def test_what_a_resumed_job_knows() -> None:
    before, _ = job(0.05, product=0.1)
    after = Budget(0.05, batches=8, most=20, ledger=Ledger(Clock()))
    after.load_state_dict(before.state_dict())
    assert (after.batches, after.cost(1)) == (before.batches, before.cost(1))
    after.ledger.enter()
    assert not after.due, "its seconds begin anew, and nothing is earned yet"
    fewer = Budget(0.05, batches=2, most=20, ledger=Ledger(Clock()))
    fewer.load_state_dict(before.state_dict())
    assert fewer.batches == 2
    old = Budget(0.05, batches=2, most=20, ledger=Ledger(Clock()))
    old.load_state_dict({})
    assert old.due


def causal(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def tracker(of: Job, **options: Any) -> CurvatureTracker:
    return CurvatureTracker(of.model, of.optimizer, causal, probe=[batch(90 + i) for i in range(4)], **options)


def test_a_tracker_keeps_to_its_budget() -> None:
    """With a clock of its own: a step takes a second, a product a tenth for each batch."""
    net, batches = models.Net(seed=3), models.data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    clock = Clock()

    def loss(model: nn.Module, part: Any) -> Tensor:
        clock.now += 0.02
        return models.loss(model, part)

    models.train(net, optimizer, batches, steps=2)
    watcher = CurvatureTracker(
        net, optimizer, loss, probe=batches, weights=models.weights(batches), max_overhead=0.1, max_hvps=8
    )
    watcher.ledger.clock = clock
    records: list[Record] = []
    for step in range(30):
        clock.now += 1.0
        if found := watcher.step(step):
            records.append(found)
    first, last = records[0], records[-1]
    assert (first.step, first.probe_batches, first.overhead) == (0, 1, None)
    assert first.hvps <= TRIAL + 1
    assert last.probe_batches == len(batches)
    assert last.overhead is not None
    assert 0.5 * 0.1 < last.overhead <= 0.1
    assert last.status == "converged"
    # All of the probe, weighted: what a tracker without a budget finds.
    plain = CurvatureTracker(net, optimizer, models.loss, probe=batches, weights=models.weights(batches)).step(0)
    assert last.eigenvalue == pytest.approx(plain.eigenvalue, rel=1e-3)
    assert plain.probe_batches == len(batches)


def test_a_part_of_the_probe_has_its_own_weights() -> None:
    net, batches = models.Net(seed=3), models.data()
    optimizer, weights = torch.optim.AdamW(net.parameters(), lr=1e-3), [1.0, 5.0, 2.0]
    models.train(net, optimizer, batches, steps=2)
    batches = [batches[0], batches[-1], batches[0]]
    part = CurvatureTracker(net, optimizer, models.loss, probe=batches, weights=weights, max_overhead=0.1)
    assert part.budget is not None
    part.budget.load_state_dict({"batches": 2, "trial": 0.0})
    whole = CurvatureTracker(net, optimizer, models.loss, probe=batches[:2], weights=weights[:2])
    one, other = part.step(0), whole.step(0)
    assert one.probe_batches == 2
    assert one.eigenvalue == other.eigenvalue


def test_training_does_not_notice_and_a_resumed_job_is_bit_equal() -> None:
    def run(steps: list[range]) -> nn.Module:
        state: dict[str, Any] = {}
        saved: dict[str, Any] = {}
        for part in steps:
            of = Job(model=build(attention_dropout=0.2))
            watcher = tracker(of, max_overhead=0.5)
            if saved:
                for name in ("model", "optimizer", "scheduler"):
                    getattr(of, name).load_state_dict(saved[name])
                watcher.load_state_dict(state)
            for step in part:
                torch.manual_seed(step)
                of.run([step])
                watcher.step(step)
            state = watcher.state_dict()
            saved = {name: getattr(of, name).state_dict() for name in ("model", "optimizer", "scheduler")}
        return of.model

    whole, resumed = run([range(8)]), run([range(5), range(5, 8)])
    alone = Job(model=build(attention_dropout=0.2))
    for step in range(8):
        torch.manual_seed(step)
        alone.run([step])
    assert same(whole, resumed)
    assert same(whole, alone.model)


def test_usage() -> None:
    of = Job()
    with pytest.raises(UsageError, match="both say when to measure"):
        tracker(of, max_overhead=0.05, every=2)
    for share in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="leaves nothing to measure with"):
            tracker(of, max_overhead=share)
    with pytest.raises(UsageError, match="fixed steps"):
        ArchitectureWarmup(of.model, of.optimizer, of.warmup.schedule, rho_source=tracker(of, max_overhead=0.05))
    probe = [batch(1)]
    with pytest.raises(UsageError, match="both say when to measure"):
        Callbacks(probe=probe, every=3, max_overhead=0.1)
    with pytest.raises(UsageError, match="measures at fixed steps"):
        Callbacks(of.warmup.schedule, probe=probe, adaptive=True, max_overhead=0.1)
    with pytest.raises(UsageError, match="there is no option tolerence; one of: alerts, attention"):
        Callbacks(probe=probe, tolerence=0.1)


def test_callbacks_have_a_budget_where_nothing_else_is_said() -> None:
    def made(**options: Any) -> tuple[int | None, float | None]:
        found = Callbacks(Job().warmup.schedule, probe=[batch(1)], **options)
        return found.every, found.max_overhead

    assert made() == (None, 0.05)
    assert made(max_overhead=0.02) == (None, 0.02)
    assert made(every=7) == (7, None)
    assert made(adaptive=True) == (10, None)


def test_several_ranks_measure_together_at_fixed_steps_and_by_a_budget_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    made: list[dict[str, Any]] = []

    def tracker(*_: Any, **options: Any) -> None:
        made.append(options)

    monkeypatch.setattr("curvcli.training.callbacks.CurvatureTracker", tracker)
    of = Job()
    for options in ({}, {"max_overhead": 0.1}, {"every": 3}):
        Callbacks(probe=[batch(1)], **options).begin(of.model, of.optimizer, 0)
    assert [(o["every"], o["max_overhead"], o["split"]) for o in made] == [
        (None, 0.05, True),
        (None, 0.1, True),
        (3, None, True),
    ]


def test_the_first_rank_says_when_and_on_how_much() -> None:
    """Two ranks, the other's clock says something else."""
    ledgers = [Ledger(Clock()) for _ in range(2)]
    first, other = (Budget(0.1, batches=4, most=8, ledger=ledger) for ledger in ledgers)
    first.batches = 3

    class Ranks:
        world = 2

        def __init__(self) -> None:
            self.said: list[float] | None = None

        def first(self, numbers: list[float]) -> list[float]:
            self.said = self.said or list(numbers)
            return self.said

    for settled in (False, True):
        ranks: Any = Ranks()
        if settled:
            first.paid(1.0, 5)
            assert (first.due, other.due) == (False, True)
        assert [first.turn(ranks), other.turn(ranks)] == [not settled] * 2
        assert (first.batches, other.batches) == (3, 3)


def test_a_rank_that_is_lost_is_a_record_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        world, rank, here = 2, 0, 2

        def first(self, numbers: list[float]) -> list[float]:
            raise LostError("rank 0 of 2 lost the connection to another")

    monkeypatch.setattr("curvcli.training.tracker.ranks_of", lambda split: Gone())
    watcher = tracker(Job(), max_overhead=0.05, split=True)
    record = watcher.step(0)
    assert record is not None
    assert (record.status, record.message) == ("failed", "LostError: rank 0 of 2 lost the connection to another")
    assert watcher.step(1) is None
