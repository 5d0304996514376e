"""Documents and configurations, damaged at random: read, or refused in one line. `CURV_FUZZ=N` tries N of each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import DAMAGES, Draw, attempt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logs import record, write
from places import ASSETS
from tracks import course_of
from typer.testing import CliRunner

from curvcli.analysis.config import find_config, find_gate
from curvcli.cli import app
from curvcli.documents import (
    Rule,
    load_comparison,
    load_gate,
    load_records,
    load_report,
    load_schedule,
    load_track,
    load_track_comparison,
)
from curvcli.judge.compare import compare
from curvcli.judge.compare_tracks import compare_tracks
from curvcli.judge.gate import decide
from curvcli.judge.readings import ReportReadings
from curvcli.render.html import page
from curvcli.schedules.lr import read_points
from curvcli.schedules.plan import grow

ASSET = ASSETS / "hot-60.json"
EXAMPLES = int(os.environ.get("CURV_FUZZ", "12"))
CONFIG = """# of a run
data = ["data/a.bin", 'data/b.bin']  # two
sample = "spread"
tokens = 8_192
seed = 3

[gate]
max-rho = 1.0
max-regression = 5.5
unresolved = "fail"
baseline = "last-good.json"
"""
PYPROJECT = '[project]\nname = "x"\n\n[tool.curv]\ntokens = 64\n\n[tool.curv.gate]\nmax-rho = 1.0\n'


def _configuration(file: Path) -> None:
    find_config(file.parent)
    find_gate(file.parent)


def _report(file: Path) -> None:
    load_report(file)
    page(file)


def _track(file: Path) -> None:
    load_track(file)
    page(file)


def _schedule(file: Path) -> None:
    plan = load_schedule(file)
    plan.locked_at(2**53)
    page(file)


def _written(kind: str, file: Path) -> None:
    report = load_report(ASSET)
    if kind == "curvature.jsonl":
        write(file, *map(record, range(12)))
        return
    texts: dict[str, Callable[[], str]] = {
        "curv.toml": lambda: CONFIG,
        "pyproject.toml": lambda: PYPROJECT,
        "lr.csv": lambda: "step,lr\n0,0.1\n10,0.2\n90,0\n",
        "report.json": report.to_json,
        "track.json": lambda: course_of([1.0, None, 1.2]).to_json(),
        "schedule.json": lambda: grow(8).to_json(),
        "compare.json": lambda: compare(report, report, names=("a", "b")).to_json(),
        "compare-tracks.json": lambda: compare_tracks(course_of([1.0]), course_of([1.1]), names=("a", "b")).to_json(),
        "gate.json": lambda: decide(
            [Rule(name="max-rho", limit=1.0, source="x")], ReportReadings(report), report, path="a", kind="report"
        ).to_json(),
    }
    file.write_text(texts[kind]())


READERS: dict[str, Callable[[Path], object]] = {
    "curv.toml": _configuration,
    "pyproject.toml": _configuration,
    "lr.csv": read_points,
    "report.json": _report,
    "track.json": _track,
    "schedule.json": _schedule,
    "compare.json": load_comparison,
    "compare-tracks.json": load_track_comparison,
    "gate.json": load_gate,
    "curvature.jsonl": load_records,
}
# What else may stand where another document is expected.
MIXED = ("another document", lambda file, draw: shutil.copy(ASSET, file))
EVERY = (*DAMAGES, MIXED)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


def fresh(place: Path, kind: str) -> Path:
    shutil.rmtree(place / kind, ignore_errors=True)
    (place / kind).mkdir()
    _written(kind, place / kind / kind)
    return place / kind / kind


def read(kind: str, file: Path) -> str:
    READERS[kind](file)
    return "read"


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize="CURV_FUZZ" not in os.environ, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(damage=st.integers(0, len(EVERY) - 1), seed=st.integers(0, 2**32))
def test_damaged_documents(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch, damage: int, seed: int) -> None:
    file = fresh(place, kind)
    monkeypatch.chdir(file.parent)  # so that a configuration is the user's own, and its rules are read
    EVERY[damage][1](file, Draw(damage, seed))
    assert attempt(lambda: read(kind, file)) in ("read", "refused")


@pytest.mark.parametrize("kind", READERS)
def test_undamaged_documents_are_read(kind: str, place: Path) -> None:
    assert attempt(lambda: read(kind, fresh(place, kind))) == "read"


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("damage", ["empty", "directory", "pipe", "link to itself", "noise"])
def test_verbs_say_it_in_one_line(kind: str, damage: str, place: Path) -> None:
    file = fresh(place, kind)
    dict(EVERY)[damage](file, Draw(0, 0))
    for words in (
        ["report", file],
        ["gate", file, "--max-rho", "1"],
        ["watch", "--once", file],
        ["schedule", "--from", file],
    ):
        done = CliRunner().invoke(app, [str(word) for word in words])
        if words[0] == "watch" and damage == "empty":
            continue  # a log in which nothing is written yet
        assert done.exit_code == 2, (words, done.stdout)
        assert done.stderr.count("\n") == 1, done.stderr
        assert "internal error" not in done.stderr, done.stderr
