"""Whose curv.toml counts for what: the user's own at or above the working directory, and one that came with a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import build
from typer.testing import CliRunner, Result

from curvcli.analysis.config import find_config, find_gate, is_own
from curvcli.analysis.inspection import inspect_checkpoint
from curvcli.cli import app
from curvcli.errors import InputError
from curvcli.files import remote

NAMES = pytest.mark.parametrize("name", ["curv.toml", "pyproject.toml"])
SMALL = ["--tokens", "64", "--sequence-length", "32", "--max-hvps", "3", "--mode", "kept", "-q"]


def curv(*words: object) -> Result:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def write(folder: Path, name: str, data: str = "", gate: str = "") -> Path:
    prefix = "tool.curv" if name == "pyproject.toml" else ""
    head = f"[{prefix}]\n" if prefix and data else ""
    table = f"[{'.'.join(p for p in (prefix, 'gate') if p)}]\n{gate}\n" if gate else ""
    (folder / name).write_text(f"{head}{data}\n{table}")
    return folder / name


@pytest.fixture
def away(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of others, and the user elsewhere; whatever reaches for the network is caught."""
    (tmp_path / "curv.toml").unlink()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")

    def caught(*arguments: object) -> None:
        raise AssertionError("a request was made")

    monkeypatch.setattr(remote, "_reach", caught)
    (tmp_path / "secret.txt").write_text("of the user")
    return run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint of two narrow blocks, and data for it."""
    build().save_pretrained(tmp_path / "run" / "checkpoint-3")
    (tmp_path / "data").mkdir()
    (np.arange(2000) % 64).astype(np.uint16).tofile(tmp_path / "data" / "shard.bin")
    (tmp_path / "curv.toml").write_text('data = "data/shard.bin"\n')
    return tmp_path / "run" / "checkpoint-3"


@NAMES
@pytest.mark.parametrize("place", ["in the checkpoint", "above it"])
@pytest.mark.parametrize(
    "data",
    [
        "s3://bucket/data.bin",
        "https://example.com/data.bin",
        "/etc/passwd",
        "../../secret.txt",
        "../../secr*.txt",
        "sub/../../../secret.txt",
        "link.txt",
        "li*.txt",
        "folder",
        "outside/secret.txt",
        "outside",
        ".",
        "",
    ],
)
def test_of_others_it_names_only_what_lies_below(away: Path, name: str, place: str, data: str) -> None:
    folder = away if place == "in the checkpoint" else away.parent
    (folder / "link.txt").symlink_to(away.parents[1] / "secret.txt")
    (folder / "outside").symlink_to(away.parents[1])
    (folder / "folder").mkdir()
    (folder / "folder" / "inner.txt").symlink_to(away.parents[1] / "secret.txt")
    file = write(folder, name, f'data = ["{data}"]')
    for verb in ("inspect", "analyze", "track") if name == "curv.toml" else ("inspect",):
        done = curv(verb, away)
        assert done.exit_code == 2, (verb, done.stdout)
        assert f"{file} is not in the working directory or above it" in done.stderr, (verb, done.stderr)
        assert "pass --data" in done.stderr


@NAMES
def test_the_remedies_work(away: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = away.parents[1] / "data" / "shard.bin"
    write(away.parent, name, f'data = "{shard}"\nsequence-length = 32')
    assert "run curv in" in curv("inspect", away).stderr
    assert curv("inspect", away, "--data", shard).exit_code == 0
    monkeypatch.chdir(away.parent)
    assert inspect_checkpoint(away)["data"][0]["path"] == str(shard)
    monkeypatch.chdir(away)  # below it
    assert curv("inspect", ".").exit_code == 0


@NAMES
def test_data_below_it_is_read_as_before(away: Path, name: str) -> None:
    shutil.copytree(away.parents[1] / "data", away.parent / "data")
    (away.parent / "data" / "second.bin").symlink_to("shard.bin")
    for data in ("data/shard.bin", "data/*.bin", "data/second.bin"):
        write(away.parent, name, f'data = "{data}"\nsequence-length = 32\ntokens = 64')
        assert {Path(source["path"]).name for source in inspect_checkpoint(away)["data"]} <= {"shard.bin", "second.bin"}
    found, file = find_config(away)
    assert (found.tokens, file) == (64, away.parent / name)


def test_the_samples_work_from_anywhere(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (samples.parent, samples, tmp_path):
        monkeypatch.chdir(place)
        assert inspect_checkpoint(samples / "hot")["data"][0]["tokens"] > 0, place


def test_a_checkpoint_that_is_the_working_directory_is_none_of_the_users(
    away: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(away)
    write(away, "curv.toml", 'data = "/etc/passwd"', "max-rho = 1e6")
    done = curv("inspect", ".")
    assert done.exit_code == 2
    assert "run curv in" not in done.stderr, "that would not help"
    done = curv("gate", ".")
    assert done.exit_code == 2
    assert "no rule is in force: those of" in done.stderr


def test_a_file_that_another_user_put_where_all_may_write_is_not_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, "curv.toml", gate="max-rho = 1.0")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    tmp_path.chmod(0o1777)
    assert is_own(file, Path("elsewhere"))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert is_own(file, Path("elsewhere")) == (file.stat().st_uid == 0)
    os.chown(file, 54321, -1) if os.getuid() == 0 else None
    assert not is_own(file, Path("elsewhere"))
    tmp_path.chmod(0o755)
    assert is_own(file, Path("elsewhere")), "as in a container, whose checkout has another owner"


@NAMES
def test_no_checkpoint_brings_the_rules_it_is_judged_by(away: Path, name: str) -> None:
    shutil.copytree(away.parents[1] / "data", away.parent / "data")
    brought = write(away.parent, name, 'data = "data/shard.bin"', 'max-rho = 1e9\nunresolved = "pass"')
    write(away, name, "", 'max-rho = 1e9\nunresolved = "pass"')
    done = curv("gate", away, *SMALL)
    assert done.exit_code == 2
    assert f"no rule is in force: those of {away / name} do not count" in done.stderr
    assert str(brought) not in curv("gate", away, "--max-rho", "1", "--explain").stdout
    own = write(Path(), name, "", "max-rho = 1e-9")
    table, file = find_gate(away)
    assert (table.model_dump()["max_rho"], file) == (1e-9, own.resolve())


@pytest.mark.slow
@NAMES
def test_data_and_gate_in_one_file(small: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/gate.md."""
    (tmp_path / "curv.toml").unlink()
    write(tmp_path, name, 'data = "data/shard.bin"\ntokens = 64\nsequence-length = 32', "max-rho = 1e6\nmin-tokens = 65")
    monkeypatch.chdir(tmp_path)
    assert curv("analyze", small, "--no-depths", "--max-hvps", 3, "-q").exit_code == 0
    assert curv("track", small.parent, "--no-cache", "--max-hvps", 3, "-q").exit_code == 0
    done = curv("gate", small, "--max-hvps", 3, "-q", "--format", "json")
    assert done.exit_code == 1, done.stderr
    assert {o["rule"]: o["outcome"] for o in json.loads(done.stdout)["outcomes"]}["min-tokens"] == "broken"


def test_gate_takes_the_options_of_analyze(small: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    options = [
        "--tokens",
        96,
        "--sequence-length",
        24,
        "--batch-size",
        2,
        "--sample",
        "spread",
        "--seed",
        3,
        "--mode",
        "fresh",
    ]
    done = curv("gate", small, *options, "--optimizer", "adamw", "--max-hvps", 3, "--max-rho", 9, "--report", kept, "-q")
    assert done.exit_code in (0, 1, 3), done.stderr
    data = json.loads(kept.read_text())["data"]
    assert (data["tokens"], data["sequence_length"], data["sample"]) == (96, 24, "spread")
    for option in ("--sequence-length", "--seed", "--betas"):
        done = curv("gate", kept, "--max-rho", 9, option, "0.9,0.99" if option == "--betas" else 3)
        assert done.exit_code == 2
        assert f"{option} is for checkpoints" in done.stderr


def test_a_hostile_file_beside_the_checkpoint_is_one_line(away: Path) -> None:
    (away / "curv.toml").write_text("\x1b[31mbad\x1b[0m = ]\n")
    done = curv("inspect", away)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr
    with pytest.raises(InputError, match="not readable TOML"):
        find_config(away)
