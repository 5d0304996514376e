"""`curv demo`: what comes in the package is small, whole and measured."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from places import ASSETS, ROOT
from real import curv

from curvcli.analysis.checkpoint import Opened
from curvcli.documents import Report, load_report

HOME = Path(str(files("curvcli.cli").joinpath("demo")))


def test_what_is_asked_of_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(opened: Opened, *rest: object) -> Report:
        asked.append(opened)
        return load_report(ASSETS / "hot-60.json")

    monkeypatch.setattr(Opened, "measure", measured)
    (tmp_path / "curv.toml").write_text("tokens = 64\n")  # which is not read for it
    monkeypatch.chdir(tmp_path)
    done = curv("demo", "--quiet")
    assert done.returncode == 0, done.stderr
    (opened,) = asked
    assert (opened.read.tokens, opened.options.device, opened.options.depths) == (4096, "cpu", False)
    for verb in ("doctor", "init", "analyze"):
        assert f"curv {verb} RUN" in done.stdout, "no word of what to run next"
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80
    assert "curv doctor" not in curv("demo", "--quiet", "--format", "json").stdout


@pytest.mark.slow
def test_a_verdict_without_data_or_run(tmp_path: Path) -> None:
    done = curv("demo", "-o", tmp_path / "r.json", "--quiet")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["checkpoint"]["step"], report["data"]["tokens"], report["verdict"]) == (60, 4096, "edge")
    assert {e["status"] for e in [report["full"], *report["layers"]]} == {"converged"}
    assert "EDGE" in done.stdout


def test_what_comes_with_the_package_is_small_and_is_the_trainers_own() -> None:
    kept = {path.relative_to(HOME).as_posix(): path.stat().st_size for path in HOME.rglob("*") if path.is_file()}
    assert sum(kept.values()) < 2**20
    assert set(kept) == {
        "curv.toml", "shard.bin",
        *(f"checkpoint-60/{name}" for name in ("config.json", "model.safetensors", "optimizer.pt", "trainer_state.json")),
    }  # fmt: skip
    text = (ROOT / "sample_checkpoints" / "data" / "moby_dick.txt").read_bytes()
    shard = (HOME / "shard.bin").read_bytes()
    assert shard[::2] == text[: len(shard) // 2]
