"""Rules held for several points of a run: `--any` and `--last`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tracks import asset, at, failed, track

from curvcli.analysis.gate import gate
from curvcli.documents import Track
from curvcli.errors import UsageError

RHO = asset("calm").full.rho or 0.0


@pytest.fixture
def hill() -> Track:
    """rho up and down again: the newest point alone would pass what the run does not."""
    return track([at(asset("calm"), step, scale) for step, scale in ((20, 1.0), (40, 3.0), (60, 2.0), (80, 1.0))])


def test_the_newest_alone_unless_asked(hill: Track) -> None:
    found = gate(hill, max_rho=2 * RHO)
    assert (found.outcome, found.subject.points, found.outcomes[0].step) == ("passed", 1, None)


@pytest.mark.parametrize(("last", "outcome"), [(1, "passed"), (2, "passed"), (3, "broken"), (4, "broken"), (99, "broken")])
def test_the_newest_so_many(hill: Track, last: int, outcome: str) -> None:
    found = gate(hill, max_rho=2.4 * RHO, last=last)
    assert (found.outcome, found.subject.points) == (outcome, min(last, 4))
    if outcome == "broken":
        assert found.outcomes[0].step == 40
        assert found.outcomes[0].message.startswith("step 40: rho ")


def test_any_names_the_newest_that_breaks_and_the_others(hill: Track) -> None:
    found = gate(hill, max_rho=0.5 * RHO, any=True, min_tokens=1)
    rho, tokens = found.outcomes
    assert (rho.outcome, rho.step) == ("broken", 80)
    assert rho.message.endswith("; broken too: step 20, step 40, step 60")
    assert tokens.message.startswith("at all 4 points; step 80: ")


def test_a_point_that_was_not_measured_leaves_it_unresolved(hill: Track) -> None:
    points = [hill.points[0], failed(40, "damaged"), *hill.points[3:]]
    gap = hill.model_copy(update={"points": points})
    assert gate(gap, max_rho=9 * RHO).outcome == "passed"
    found = gate(gap, max_rho=9 * RHO, any=True)
    assert found.outcome == "unresolved"
    assert "damaged" in found.outcomes[0].message
    assert gate(gap, max_rho=0.1 * RHO, any=True).outcome == "broken"


def test_surges_are_over_each_points_own_past(hill: Track) -> None:
    points = [at(asset("calm"), step, scale) for step, scale in ((20, 1.0), (40, 1.0), (60, 4.0), (80, 1.0))]
    found = gate(track(points), max_surge=2.0, any=True)
    assert (found.outcome, found.outcomes[0].step) == ("broken", 60)
    # Of the first two there is no past to be over.
    assert gate(track(points), max_surge=9.0, any=True).outcome == "unresolved"
    assert gate(track(points), max_surge=9.0, last=2).outcome == "passed"


def test_a_report_has_no_points() -> None:
    with pytest.raises(UsageError, match="--any and --last are for runs and tracks"):
        gate(asset("calm"), max_rho=1.0, any=True)


def test_keys_of_the_table(hill: Track, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curv.toml").write_text("[gate]\nmax-rho = 0.001\nlast = 3\n")
    assert gate(hill).subject.points == 3
    assert gate(hill, last=2).subject.points == 2
    (tmp_path / "curv.toml").write_text("[gate]\nmax-rho = 0.001\nany = true\n")
    assert gate(hill).subject.points == 4
