"""Every format, damaged at random: a result, or one line. `python tests/support/fuzz.py 2000` prints the counts.

CURV_FUZZ=N tries N damages of every format instead of a few. Formats that two ranks write are in test_deepspeed.py and
test_dcp_ranks.py too, which have their files anyway.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from damage import DAMAGES, attempt, damaged_checkpoint, damaged_data, read_data, read_everything
from formats import CHECKPOINTS, DATA, fresh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("CURV_FUZZ", "8"))


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masters")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "copy"


FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="CURV_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", CHECKPOINTS)
@FUZZ
@given(kind=st.integers(0, len(DAMAGES) - 1), seed=st.integers(0, 2**32))
def test_damaged_checkpoints(name: str, masters: Path, copy: Path, kind: int, seed: int) -> None:
    damaged_checkpoint(name, kind, seed, masters, copy)


@pytest.mark.parametrize("name", DATA)
@FUZZ
@given(kind=st.integers(0, len(DAMAGES) - 1), seed=st.integers(0, 2**32))
def test_damaged_data(name: str, masters: Path, copy: Path, kind: int, seed: int) -> None:
    damaged_data(name, kind, seed, masters, copy)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_undamaged_is_read_without_findings(name: str, masters: Path, copy: Path) -> None:
    assert attempt(lambda: read_everything(fresh("checkpoint", name, masters, copy), name).word) == "read"


@pytest.mark.parametrize("name", DATA)
def test_undamaged_data_is_read(name: str, masters: Path, copy: Path) -> None:
    assert attempt(lambda: read_data(fresh("data", name, masters, copy), masters)) == "read"
