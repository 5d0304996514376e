"""The digest of the user's own code: it changes with all that the code can be made of, and with nothing that curv writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from curvcli.models import user_digest
from curvcli.models.user_digest import code_digest

Change = Callable[[Path], object]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "work" / "parts" / "deep").mkdir(parents=True)
    for name, text in (
        ("work/nets_of_mine.py", "def tiny(): ...\n"), ("work/parts/deep/late.py", "x = 1\n"),
        ("work/sizes.yaml", "width: 8\n"),
        ("away/helper_of_mine.py", "y = 1\n"),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path / "away"))
    __import__("helper_of_mine")
    yield tmp_path
    for name in ("nets_of_mine", "helper_of_mine", "later_of_mine", "late_beside"):
        sys.modules.pop(name, None)


def digest() -> str:
    user_digest._first.clear()
    return code_digest("nets_of_mine:tiny")


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda place: None, False),
        (lambda place: (place / "work/nets_of_mine.py").write_text("def tiny(): return 1\n"), True),
        (lambda place: (place / "work/parts/deep/late.py").write_text("x = 2\n"), True),
        (lambda place: (place / "work/new.py").touch(), True),
        (lambda place: (place / "work/sizes.yaml").write_text("width: 9\n"), True),
        (lambda place: (place / "away/helper_of_mine.py").write_text("y = 2\n"), True),
        (lambda place: (place / "away/not_loaded.py").touch(), False),
        (lambda place: (place / "work/track.json").write_text('{\n  "schema": "curv.track/1", "seconds": 3}'), False),
        (lambda place: (place / "work/notes.md").touch(), False),
        (lambda place: (place / "work/parts/trainer_state.json").touch(), False),
    ],
)
def test_what_counts(change: Change, counts: bool, place: Path) -> None:
    before = digest()
    change(place)
    assert (digest() != before) == counts


def test_packages_count_by_their_versions(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    monkeypatch.setattr(user_digest, "distributions", list)
    assert digest() != before


def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process."""
    monkeypatch.setattr(user_digest, "_process", "of another")


@pytest.mark.parametrize("limit", ["_MOST_ENTRIES", "_MOST_BYTES"])
def test_too_much_is_of_one_process_alone(limit: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_digest, limit, 1)
    before = digest()
    assert digest() == before  # so that --watch knows what it has measured
    process(monkeypatch)
    assert digest() != before


def test_code_that_changes_under_a_process_is_of_that_process_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is loaded, and its file has become another: a report is of neither, for anybody else."""
    before = digest()
    (place / "work/nets_of_mine.py").write_text("def tiny(): return 1\n")
    changed = code_digest("nets_of_mine:tiny")
    assert changed not in (before, digest())
    user_digest._first.clear()
    (place / "work/nets_of_mine.py").write_text("def tiny(): ...\n")
    assert digest() == before


def test_what_is_loaded_later_from_elsewhere_is_of_one_process_alone(place: Path) -> None:
    """As inside of the function that makes a network: that it changed, no other process could tell before it is made."""
    before = digest()
    (place / "work/late_beside.py").touch()
    changed = digest()
    __import__("late_beside")
    assert code_digest("nets_of_mine:tiny") == changed  # it is one of the folder's files
    (place / "away/later_of_mine.py").touch()
    __import__("later_of_mine")
    later = code_digest("nets_of_mine:tiny")
    assert later not in (before, changed)
    assert code_digest("nets_of_mine:tiny") == later


@pytest.mark.parametrize("kind", ["lib/python3/dist-packages", ".local/lib/python3.11/site-packages"])
def test_packages_of_other_places_are_not_ones_own(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / kind).mkdir(parents=True)
    (place / kind / "later_of_mine.py").touch()
    before = digest()
    monkeypatch.syspath_prepend(str(place / kind))
    __import__("later_of_mine")
    assert code_digest("nets_of_mine:tiny") == digest() == before


def test_what_is_no_file_is_passed_over(place: Path) -> None:
    before = digest()
    (place / "work/.#nets_of_mine.py").symlink_to("somebody@a-machine.123")  # as emacs locks a file
    (place / "work/endless.py").symlink_to("/dev/zero")
    os.mkfifo(place / "work/pipe.py")
    (place / "work/around").symlink_to(place / "work")
    assert digest() == before
