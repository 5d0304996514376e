"""Runs that several files of tests read."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from dcp_runs import saved_layouts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run saved in every layout of torch.distributed.checkpoint, and as the Trainer would have saved it."""
    return saved_layouts(tmp_path_factory.mktemp("dcp"))


@pytest.fixture
def nested(trained: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained.paths["nested"], tmp_path / "step-3"))
