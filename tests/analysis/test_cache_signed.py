"""The cache against other versions of the method and against other hands than the user's."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import fsspec
import pytest
from places import ASSETS, ROOT
from typer.testing import CliRunner

import curvcli
from curvcli.analysis import cache as module
from curvcli.analysis.cache import FileCache, cache_key, method_digest
from curvcli.cli import app
from curvcli.documents import Versions, load_report
from curvcli.errors import UsageError
from curvcli.files import remote

REPORT = load_report(next(ASSETS.glob("calm-60*.report.json")))
K, OTHER = sha256(b"k").hexdigest(), sha256(b"other").hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FileCache(tmp_path / "kept").put(K, REPORT)
    assert FileCache(tmp_path / "kept").get(K) is not None
    return tmp_path / "kept"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package, which the method's digest is made of."""
    copy = tmp_path / "package"
    shutil.copytree(ROOT / "curvcli", copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "__file__", str(copy / "analysis" / "cache.py"))
    method_digest.cache_clear()
    yield copy
    method_digest.cache_clear()


def test_a_changed_eigensolver_serves_no_old_number(sources: Path) -> None:
    before = cache_key(checkpoint="c")
    changes = {
        "curvature/davidson.py": True,
        "judge/calibration.json": True,
        "render/table.py": False,
        "cli/track.py": False,
    }
    for name, matters in changes.items():
        with (sources / name).open("a") as stream:
            stream.write("\n# changed\n")
        method_digest.cache_clear()
        assert (cache_key(checkpoint="c") != before) == matters, name
        before = cache_key(checkpoint="c")


def test_the_version_has_one_place() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert curvcli.__version__ == version("curvcli") == said == Versions.installed().curvcli
    assert said in CliRunner().invoke(app, ["--version"]).stdout
    found = [p for p in (ROOT / "curvcli").rglob("*.py") if f'"{said}"' in p.read_text()]
    assert not found


def test_everything_is_for_its_owner_alone(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in folder.iterdir()} == dict.fromkeys(
        (".key", ".lock", f"{K}.json"), oct(0o600)
    )
    folder.chmod(0o755)  # as an earlier version left it
    FileCache(folder).put(OTHER, REPORT)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def _edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _flatter(file: Path) -> None:
    report = json.loads(json.loads(file.read_text())["report"])
    report["full"]["rho"] = 0.001
    _edit(file, report=json.dumps(report))


EDITS = {
    "a number": lambda folder: _flatter(folder / f"{K}.json"),
    "a signature": lambda folder: _edit(folder / f"{K}.json", signature="0" * 64),
    "a signature that is none": lambda folder: _edit(folder / f"{K}.json", signature=None),
    "a signature of another kind": lambda folder: _edit(folder / f"{K}.json", signature="\u00e9"),
    "another entry's name": lambda folder: shutil.copy(folder / f"{OTHER}.json", folder / f"{K}.json"),
    "a plain report": lambda folder: (folder / f"{K}.json").write_text(REPORT.to_json()),
    "a list": lambda folder: (folder / f"{K}.json").write_text("[]"),
    "another key": lambda folder: (folder / ".key").write_bytes(bytes(32)),
    "a key that all can read": lambda folder: (folder / ".key").chmod(0o644),
    "no key": lambda folder: (folder / ".key").unlink(),
    "a short key": lambda folder: (folder / ".key").write_bytes(b""),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_entry_is_a_miss(folder: Path, edit: str) -> None:
    cache = FileCache(folder)
    cache.put(OTHER, REPORT)
    EDITS[edit](folder)
    assert cache.get(K) is None
    cache.put(K, REPORT)
    assert cache.get(K) is not None
    assert cache.complaint is None


def test_entries_made_elsewhere_are_misses(folder: Path, tmp_path: Path) -> None:
    other = FileCache(tmp_path / "theirs")
    other.put(OTHER, REPORT)
    shutil.copy(tmp_path / "theirs" / f"{OTHER}.json", folder)
    assert FileCache(folder).get(OTHER) is None


def test_a_key_behind_a_link_is_none(folder: Path) -> None:
    (folder / ".key").rename(folder / "elsewhere")
    (folder / ".key").symlink_to("elsewhere")
    assert FileCache(folder).get(K) is None
    FileCache(folder).put(K, REPORT)
    assert not (folder / ".key").is_symlink()


def test_links_are_neither_read_nor_followed_nor_written_through(folder: Path, tmp_path: Path) -> None:
    treasure = tmp_path / "treasure.json"
    treasure.write_text("mine")
    shutil.copy(folder / f"{K}.json", tmp_path / "moved")
    (folder / f"{K}.json").unlink()
    (folder / f"{K}.json").symlink_to(tmp_path / "moved")
    assert FileCache(folder).get(K) is None
    for name in (f"{OTHER}.json", f"{OTHER}.safetensors"):
        (folder / name).symlink_to(treasure)
    FileCache(folder).put(OTHER, REPORT)
    assert treasure.read_text() == "mine"
    assert not (folder / f"{OTHER}.json").is_symlink()


def test_eviction_removes_nothing_but_entries(tmp_path: Path) -> None:
    """A folder that is a link to somebody's documents."""
    home = tmp_path / "home"
    (home / f"{OTHER}.json").mkdir(parents=True)
    for name in ("thesis.json", "model.safetensors", ".profile", ".thesis.json.half", f"{K}.txt"):
        (home / name).write_text("mine")
    (home / f"{OTHER}.safetensors").symlink_to(home / "thesis.json")  # of no entry: the link goes
    (tmp_path / "reports").symlink_to(home)
    cache = FileCache(tmp_path / "reports", size=1)
    cache.put(K, REPORT)
    assert cache.complaint is None
    left = {p.name for p in home.iterdir()} - {".key", ".lock"}
    assert left == {"thesis.json", "model.safetensors", ".profile", ".thesis.json.half", f"{K}.txt", f"{OTHER}.json"}
    assert (home / "thesis.json").read_text() == "mine"


@pytest.mark.parametrize("text", ["9" * 5000, "-1", "1e9", "0x10", "\u0661M", "5 M\n;", "G", "1" * 16])
def test_a_size_that_is_none_is_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURV_CACHE_SIZE", text)
    with pytest.raises(UsageError, match="is no size") as caught:
        FileCache()
    assert len(str(caught.value)) < 120
    assert CliRunner().invoke(app, ["track", "nowhere"]).exit_code == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_none(folder: Path) -> None:
    os.chown(folder / ".key", 54321, -1)
    assert FileCache(folder).get(K) is None


def test_copies_of_what_lies_behind_a_url_are_for_their_owner_and_go_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(remote, "MOST", 150)
    kept = tmp_path / "remote"
    (kept / "documents").mkdir(parents=True)
    (kept / "documents" / "thesis").write_bytes(bytes(1000))
    (kept / ("0" * 32)).symlink_to(tmp_path)
    for i in range(2):
        memory.pipe(f"/signed/{i}.bin", bytes(100))
        os.utime(remote.fetched(Path(f"memory://signed/{i}.bin"), kept).parent, (i, i))
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert [p.name for p in kept.rglob("*.bin")] == ["1.bin"]
    assert (kept / "documents" / "thesis").exists()
