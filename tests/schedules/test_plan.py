"""Plans by depth alone: the paper's default, orders, groups and impossible numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curvcli.documents import Schedule
from curvcli.errors import UsageError
from curvcli.render.schedule_table import ranges
from curvcli.schedules import grow
from curvcli.schedules.plan import joining, split


def test_default_is_the_papers() -> None:
    plan = grow(48)
    assert [(p.step, p.latest, len(p.active)) for p in plan.phases] == [
        (0, 0, 24), (2000, 2500, 30), (2500, 3000, 36), (3000, 3500, 42), (3500, 4000, 48),
    ]  # fmt: skip
    assert plan.phases[1].unlock == list(range(24, 30))
    assert [len(plan.locked_at(s)) for s in (0, 1999, 2000, 3499, 3500, 10**9)] == [24, 24, 18, 6, 0, 0]
    assert {p.predicted_rho for p in plan.phases} == {p.lr for p in plan.phases} == {None}


@pytest.mark.parametrize(
    ("depth", "start", "order", "active", "queue"),
    [
        (6, 3, "last", [0, 1, 2], [3, 4, 5]),
        (6, 3, "interleaved", [0, 2, 4], [1, 3, 5]),
        (7, 3, "interleaved", [0, 2, 4], [1, 3, 5, 6]),
        (8, 2, "interleaved", [0, 4], [1, 2, 3, 5, 6, 7]),
        (8, 6, "interleaved", [0, 1, 2, 4, 5, 6], [3, 7]),
    ],
)
def test_orders(depth: int, start: int, order: str, active: list[int], queue: list[int]) -> None:
    assert joining(depth, start, order) == (active, queue)  # type: ignore[arg-type]


@st.composite
def plans(draw: st.DrawFn) -> Schedule:
    depth = draw(st.integers(2, 60))
    start = draw(st.integers(1, depth - 1))
    return grow(
        depth,
        start=start,
        groups=draw(st.none() | st.integers(1, depth - start)),
        interval=draw(st.integers(1, 1000)),
        warmup_steps=draw(st.integers(1, 5000)),
        order=draw(st.sampled_from(["last", "interleaved"])),
    )


@given(plans())
def test_every_plan_reaches_every_block_once(plan: Schedule) -> None:
    joined = [*plan.phases[0].active, *(b for p in plan.phases[1:] for b in p.unlock)]
    assert sorted(joined) == list(range(plan.depth))
    assert plan.phases[-1].active == list(range(plan.depth))
    sizes = [len(p.unlock) for p in plan.phases[1:]]
    assert max(sizes) - min(sizes) <= 1
    for a, b in pairwise(plan.phases):
        assert (a.step < b.step, b.active) == (True, sorted({*a.active, *b.unlock}))
        assert plan.locked_at(b.step - 1) == plan.locked_at(a.step) == set(range(plan.depth)) - set(a.active)
    assert [p.latest for p in plan.phases[1:-1]] == [p.step for p in plan.phases[2:]]
    assert Schedule.model_validate_json(plan.to_json()) == plan


@given(plans())
def test_ranges_say_the_same_blocks(plan: Schedule) -> None:
    for phase in plan.phases:
        said: list[int] = []
        for part in ranges(phase.active).split(", "):
            span, _, stride = part.partition("/")
            first, _, last = span.partition("-")
            said += range(int(first), int(last or first) + 1, int(stride or 1))
        assert said == phase.active
    assert ranges([]) == "-"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 1}, "0 of 1 blocks"),
        ({"depth": 4, "start": 0}, "0 of 4 blocks"),
        ({"depth": 4, "start": 4}, "nothing to schedule"),
        ({"depth": 4, "groups": 3}, "2 locked blocks cannot make 3 groups"),
        ({"depth": 4, "warmup_steps": 0}, "step 0"),
        ({"depth": 4, "total_steps": 2500}, "join at step 2500, and the run ends at 2500"),
    ],
)
def test_impossible_numbers_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        grow(**options)
    assert caught.value.hint


def test_groups_differ_by_at_most_one() -> None:
    assert [len(g) for g in split(range(10), 4)] == [2, 3, 2, 3]
    assert [len(g) for g in split(range(3), None)] == [1, 1, 1]
