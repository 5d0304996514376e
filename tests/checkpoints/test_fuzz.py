"""Every format, damaged at random: a result, or one line. `python tests/test_fuzz.py 2000` prints the counts.

CURV_FUZZ=N tries N damages of every format instead of a few. Formats that two ranks write are in test_deepspeed.py and
test_dcp.py too, which have their files anyway.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from damage import DAMAGES, attempt, damaged_checkpoint, damaged_data, damages, read_data, read_everything
from formats import CHECKPOINTS, DATA, RANKED, fresh

EXAMPLES = int(os.environ.get("CURV_FUZZ", "12"))


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


def main(count: int, chosen: list[str]) -> None:
    """Prints the table of docs/explanation/security-tests.md: what became of `count` damages of each format chosen."""
    every = [("checkpoint", n) for n in (*CHECKPOINTS, *RANKED)] + [("data", n) for n in DATA]
    with tempfile.TemporaryDirectory() as scratch:
        root, target = Path(scratch) / "masters", Path(scratch) / "copy"
        rows: list[tuple[str, Counter[str]]] = []
        by_damage: dict[str, Counter[str]] = {}
        for kind, name in [(kind, name) for kind, name in every if not chosen or name in chosen]:
            outcomes: Counter[str] = Counter()
            damaged = damaged_checkpoint if kind == "checkpoint" else damaged_data
            for number in range(count):
                try:
                    label, outcome = damaged(name, number, number, root, target)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    names = damages(name)
                    label, outcome = names[number % len(names)][0], "FAILED"
                    print(f"{name}, damage {number} ({label}): {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                outcomes[outcome] += 1
                by_damage.setdefault(label, Counter())[outcome] += 1
            rows.append((name, outcomes))
            shutil.rmtree(target, ignore_errors=True)
    for heading, table in (("format", rows), ("damage", list(by_damage.items()))):
        columns = ("refused", "a finding", "read", "unnoticed", "FAILED")
        print(f"\n| {heading} | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
        for name, counts in table:
            print(f"| {name} | {' | '.join(str(counts[c]) for c in columns)} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, sys.argv[2:])
