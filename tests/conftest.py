"""Shared fixtures: the sample checkpoints, and copies of them to damage. What they are made of is in support/."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import BINARY, Browser
from hypothesis import settings
from places import SAMPLES

# A worker a core: threads of their own would only wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long an example takes is the machine's doing. What must pass before a change lands (CI is set) tries the same examples
# each time; everybody else tries new ones.
settings.register_profile("curv", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("curv")


def pytest_collection_finish() -> None:
    """Collections of garbage, which making room for a measurement asks for, need not walk over all that was imported."""
    gc.freeze()


@pytest.fixture(scope="session")
def samples() -> Path:
    return SAMPLES


@pytest.fixture
def run(samples: Path, tmp_path: Path) -> Path:
    """A copy of one checkpoint with its data and configuration, free to damage."""
    shutil.copytree(samples / "calm" / "checkpoint-10", tmp_path / "run" / "checkpoint-10")
    shutil.copytree(samples / "nanogpt", tmp_path / "nanogpt")
    (tmp_path / "data").mkdir()
    shutil.copy(samples / "data" / "shard.bin", tmp_path / "data")
    (tmp_path / "curv.toml").write_text('data = "data/shard.bin"\nsequence-length = 64\ntokens = 256\n')
    return tmp_path / "run" / "checkpoint-10"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if BINARY is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH: install one to test pages in a browser")
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found
