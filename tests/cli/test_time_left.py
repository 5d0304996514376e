"""The time left: in round numbers, a promise that is kept or taken back, and never one that creeps up."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest

from curvcli.cli.progress import TimeLeft, _round, reporting


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "5 s"), (5, "5 s"), (5.1, "10 s"), (54, "55 s"), (56, "60 s"), (61, "70 s"), (111, "2 min"), (121, "3 min"),
        (7000, "117 min"), (7200, "2 h"), (7300, "3 h"), (1e6, "278 h"),
    ],
)  # fmt: skip
def test_numbers_are_round_and_not_too_low(seconds: float, said: str) -> None:
    assert _round(seconds) == said


def seconds(said: str) -> float:
    number, unit = re.fullmatch(r"(?:longer than thought: )?about (\d+) (s|min|h) left", said).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "min": 60, "h": 3600}[unit]


@pytest.mark.parametrize("seed", range(20))
def test_it_never_rises_without_a_word(seed: int) -> None:
    """Work of stages whose costs were guessed wrong, fourfold both ways."""
    rolled = random.Random(seed)  # noqa: S311
    left, now, done, said = TimeLeft(0.0), 0.0, 0.0, []
    while done < 1:
        pace = rolled.choice([0.25, 1, 4])
        for _ in range(20):
            now, done = now + 0.5 * pace, min(1.0, done + 0.005)
            said.append(left(now, done))
    assert not any(said[:9])
    told = [line for line in said if line]
    rises = [(a, b) for a, b in itertools.pairwise(told) if seconds(b) > seconds(a)]
    assert all(b.startswith("longer than thought: ") for _, b in rises)
    assert len(rises) <= 5
    assert told[-1].endswith("about 5 s left")


def test_work_that_stands_still_says_so_once_its_time_is_over() -> None:
    left = TimeLeft(0.0)
    assert left(10.0, 0.5) == "about 10 s left"
    assert left(15.0, 0.5) == "about 5 s left"  # as was promised, and not 15
    assert left(21.0, 0.5) == "longer than thought: about 25 s left"
    assert left(22.0, 0.9) == "longer than thought: about 5 s left"


def test_lines_have_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 6.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with reporting(False) as told:
        told("gradient", 0.01)
        told("full model", 0.5)
        told("layer 0", 0.3)
    assert capsys.readouterr().err.splitlines() == [
        "curv:   1% gradient", "curv:  50% full model, about 15 s left", "curv:  30% layer 0, about 10 s left",
    ]  # fmt: skip
