"""A run that is being written: looks when something is new and whole, and only then; events; deleted checkpoints stay."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ASSETS
from tiny import run_of

from curvcli.analysis import cache as caching
from curvcli.analysis.cache import MemoryCache, checkpoint_digest, digests_kept
from curvcli.analysis.checkpoint import Opened
from curvcli.analysis.follow import Look, follow
from curvcli.documents import Report, load_report
from curvcli.errors import UsageError

CALM, HOT = (load_report(ASSETS / f"{name}-60.gate.report.json") for name in ("calm", "hot"))


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("master"), 3, 4, 5).parent


@pytest.fixture
def home(master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job's directory in which no checkpoint is yet."""
    shutil.copytree(master, tmp_path / "home")
    shutil.move(tmp_path / "home" / "run", tmp_path / "later")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path


def add(home: Path, step: int) -> None:
    shutil.copytree(home / "later" / f"checkpoint-{step}", home / "home" / "run" / f"checkpoint-{step}")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> dict[int, Report]:
    """What is measured, by step; the number of measurements is that of keys asked for."""
    found: dict[int, Report] = {3: CALM, 4: HOT, 5: HOT}

    def measure(opened: Opened, *rest: object) -> Report:
        asked.append(opened.checkpoint.step)
        report = found[opened.checkpoint.step]
        place = {"path": str(opened.checkpoint.path), "step": opened.checkpoint.step}
        return report.model_copy(update={"checkpoint": report.checkpoint.model_copy(update=place)})

    asked: list[int | None] = []
    monkeypatch.setattr(Opened, "measure", measure)
    found[0] = asked  # type: ignore[assignment]
    return found


class Clock:
    """Does the next thing at each wait, and ends the looks after the last."""

    def __init__(self, *things: Callable[[], object]) -> None:
        self.things = list(things)

    def __call__(self, seconds: float) -> None:
        if not self.things:
            raise StopWatching
        self.things.pop(0)()


class StopWatching(Exception):  # noqa: N818
    pass


def looks(clock: Clock, **options: Any) -> list[Look]:
    found: list[Look] = []
    with suppress(StopWatching):
        for look in follow(Path("run"), sleep=clock, device="cpu", tokens=64, **options):
            found.append(look)
    return found


def nothing() -> None:
    pass


def test_each_new_checkpoint_is_measured_once(home: Path, reports: dict[int, Any]) -> None:
    clock = Clock(nothing, lambda: add(home, 3), nothing, nothing, lambda: add(home, 4), nothing, nothing, nothing)
    found = looks(clock)
    assert [[p.step for p in look.track.points] for look in found] == [[3], [3, 4]]
    assert reports[0] == [3, 4], "what is known is not measured again"


def test_what_is_still_written_is_left_alone(home: Path, reports: dict[int, Any]) -> None:
    file = home / "home" / "run" / "checkpoint-3" / "optimizer.pt"

    def grow() -> None:
        with file.open("ab") as stream:
            stream.write(b"\0")

    found = looks(Clock(lambda: add(home, 3), grow, grow, grow))
    assert found == []
    assert reports[0] == []


def test_a_checkpoint_that_is_written_again_is_measured_again(home: Path, reports: dict[int, Any]) -> None:
    def rewrite() -> None:
        place = home / "home" / "run" / "checkpoint-3"
        state = torch.load(place / "optimizer.pt", weights_only=True)
        state["param_groups"][0]["lr"] = 5e-3
        torch.save(state, place / "optimizer.pt")

    looks(Clock(lambda: add(home, 3), nothing, rewrite, nothing, nothing))
    assert reports[0] == [3, 3]


def test_events(home: Path, reports: dict[int, Any]) -> None:
    (home / "home" / "curv.toml").open("a").write("[gate]\nmax-rho = 1.0\n")
    clock = Clock(lambda: add(home, 3), nothing, lambda: add(home, 4), nothing, lambda: add(home, 5), nothing)
    first, second, third = looks(clock)
    assert first.events == []
    assert first.gate.outcome != "broken"
    assert [event.kind for event in second.events] == ["gate", "verdict"]
    gate, verdict = second.events
    assert (verdict.before, verdict.now) == (CALM.verdict, HOT.verdict)
    assert "step 4" in gate.message
    assert third.events == [], "it is as it was"
    told = second.told(gate)
    assert (told["event"], told["step"], told["gate"], told["verdict"]) == ("gate", 4, "broken", HOT.verdict)


def test_a_gate_that_is_broken_at_first_is_told(home: Path, reports: dict[int, Any]) -> None:
    (home / "home" / "curv.toml").open("a").write("[gate]\nmax-rho = 0.01\n")
    (look,) = looks(Clock(lambda: add(home, 3), nothing))
    assert [event.kind for event in look.events] == ["gate"]


def test_deleted_checkpoints_stay_in_the_track(home: Path, reports: dict[int, Any]) -> None:
    def rotate() -> None:
        add(home, 5)
        shutil.rmtree(home / "home" / "run" / "checkpoint-4")

    clock = Clock(lambda: add(home, 3), nothing, lambda: add(home, 4), nothing, rotate, nothing)
    assert [p.step for p in looks(clock)[-1].track.points] == [3, 4, 5]


def test_trouble_is_told_and_watching_goes_on(home: Path, reports: dict[int, Any]) -> None:
    (home / "home" / "curv.toml").unlink()

    def mend() -> None:
        (home / "home" / "curv.toml").write_text('data = "data/shard.bin"\nsequence-length = 16\n')
        add(home, 4)

    first, second = looks(Clock(lambda: add(home, 3), nothing, mend, nothing))
    assert first.track is None
    assert "no data shard" in first.trouble
    assert [p.step for p in second.track.points] == [3, 4]


@pytest.mark.parametrize("run", ["s3://bucket/run", "hf://a/b"])
def test_a_url_is_refused(run: str) -> None:
    with pytest.raises(UsageError, match="is a URL"):
        next(follow(Path(run)))


def test_options_are_checked_before_anything_is_waited_for() -> None:
    with pytest.raises(UsageError, match="no option"):
        next(follow(Path("run"), nonsense=1))
    with pytest.raises(UsageError, match="--interval"):
        next(follow(Path("run"), interval=float("nan")))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []
    real = caching._content_digest
    monkeypatch.setattr(caching, "_content_digest", lambda path: read.append(path) or real(path))  # type: ignore[func-returns-value]
    return read


def test_contents_are_digested_again_where_they_changed(tmp_path: Path, counted: list[Path]) -> None:
    (tmp_path / "a").write_text("one")
    with digests_kept():
        first = checkpoint_digest(tmp_path)
        assert checkpoint_digest(tmp_path) == first
        assert len(counted) == 1
        (tmp_path / "a").write_text("three")
        assert checkpoint_digest(tmp_path) != first
    checkpoint_digest(tmp_path)
    checkpoint_digest(tmp_path)
    assert len(counted) == 4, "elsewhere contents are read each time"


def test_a_cache_in_memory_has_one_behind() -> None:
    behind = MemoryCache()
    behind.put("a", CALM)
    front = MemoryCache(behind)
    assert front.get("a") == CALM
    front.put("b", HOT)
    assert behind.get("b") == HOT
    assert front.get("c") is None
