"""Two runs side by side: which is further below its edge, by whose bracket, and since when."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from places import ASSETS
from rich.console import Console
from tracks import asset, at, failed, track
from typer.testing import CliRunner

import curvcli
from curvcli.cli import app
from curvcli.documents import Report, Track, TrackComparison, load_track_comparison
from curvcli.errors import InputError, UsageError
from curvcli.judge.compare_tracks import compare_tracks
from curvcli.render.compare_tracks import ranking, show, to_csv, to_markdown

CALM = asset("calm")


def run(name: str, points: dict[int, float], base: Report = CALM, **full: Any) -> Track:
    """A run whose rho is `base`'s times a scale, by step."""
    return track([at(base, step, scale, **full) for step, scale in points.items()], run=name)


def compared(a: Track, b: Track) -> TrackComparison:
    return compare_tracks(a, b, names=(a.run, b.run))


A = run("a", {10: 0.5, 20: 0.5, 30: 0.5, 40: 0.5})
B = run("b", {10: 0.4, 20: 0.6, 35: 0.1, 40: 0.7})


def test_only_shared_steps_rank_and_the_last_row_says_since_when() -> None:
    found = compared(A, B)
    assert [(s.step, s.first is None, s.second is None, s.further) for s in found.steps] == [
        (10, False, False, "second"), (20, False, False, "first"), (30, False, True, None), (35, True, False, None),
        (40, False, False, "first"),
    ]  # fmt: skip
    assert (found.further, found.since, found.ranked) == ("first", 20, 3)
    assert found.steps[-1].rho_ratio == pytest.approx(0.7 / 0.5)
    assert ranking(found) == (
        "A is further below its edge since step 20, at 2 of 3 common steps; rho of B over A is 1.40 at step 40"
    )
    other = compared(B, A)
    assert (other.further, other.since) == ("second", 20)
    assert ranking(other).startswith("B is further below its edge since step 20")


def test_brackets_that_meet_rank_nothing() -> None:
    # The residual of calm-60 is 0.6 % of lambda: at 0.1 % apart the brackets meet.
    found = compared(A, run("b", {10: 0.4, 20: 0.5005}))
    assert [step.further for step in found.steps[:2]] == ["second", None]
    assert (found.further, found.since, found.ranked) == (None, 20, 2)
    assert "their brackets of rho meet" in ranking(found)


def test_a_rho_that_clipping_may_have_made_too_high_is_not_further_up() -> None:
    clipped = CALM.model_copy(
        update={"optimizer": CALM.optimizer.model_copy(update={"gradient_ratio": 4.0, "batch_ratio": 8.0})}
    )
    for rho, further in ((1.4, None), (14.0, "first")):
        assert compared(run("a", {20: 1.0}), run("b", {20: rho}, clipped)).steps[0].further == further


def test_on_the_same_tokens_brackets_are_those_of_residuals_and_else_of_the_data() -> None:
    (step,) = compared(run("a", {10: 1.0}), run("b", {10: 1.0})).steps
    assert step.bracket == "shard"
    assert step.first is not None
    threshold, residual = CALM.optimizer.threshold, CALM.judged.residual
    assert step.first.high == pytest.approx(CALM.judged.rho + residual / threshold)  # type: ignore[operator]
    over = CALM.full.model_copy(update={"ceiling": 1.5 * CALM.full.eigenvalue})  # type: ignore[operator]
    (step,) = compared(run("a", {10: 1.0}), run("b", {10: 1.0}, CALM.model_copy(update={"full": over}))).steps
    assert step.second is not None
    assert step.second.high == pytest.approx(1.5 * CALM.judged.rho)  # type: ignore[operator]
    elsewhere = CALM.model_copy(update={"data": CALM.data.model_copy(update={"sha256": "0" * 64})})
    found = compared(run("a", {10: 1.0}), run("b", {10: 1.0}, elsewhere))
    (step,) = found.steps
    assert step.bracket == "data"
    assert step.second is not None
    assert (step.second.low, step.second.high) == (CALM.generalisation.rho_low, CALM.generalisation.rho_high)
    assert [f.code for f in found.findings] == ["other-data"]
    nothing = {"held_out": None}  # a shard of one batch: its ends say nothing of the data
    single = elsewhere.model_copy(update={"generalisation": CALM.generalisation.model_copy(update=nothing)})
    found = compared(run("a", {10: 1.0}), run("b", {10: 1.0}, single))
    assert (found.ranked, found.further) == (0, None)
    assert "nothing-ranked" in [f.code for f in found.findings]


def test_what_is_not_certified_or_too_early_ranks_nothing() -> None:
    weak = run("b", {10: 0.1}, status="unconverged")
    (step,) = compared(run("a", {10: 1.0}), weak).steps
    assert (step.ranked, step.further) == (False, None)
    assert step.second is not None
    assert (step.second.rho, step.second.low, step.second.status) == (None, None, "unconverged")
    young = track([at(CALM, 10, 0.1).model_copy(update={"verdict": "early"})], run="b")
    (step,) = compared(run("a", {10: 1.0}), young).steps
    assert (step.ranked, step.further) == (False, None)
    assert step.second is not None
    assert step.second.rho is not None


def test_a_line_breaks_where_its_checkpoint_has_no_value() -> None:
    weak = track([at(CALM, 10, 0.4), at(CALM, 20, 0.5, status="unconverged"), at(CALM, 30, 0.6)], run="b")
    drawn = compared(run("a", {10: 0.5, 30: 0.5}), weak).plot().axes[0]
    lines = [line.get_ydata() for line in drawn.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]
    assert [[y != y for y in line] for line in lines if len(line) > 1][:2] == [[False, False], [False, True, False]]


def test_past_the_edge_nobody_is_below_it() -> None:
    found = compared(run("a", {10: 4.0}), run("b", {10: 5.0}))
    assert ranking(found).startswith("A is less far past its edge since step 10")


def test_runs_without_a_common_step_or_any_step_are_said_so() -> None:
    found = compared(run("a", {10: 1.0}), run("b", {20: 1.0}))
    assert ranking(found) == "no step ranks them"
    assert found.findings[0].code == "no-common-step"
    nameless = run("b", {10: 1.0})
    points = [point.model_copy(update={"step": None}) for point in nameless.points]
    found = compared(run("a", {10: 1.0}), nameless.model_copy(update={"points": points}))
    assert "no-step" in [f.code for f in found.findings]
    nothing = compared(track([failed(10)], run="a"), track([failed(10)], run="b"))
    assert (nothing.steps, nothing.first.verdict, nothing.first.points) == ([], None, 0)
    assert "nan" not in to_markdown(nothing).lower()


def test_where_verdicts_part_is_said() -> None:
    hot = asset("hot")
    found = compared(run("a", {10: 1.0, 60: 1.0}), track([at(CALM, 10), at(hot, 60)], run="b"))
    messages = {f.code: f.message for f in found.findings}
    assert messages["verdicts-differ"] == "verdicts differ since step 60, there A stable and B unstable"
    assert "run-verdicts-differ" in messages


def test_csv_has_both_at_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(compared(A, B)))))
    assert [row["step"] for row in rows] == ["10", "20", "30", "35", "40"]
    assert float(rows[0]["rho_a"]) == A.points[0].report.judged.rho
    assert rows[2]["rho_b"] == ""
    assert rows[-1]["further"] == "A"


@pytest.mark.parametrize("width", [60, 64, 70, 76, 84, 92, 100, 108, 116, 200])
def test_a_terminal_has_both_columns_of_a_pair_or_none(width: int) -> None:
    shown = io.StringIO()
    show(compared(A, B), Console(width=width, file=shown))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    head = next(line for line in lines if line.split()[:1] == ["step"])
    titles = [title.strip() for title in head.split("  ") if title.strip()]
    assert {"rho A", "rho B", "verdict A", "verdict B"} <= set(titles)
    assert all(f"{title[:-1]}{other}" in titles for title in titles if title[-2:] in (" A", " B") for other in "AB")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(A.to_json())
    second.write_text(B.to_json())
    return first, second


def test_the_command(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "c.json"  # --plot is run by the tests of docs/how-to/track.md
    done = CliRunner().invoke(app, ["compare", *map(str, files), "-o", str(out), "--format", "json"])
    assert json.loads(done.stdout) == json.loads(out.read_text())
    assert load_track_comparison(out) == curvcli.compare(*files)
    refused = CliRunner().invoke(app, ["compare", *map(str, files), "--lr", "1"])
    assert (refused.exit_code, "--lr is for checkpoints, and both are tracks" in refused.stderr) == (2, True)


def test_from_python_by_hand(files: tuple[Path, Path]) -> None:
    found = curvcli.compare(A, B)
    assert (found.first.path, found.further) == ("a", "first")
    assert repr(found).startswith("<TrackComparison of a with b: A is further below")
    assert curvcli.compare(A, files[1]).second.path == str(files[1])
    with pytest.raises(InputError, match="is none"):
        curvcli.compare(A, ASSETS / "calm-60.gate.report.json")
    with pytest.raises(UsageError, match="both are tracks"):
        curvcli.compare(A, B, lr=1.0)
