"""A run over its checkpoints: order, cache, resume, failure, surge, and the same numbers as one by one."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from real import CURV, curv, process, variables
from tiny import run_of
from tracks import course_of

from curvcli.analysis.cache import FileCache, NoCache
from curvcli.analysis.checkpoint import Opened, Options, analyze_checkpoint, open_for_analysis
from curvcli.analysis.track import _findings, _in_order, key_of, track_run
from curvcli.checkpoints import find_checkpoints
from curvcli.documents import Report, Track, load_track
from curvcli.documents.columns import ruled
from curvcli.errors import InputError
from curvcli.judge.readings import track_readings
from curvcli.models import user_digest
from curvcli.render.track_table import to_csv

OPTIONS = Options(tokens=128, depths=False, max_hvps=24, mode="kept")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints, free to damage."""
    return run_of(tmp_path_factory.mktemp("calm"), 10, 60)


@pytest.fixture(scope="module")
def tracked(calm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Track, Path]:
    folder = tmp_path_factory.mktemp("cache")
    return track_run(calm, OPTIONS, FileCache(folder)), folder


def without_cost(track: Track) -> list[dict]:
    found = []
    for point in track.points:
        assert point.report is not None
        report = point.report.model_dump(exclude={"cost"})
        found.append(report)
    return found


def test_points_are_in_step_order(tracked: tuple[Track, Path]) -> None:
    track, _ = tracked
    assert [p.step for p in track.points] == [10, 60]
    assert [p.source for p in track.points] == ["measured", "measured"]
    second = track.points[1]
    assert [e.step for e in track.log][:3] == [1, 2, 3]
    assert second.training_loss == track.log[59].loss
    assert track.points[0].report is not None
    assert track.points[0].report.cumulative.restricted == []


@pytest.mark.slow
def test_a_point_is_what_the_checkpoint_alone_gives(tracked: tuple[Track, Path], calm: Path) -> None:
    point = tracked[0].points[1].report
    assert point is not None
    alone = analyze_checkpoint(calm / "checkpoint-60", OPTIONS)
    assert point.model_dump(exclude={"cost"}) == alone.model_dump(exclude={"cost"})


def test_a_second_call_measures_nothing(tracked: tuple[Track, Path], calm: Path) -> None:
    track, folder = tracked
    again = track_run(calm, OPTIONS, FileCache(folder))
    assert [p.source for p in again.points] == ["cached", "cached"]
    assert again.hvps == 0
    assert [p.report for p in again.points] == [p.report for p in track.points]


def test_what_is_cached_counts_for_no_time(tracked: tuple[Track, Path], calm: Path) -> None:
    known = [tracked[0].points[0].report]

    class First(NoCache):
        def get(self, key: str) -> Report | None:
            return known.pop() if known else None

    said: list[tuple[str, float]] = []
    track_run(calm, OPTIONS, First(), progress=lambda stage, done: said.append((stage, done)))
    fractions = [done for _, done in said]
    assert fractions == sorted(fractions)
    assert next(done for stage, done in said if stage.startswith("checkpoint 2 of 2")) == 0.0
    assert 0.1 < next(done for stage, done in said if stage.endswith("2: layer 0")) < 0.9


@pytest.mark.slow
def test_a_loss_of_ones_own_is_kept_until_its_code_changes(
    calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loss_of_mine.py").write_text("from parts_of_mine import scale\n\ndef loss(model, batch):\n"
                                              "    return scale * model(input_ids=batch, labels=batch).loss\n")  # fmt: skip

    def sources(scale: int) -> set[str]:
        (tmp_path / "parts_of_mine.py").write_text(f"scale = {scale}\n")
        how = ("--tokens", "128", "--max-hvps", "3", "--loss", "loss_of_mine:loss", "--format", "json", "-q")
        monkeypatch.chdir(tmp_path)
        done = process("track", calm, *how, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        return {point["source"] for point in json.loads(done.stdout)["points"]}

    assert [sources(scale) for scale in (1, 1, 2)] == [{"measured"}, {"cached"}, {"measured"}]


def test_code_that_is_loaded_while_it_runs_is_served_to_no_other_process(
    calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(
        "def loss(model, batch):\n    from beside_mine import scale\n"
        "    return scale * model(input_ids=batch, labels=batch).loss\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cache = FileCache(tmp_path / "cache")

    def sources() -> list[str]:
        options = replace(OPTIONS, data=calm.parent / "data" / "shard.bin", sequence_length=16, max_hvps=3, loss="mine:loss")
        return [point.source for point in track_run(calm, options, cache).points]

    def another_process(scale: int) -> None:
        (tmp_path / "beside_mine.py").write_text(f"scale = {scale}\n")
        monkeypatch.setattr(user_digest, "_process", f"of {scale}")
        user_digest._first.clear()
        for name in ("mine", "beside_mine"):
            sys.modules.pop(name, None)

    another_process(1)
    assert [sources(), sources()] == [["measured"] * 2, ["cached"] * 2]
    another_process(22)
    assert sources() == ["measured"] * 2
    another_process(1)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_same_numbers(tracked: tuple[Track, Path], calm: Path, tmp_path: Path) -> None:
    """The first checkpoint alone, as a killed call leaves it; then the whole run."""
    cache = FileCache(tmp_path)
    only = tmp_path / "only"
    shutil.copytree(calm / "checkpoint-10", only / "checkpoint-10")
    track_run(
        only, Options(**{**OPTIONS.__dict__, "data": calm.parent / "data" / "shard.bin", "sequence_length": 16}), cache
    )
    rest = track_run(calm, OPTIONS, cache)
    assert [p.source for p in rest.points] == ["cached", "measured"]
    assert rest.points[0].report is not None
    assert rest.points[0].report.checkpoint.path.startswith(str(calm))
    assert without_cost(rest) == without_cost(tracked[0])


@pytest.mark.slow
def test_what_changed_is_measured_again(tracked: tuple[Track, Path], calm: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(calm.parent, copy)
    shutil.copy(copy / "run" / "checkpoint-10" / "optimizer.pt", copy / "run" / "checkpoint-60" / "optimizer.pt")
    again = track_run(copy / "run", OPTIONS, FileCache(tracked[1]), last=1)
    assert [p.source for p in again.points] == ["measured"]


@pytest.mark.parametrize("change", [None, "weights", "tokens", "option"])
def test_the_key_of_what_changed_is_another(calm: Path, change: str | None, tmp_path: Path) -> None:
    copy, options = tmp_path / "copy", OPTIONS
    shutil.copytree(calm.parent, copy)
    if change == "weights":
        shutil.copy(calm / "checkpoint-10" / "model.safetensors", copy / "run" / "checkpoint-60" / "model.safetensors")
    elif change == "tokens":
        data = bytearray((copy / "data" / "shard.bin").read_bytes())
        data[0] ^= 1
        (copy / "data" / "shard.bin").write_bytes(data)
    elif change == "option":
        options = replace(OPTIONS, lr=1e-4)
    before = key_of(open_for_analysis(calm / "checkpoint-60", OPTIONS))
    assert (key_of(open_for_analysis(copy / "run" / "checkpoint-60", options)) == before) is (change is None)


def test_a_checkpoint_that_cannot_be_read_is_a_point(calm: Path, tracked: tuple[Track, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(calm.parent, copy)
    weights = copy / "run" / "checkpoint-60" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    track = track_run(copy / "run", OPTIONS, FileCache(tracked[1]))
    assert [p.source for p in track.points] == ["cached", "failed"]
    assert track.points[1].step == 60
    assert "safetensors" in (track.points[1].message or "")
    assert any(f.code == "not-measured" for f in track.findings)
    reading = track_readings(track).of(ruled()["max-rho"])[0]
    assert "was not measured" in reading.reason
    (copy / "run" / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="none of 2 checkpoints"):
        track_run(copy / "run", OPTIONS, NoCache())


@pytest.mark.slow
def test_a_read_only_cache_is_no_obstacle(calm: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = FileCache(tmp_path / "file" / "cache")
    track = track_run(calm, OPTIONS, cache, last=1)
    assert track.points[0].source == "measured"
    assert cache.complaint is not None
    assert "cannot be written" in cache.complaint


def test_patterns_and_nanogpt_files(samples: Path, tmp_path: Path) -> None:
    for step in (100, 20, 3):
        shutil.copy(samples / "nanogpt" / "ckpt.pt", tmp_path / f"ckpt_{step}.pt")
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert [p.name for p in find_checkpoints(tmp_path / "ckpt*.pt")] == ["ckpt_3.pt", "ckpt_20.pt", "ckpt_100.pt"]
    assert [p.name for p in find_checkpoints(tmp_path)] == ["ckpt_3.pt", "ckpt_20.pt", "ckpt_100.pt"]
    with pytest.raises(InputError, match="does not exist"):
        find_checkpoints(tmp_path / "other*.pt")


def test_names_without_steps_are_sorted_by_what_the_checkpoints_say(samples: Path, tmp_path: Path) -> None:
    for name, step in (("a", 300), ("b", 20), ("c", 100)):
        content = torch.load(samples / "nanogpt" / "ckpt.pt", weights_only=True)
        (tmp_path / name).mkdir()
        torch.save({**content, "iter_num": step}, tmp_path / name / "ckpt.pt")
    assert [p.parent.name for p in _in_order(find_checkpoints(tmp_path / "*" / "ckpt.pt"))] == ["b", "c", "a"]
    with pytest.raises(InputError, match=r"b/ckpt\.pt: no data shard"):  # the first that is tried
        track_run(tmp_path / "*" / "ckpt.pt", Options(), NoCache())


@pytest.mark.slow
def test_a_checkpoint_written_meanwhile_is_not_kept(
    calm: Path, tracked: tuple[Track, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a training job is still writing it: the key would be of other content than the numbers."""
    copy, cache = tmp_path / "copy", tmp_path / "cache"
    shutil.copytree(calm.parent, copy)
    shutil.copytree(tracked[1], cache)
    weights = copy / "run" / "checkpoint-60" / "model.safetensors"
    shutil.copy(copy / "run" / "checkpoint-10" / "model.safetensors", weights)
    kept = sorted(cache.glob("*.json"))
    measure = Opened.measure

    def meanwhile(self: Opened, *arguments: Any) -> Any:
        os.utime(weights)
        return measure(self, *arguments)

    monkeypatch.setattr(Opened, "measure", meanwhile)
    track = track_run(copy / "run", OPTIONS, FileCache(cache))
    assert [p.source for p in track.points] == ["cached", "failed"]
    assert "changed while" in (track.points[1].message or "")
    assert sorted(cache.glob("*.json")) == kept


def test_keys_hold_what_the_report_depends_on(calm: Path, tmp_path: Path) -> None:
    opened = open_for_analysis(calm / "checkpoint-10", OPTIONS)
    assert opened.options.device in ("cpu", "cuda")  # "auto" is another device on another day
    renumbered = replace(opened, checkpoint=replace(opened.checkpoint, step=11))
    assert key_of(renumbered) != key_of(opened)
    # A distributed checkpoint's network is described above it: as many heads more change no shape.
    bare = tmp_path / "run" / "step-10"
    bare.mkdir(parents=True)
    (bare / "weights").write_bytes(b"1")
    moved = replace(opened, checkpoint=replace(opened.checkpoint, path=bare))
    keys = set()
    for config in ('{"model_type": "llama", "heads": 4}', '{"model_type": "llama", "heads": 8}'):
        (tmp_path / "run" / "config.json").write_text(config)
        keys.add(key_of(moved))
    assert len(keys) == 2


def test_the_users_own_code_is_part_of_the_key(calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    body = "def loss(model, batch):\n    return {} * model(**batch).loss\n"
    keys = set()
    for factor in (1, 1, 2):
        (tmp_path / "ours_to_key.py").write_text(body.format(factor))
        keys.add(key_of(open_for_analysis(calm / "checkpoint-10", replace(OPTIONS, loss="ours_to_key:loss"))))
    assert len(keys) == 2


def test_a_run_marks_surges_and_leaves_out_other_tokens(calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring itself stood in for: 1, damaged, 1, other tokens, 1, 3."""
    for step in range(1, 7):
        shutil.copytree(calm / "checkpoint-10", tmp_path / "run" / f"checkpoint-{step}")
        (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    shard = (calm.parent / "data" / "shard.bin").read_bytes()
    (tmp_path / "shard.bin").write_bytes(shard)
    (tmp_path / "run" / "checkpoint-4" / "other.bin").write_bytes(shard[1000:])
    (tmp_path / "curv.toml").write_text('data = "shard.bin"\nsequence-length = 16\n')
    (tmp_path / "run" / "checkpoint-4" / "curv.toml").write_text('data = "other.bin"\nsequence-length = 16\n')
    (tmp_path / "run" / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    rhos: list[float | None] = [1.0, 1.0, 1.0, 3.0]
    reports = iter([point.report for point in course_of(rhos).points])

    def measure(self: Opened, progress: Any = None) -> Report:
        report = next(reports)
        assert report is not None
        return report

    monkeypatch.setattr(Opened, "measure", measure)
    track = track_run(tmp_path / "run", OPTIONS, NoCache())
    assert [p.source for p in track.points] == ["measured", "failed", "measured", "failed", "measured", "measured"]
    assert "tokens are not those" in (track.points[3].message or "")
    assert [p.surge for p in track.points] == [None, None, None, None, pytest.approx(1.0), pytest.approx(3.0)]
    assert [p.surged for p in track.points] == [False] * 5 + [True]
    assert next(f.code for f in track.findings if "step 6" in f.message) == "surge"


def test_findings_reach_over_a_failed_point() -> None:
    first, gap, last = course_of([1.0, 1.0, 1.0]).points
    assert first.report is not None
    assert last.report is not None
    gap = gap.model_copy(update={"source": "failed", "report": None, "message": "damaged"})
    size = last.report.checkpoint.model_copy(update={"parameters": 7})
    last = last.model_copy(update={"report": last.report.model_copy(update={"verdict": "unstable", "checkpoint": size})})
    found = {f.code: f.message for f in _findings([first, gap, last], 2.0)}
    assert "step 0 to 2" in found["verdict-changed"]
    assert "parameters" in found["not-comparable"]


def test_csv_has_a_row_a_point(tracked: tuple[Track, Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(tracked[0]))))
    assert [row["step"] for row in rows] == ["10", "60"]
    report = tracked[0].points[1].report
    assert report is not None
    assert float(rows[1]["rho"]) == report.full.rho
    assert float(rows[1]["lambda model.layers.1"]) == report.layers[1].eigenvalue


@pytest.mark.parametrize("option", [("--surge", "inf"), ("--surge", "nan"), ("--tolerance", "nan"), ("--tolerance", "1")])
def test_numbers_that_are_none_are_refused(calm: Path, option: tuple[str, str], tmp_path: Path) -> None:
    done = curv("track", calm, "--tokens", "128", *option, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2
    assert "internal error" not in done.stderr
    assert option[0].strip("-") in done.stderr


@pytest.mark.slow
def test_killed_and_started_again(calm: Path, tmp_path: Path, tracked: tuple[Track, Path]) -> None:
    """SIGKILL once the first checkpoint is kept: nothing is broken, and the next call pays for the rest alone."""
    words = ("track", calm, "--tokens", 128, "--max-hvps", 24, "--mode", "kept", "-o", tmp_path / "track.json")
    place = {"XDG_CACHE_HOME": str(tmp_path)}
    job = subprocess.Popen(
        [*CURV, *map(str, words)], env=variables(**place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("curv/reports/*.json")) and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (tmp_path / "track.json").exists()
    done = process(*words, **place)
    assert done.returncode == 0, done.stderr
    track = load_track(tmp_path / "track.json")
    assert [p.source for p in track.points] == ["cached", "measured"]
    assert without_cost(track) == without_cost(tracked[0])
    assert "1 measured, 1 cached" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    gate = curv("gate", tmp_path / "track.json", "--max-rho", 50, "--max-surge", 2, "--format", "json")
    outcomes = {o["rule"]: o["outcome"] for o in json.loads(gate.stdout)["outcomes"]}
    # One point before is no past: the surge is unresolved, not passed.
    assert outcomes["max-surge"] == "unresolved"
    assert json.loads(gate.stdout)["subject"]["kind"] == "track"
