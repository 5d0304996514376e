"""The cache: bounded, least recently used out first, damaged entries are misses, keys go by content."""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from places import ASSETS

from curvcli.analysis.cache import FileCache, cache_key, checkpoint_digest, checkpoint_stamp
from curvcli.documents import load_report
from curvcli.errors import UsageError

ASSET = next(ASSETS.glob("calm-60*.report.json"))


REPORT = load_report(ASSET)
K, A, B, C = (sha256(name).hexdigest() for name in (b"k", b"a", b"b", b"c"))


def test_what_is_kept_comes_back_equal(tmp_path: Path) -> None:
    cache = FileCache(tmp_path)
    cache.put(K, REPORT)
    assert FileCache(tmp_path).get(K) == REPORT
    assert cache.get(C) is None


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    size = int(1.2 * ASSET.stat().st_size)  # quoted in JSON
    cache = FileCache(tmp_path, size=int(2.5 * size))
    for i, key in enumerate((A, B)):
        cache.put(key, REPORT)
        os.utime(tmp_path / f"{key}.json", (i, i))
    assert cache.get(A) is not None  # now the younger of the two
    cache.put(C, REPORT)
    assert cache.get(B) is None
    assert cache.get(A) is not None
    assert cache.get(C) is not None


def test_an_entry_larger_than_all_takes_no_others_with_it(tmp_path: Path) -> None:
    size = int(1.2 * ASSET.stat().st_size)
    large = REPORT.model_copy(update={"findings": REPORT.findings * 10_000})
    for key, report in ((A, REPORT), (B, large)):  # as from before the bound was lowered
        FileCache(tmp_path).put(key, report)
    for i, key in enumerate((A, B)):
        os.utime(tmp_path / f"{key}.json", (i, i))
    cache = FileCache(tmp_path, size=3 * size)
    cache.put(C, REPORT)
    assert [cache.get(key) is not None for key in (A, B, C)] == [True, False, True]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff" * 100], ids=["empty", "cut", "noise"])
def test_a_damaged_entry_is_a_miss_and_goes(tmp_path: Path, damage: bytes) -> None:
    cache = FileCache(tmp_path)
    cache.put(K, REPORT)
    (tmp_path / f"{K}.json").write_bytes(damage)
    assert cache.get(K) is None
    assert not (tmp_path / f"{K}.json").exists()
    cache.put(K, REPORT)
    assert cache.get(K) is not None


def test_what_a_killed_run_or_an_older_version_left_is_removed(tmp_path: Path) -> None:
    cache = FileCache(tmp_path)
    (tmp_path / f"{C}.safetensors").write_bytes(b"an eigenvector, as 0.1.0 kept them")
    (tmp_path / f".{K[:60]}.0123abcd").write_bytes(b"{")
    cache.put(K, REPORT)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".key", ".lock", f"{K}.json"]


def test_digests_go_by_content_and_names_not_by_place(samples: Path, tmp_path: Path) -> None:
    original = samples / "calm" / "checkpoint-10"
    shutil.copytree(original, tmp_path / "elsewhere")
    assert checkpoint_digest(original) == checkpoint_digest(tmp_path / "elsewhere")
    weights = tmp_path / "elsewhere" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoint_digest(original) != checkpoint_digest(tmp_path / "elsewhere")
    assert cache_key(a=1, b=2) == cache_key(b=2, a=1) != cache_key(a=1, b=3)


def test_what_lies_behind_links_counts(tmp_path: Path) -> None:
    """Of files, as the Hugging Face cache has them, and of the checkpoint itself; of no directory outside of it."""
    run, outside = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (outside, run / "inside"):
        folder.mkdir(parents=True)
    (outside / "blob").write_bytes(b"1")
    (run / "inside" / "state").write_bytes(b"1")
    (run / "weights").symlink_to(outside / "blob")
    (run / "again").symlink_to(run / "inside")
    (run / "back").symlink_to(run)
    (run / "out").symlink_to(outside)
    (tmp_path / "named").symlink_to(run)
    for path in (run, tmp_path / "named"):
        before = checkpoint_digest(path), checkpoint_stamp(path)
        assert sorted(Path(name).name for name, *_ in before[1]) == ["state", "weights"]
        (outside / "blob").write_bytes((outside / "blob").read_bytes() + b"2")
        assert checkpoint_digest(path) != before[0]
        assert checkpoint_stamp(path) != before[1]


def test_the_place_and_the_bound_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CURV_CACHE_SIZE", "500M")
    cache = FileCache()
    assert cache.folder == tmp_path / "curv" / "reports"
    assert cache.size == 500 * 2**20
    monkeypatch.setenv("CURV_CACHE_SIZE", "much")
    with pytest.raises(UsageError, match="no size"):
        FileCache()
