"""Learning rates by step: against transformers, from a file, and what no schedule can be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rates import PEAK, rates
from transformers import get_scheduler

from curvcli.errors import InputError, UsageError
from curvcli.schedules import highest_from, lr_at, settles
from curvcli.schedules.lr import read_points

# The names and options of transformers' own schedulers are the oracle; ours are beside them.
ORACLES = [
    ("constant", {}, "constant_with_warmup", {}),
    ("linear", {}, "linear", {}),
    ("cosine", {}, "cosine", {}),
    ("cosine", {"min_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("linear", {"min_ratio": 0.1}, "polynomial", {"lr_end": 0.1 * PEAK, "power": 1.0}),
    ("wsd", {"decay_steps": 30}, "warmup_stable_decay", {"num_decay_steps": 30}),
    ("wsd", {"decay_steps": 30, "min_ratio": 0.2}, "warmup_stable_decay", {"num_decay_steps": 30, "min_lr_ratio": 0.2}),
    ("wsd", {"decay_steps": 0}, "warmup_stable_decay", {"num_decay_steps": 0}),
    ("inverse-sqrt", {}, "inverse_sqrt", {}),
]


@pytest.mark.parametrize("warmup", [0, 1, 17])
@pytest.mark.parametrize(("kind", "ours", "name", "theirs"), ORACLES)
def test_lr_is_that_of_transformers(kind: str, ours: dict, name: str, theirs: dict, warmup: int) -> None:
    schedule = rates(kind, warmup_steps=warmup, total_steps=100, **ours)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    oracle = get_scheduler(name, optimizer, warmup, 100, scheduler_specific_kwargs=theirs)
    for step in range(103):
        used = optimizer.param_groups[0]["lr"]
        assert lr_at(schedule, step) == pytest.approx(used, rel=1e-12, abs=1e-18), step
        optimizer.step()
        oracle.step()


def test_lr_of_a_file_is_a_step_function(tmp_path: Path) -> None:
    file = tmp_path / "lr.csv"
    file.write_text("step,loss,lr\n10,9,0.1\n20,8,0.3\n40,7,0.2\n")
    schedule = rates(str(file), None)
    assert [lr_at(schedule, s) for s in (10, 19, 20, 39, 40, 999)] == [0.1, 0.1, 0.3, 0.3, 0.2, 0.2]
    assert (schedule.peak, schedule.warmup_steps) == (0.3, 20)
    assert (highest_from(schedule, 10), highest_from(schedule, 40)) == (0.3, 0.2)
    assert [settles(schedule, limit, 0) for limit in (0.3, 0.25, 0.2, 0.1)] == [20, 40, 40, None]
    with pytest.raises(UsageError, match="no learning rate is known at step 9"):
        lr_at(schedule, 9)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "line 1 has no columns"),
        ("steps,lr\n0,1\n", "line 1 has no columns"),
        ("step,lr\n", "no positive learning rate"),
        ("step,lr\n0,0\n", "no positive learning rate"),
        ("step,lr\n0,1\nx,1\n", "line 3"),
        ("step,lr\n0\n", "line 2"),
        ("step,lr\n0,1\n0,2\n", "line 3: step 0 does not come after 0"),
        ("step,lr\n-1,1\n", "line 2"),
        ("step,lr\n0,nan\n", "line 2"),
        ("step,lr\n0,inf\n", "line 2"),
        ("step,lr\n0,-1\n", "line 2"),
        ("\xff\xfe\x00", "cannot read"),
    ],
)
def test_a_bad_file_of_rates_names_its_line(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "lr.csv"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=said) as caught:
        read_points(file)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("cosine", {}, "needs its total steps"),
        ("wsd", {"total_steps": 100}, "decay steps are needed"),
        ("cosine", {"total_steps": 100, "decay_steps": 3}, "no decay steps"),
        ("cosine", {"total_steps": 100, "warmup_steps": 100}, "do not fit into 100"),
        ("wsd", {"total_steps": 100, "warmup_steps": 50, "decay_steps": 51}, "do not fit into 100"),
        ("constant", {"min_ratio": 0.1}, "no least learning rate"),
        ("cosine", {"total_steps": 100, "min_ratio": 2.0}, "min_ratio"),
        ("constant", {"peak": None}, "no learning rate"),
        ("constant", {"peak": math.nan}, "peak"),
        ("constant", {"peak": 0.0}, "peak"),
        ("triangle", {}, "one of: constant"),
        ("lr.csv", {}, "drop --lr"),
    ],
)
def test_a_bad_schedule_of_rates_is_refused(kind: str, options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        rates(kind, **options)


@given(
    st.sampled_from([("linear", {}), ("cosine", {"min_ratio": 0.3}), ("wsd", {"decay_steps": 20}), ("inverse-sqrt", {})]),
    st.integers(0, 60),
    st.integers(0, 99),
    st.floats(1e-5, 2 * PEAK),
)
def test_settling_is_what_brute_force_finds(kind: tuple, warmup: int, start: int, limit: float) -> None:
    schedule = rates(kind[0], warmup_steps=warmup, total_steps=100, **kind[1])
    first = max(start, warmup)
    fits = [s for s in range(first, 100) if all(lr_at(schedule, t) <= limit for t in range(s, 100))]
    assert settles(schedule, limit, start) == (fits[0] if fits else None)
    assert highest_from(schedule, start) == max(lr_at(schedule, s) for s in range(start, 100))
