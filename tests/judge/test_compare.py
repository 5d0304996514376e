"""Two reports side by side."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from places import ASSETS
from real import curv
from tiny import run_of

from curvcli.documents import BodyEstimate, Report, load_comparison, load_report
from curvcli.judge.compare import compare
from curvcli.render.compare import to_csv, to_markdown

CALM, HOT = ASSETS / "calm-60.gate.report.json", ASSETS / "hot-60.gate.report.json"


@pytest.fixture
def calm() -> Report:
    return load_report(CALM)


@pytest.fixture
def hot() -> Report:
    return load_report(HOT)


def test_ratios_are_of_what_is_certified(calm: Report, hot: Report) -> None:
    found = compare(calm, hot, names=("a", "b"))
    assert [c.name for c in found.changes] == ["full model", "embedding, head", *(layer.name for layer in calm.layers)]
    for change, a, b in zip(found.changes, (calm.full, *calm.parts), (hot.full, *hot.parts), strict=True):
        assert a.eigenvalue is not None
        assert b.eigenvalue is not None
        assert change.ratio == pytest.approx(b.eigenvalue / a.eigenvalue)
        assert change.rho_ratio == pytest.approx(b.rho / a.rho)  # type: ignore[operator]
        assert change.low is not None
        assert change.high is not None
        assert change.low <= change.ratio <= change.high
        # The true ratio, were either lambda at the end of its residual, is inside.
        assert change.low <= b.eigenvalue / (a.eigenvalue + (a.residual or 0)) <= change.high
    assert [f.code for f in found.findings] == ["layer-rose", "verdict-changed"]
    assert found.findings[1].severity == "error"


def test_what_is_not_certified_has_no_ratio(calm: Report, hot: Report) -> None:
    weak = hot.layers[2].model_copy(update={"status": "unconverged"})
    concave = hot.layers[3].model_copy(update={"eigenvalue": -1.0})
    hot = hot.model_copy(update={"layers": [*hot.layers[:2], weak, concave, *hot.layers[4:]]})
    changes = compare(calm, hot, names=("a", "b")).changes
    assert (changes[4].ratio, changes[4].second, changes[4].message) == (None, None, "the second is unconverged")
    assert (changes[5].ratio, changes[5].message) == (None, "lambda is not positive")
    assert "| -" in to_markdown(compare(calm, hot, names=("a", "b")))


def test_a_bracket_goes_up_to_the_ceiling(calm: Report, hot: Report) -> None:
    """Between the residual's end and the ceiling an eigenvalue may lie that no vector was near."""
    (x, y) = (report.full.eigenvalue or 0.0 for report in (calm, hot))
    reports = [
        r.model_copy(update={"full": r.full.model_copy(update={"ceiling": 1.5 * r.full.eigenvalue})}) for r in (calm, hot)
    ]
    change = compare(*reports, names=("a", "b")).changes[0]
    assert (change.ratio, change.low, change.high) == pytest.approx((y / x, y / (1.5 * x), 1.5 * y / x))
    lower = [r.model_copy(update={"full": r.full.model_copy(update={"ceiling": r.full.eigenvalue})}) for r in (calm, hot)]
    assert compare(*lower, names=("a", "b")).changes[0] == compare(calm, hot, names=("a", "b")).changes[0]


def without_rare_rows(report: Report) -> Report:
    body = BodyEstimate(**report.full.model_dump() | {"eigenvalue": 70.0, "rho": 0.07, "residual": 7.0}, rows=3)
    return report.model_copy(update={"body": body})


def test_what_each_report_judged_is_compared(calm: Report, hot: Report) -> None:
    """Not the full model, where rare rows carry its top direction and the verdict is on the rest."""
    change = compare(without_rare_rows(calm), without_rare_rows(hot), names=("a", "b")).changes[0]
    assert (change.name, change.first, change.second, change.ratio) == ("without rare rows", 70.0, 70.0, 1.0)
    assert (change.low, change.high) == pytest.approx((70 / 77, 77 / 70))
    mixed = compare(calm, without_rare_rows(calm), names=("a", "b"))
    assert (mixed.changes[0].name, mixed.changes[0].first) == ("what was judged", calm.full.eigenvalue)
    assert (mixed.changes[0].second, mixed.changes[0].second_rho) == (70.0, 0.07)
    assert [f.code for f in mixed.findings] == ["other-rows"]
    assert mixed.findings[0].message.startswith("the second is judged without its rare rows")


@pytest.mark.parametrize(
    ("part", "update", "code"),
    [
        ("data", {"sha256": "0" * 64}, "other-data"),
        ("optimizer", {"name": "SGD"}, "other-optimizer"),
        ("optimizer", {"preconditioner": "estimated"}, "other-preconditioner"),
        ("optimizer", {"clip": 0.2}, "other-clipping"),
        ("checkpoint", {"parameters": 7}, "other-size"),
    ],
)
def test_what_is_not_like_for_like_is_said(calm: Report, part: str, update: dict, code: str) -> None:
    other = calm.model_copy(update={part: getattr(calm, part).model_copy(update=update)})
    assert [f.code for f in compare(calm, other, names=("a", "b")).findings] == [code]
    assert compare(calm, calm, names=("a", "b")).findings == []


def test_clipping_that_is_known_of_both_or_is_none_is_like_for_like(calm: Report) -> None:
    def clipped(share: float | None) -> Report:
        return calm.model_copy(update={"optimizer": calm.optimizer.model_copy(update={"clip": share})})

    for one, other in ((0.2, 0.9), (None, 1.0), (1.0, None)):
        assert compare(clipped(one), clipped(other), names=("a", "b")).findings == []


def test_csv(calm: Report, hot: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(compare(calm, hot, names=("a", "b"))))))
    assert len(rows) == 10
    assert float(rows[0]["ratio"]) == pytest.approx(hot.full.eigenvalue / calm.full.eigenvalue)  # type: ignore[operator]


def test_the_command(tmp_path: Path) -> None:
    done = curv("compare", CALM, HOT, "-o", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "x6.36" in done.stdout
    assert json.loads(curv("compare", CALM, HOT, "--format", "json").stdout) == json.loads((tmp_path / "c.json").read_text())
    assert load_comparison(tmp_path / "c.json").second.verdict == "unstable"
    bad = curv("compare", CALM, tmp_path / "none.json")
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1


def test_documents_go_by_content(tmp_path: Path) -> None:
    bare = tmp_path / "report"
    bare.write_bytes(CALM.read_bytes())
    assert curv("compare", bare, HOT).returncode == 0
    other = tmp_path / "other.json"
    other.write_bytes((ASSETS / "documents" / "0.1.0" / "track.json").read_bytes())
    for arguments, said in (
        ((other, HOT), "is a track of many checkpoints"),
        ((CALM, HOT, "--lr", 1), "--lr is for checkpoints"),
    ):
        refused = curv("compare", *arguments)
        assert refused.returncode == 2
        assert said in refused.stderr


def test_markdown_says_what_the_two_are(calm: Report, hot: Report) -> None:
    text = to_markdown(compare(calm, hot, names=("a", "b")))
    assert "- A: step 60, loss " in text
    assert text.count("update ratio ") == sum(r.update.ratio is not None for r in (calm, hot)) > 0
    assert text.count(", unstable\n") == 1


@pytest.mark.slow
def test_a_checkpoint_against_a_report(tmp_path: Path) -> None:
    checkpoint = run_of(tmp_path, 9) / "checkpoint-9"
    done = curv("compare", checkpoint, checkpoint, "--tokens", 128, "--mode", "kept", "--format", "json", "-q")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # The second is solved from the first one's eigenvectors, and finds the same.
    assert all(change["ratio"] == pytest.approx(1, abs=0.02) for change in found["changes"])
    assert found["findings"] == []
