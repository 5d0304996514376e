"""The layout that the documentation promises: who may import whom, file sizes, verdict rules."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from curvcli.documents import Estimate, Generalisation
from curvcli.judge.verdict import judge

PACKAGE = Path(__file__).resolve().parent.parent / "curvcli"
# The rooms from the ground up, and whom each imports: exactly these, all of which stand before it.
# docs/reference/house.md says what each is for.
ROOMS = {
    "errors": set(),
    "files": {"errors"},
    "documents": {"errors", "files"},
    "curvature": {"errors"},
    "models": {"errors", "files", "curvature"},
    "optimizers": {"errors", "documents", "curvature"},
    "checkpoints": {"errors", "documents", "files", "models", "optimizers"},
    "data": {"errors", "files", "curvature", "models", "checkpoints"},
    "judge": {"errors", "documents"},
    "schedules": {"errors", "files", "documents", "judge"},
    "render": {"errors", "documents", "judge", "schedules"},
    "analysis": {
        "errors",
        "files",
        "documents",
        "curvature",
        "models",
        "optimizers",
        "checkpoints",
        "data",
        "judge",
        "schedules",
    },
    "training": {"errors", "files", "documents", "curvature", "models", "optimizers", "checkpoints", "data", "judge"},
    "cli": {"errors", "documents", "optimizers", "render", "analysis", "training"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Rooms that a file imports from; its own is not one of them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "curvcli":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("curvcli") for alias in node.names), f"{path}: import names, not modules"
    return found - {_room(path)}


def test_no_module_stands_loose() -> None:
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose <= {"__init__.py", "__main__.py", "errors.py"}
    assert {_room(path) for path in FILES} - {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_table_says_and_nothing_above_it(room: str) -> None:
    assert set().union(*(_imports(path) for path in FILES if _room(path) == room)) == ROOMS[room]
    below = list(ROOMS)[: list(ROOMS).index(room)]
    assert ROOMS[room] <= set(below)


def test_the_page_shows_this_table() -> None:
    page = (PACKAGE.parent / "docs" / "reference" / "house.md").read_text()
    shown = re.findall(r"^\| `(\w+)` \| ?([\w, ]*?) ?\|$", page, re.MULTILINE)
    assert {room: set(filter(None, below.split(", "))) for room, below in shown} == ROOMS
    assert [room for room, _ in shown] == list(ROOMS)


def test_no_file_is_long_and_no_room_is_half_the_house() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert not [str(path) for path, count in lines.items() if count > 400]
    for room in ROOMS:
        assert sum(count for path, count in lines.items() if _room(path) == room) <= sum(lines.values()) / 5, room


def test_no_modules_import_each_other() -> None:
    """Not in a circle of any length, types included; a package's `__init__`, which hands names on, is left out."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}
    imports = {
        name: {
            found
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module
            for found in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            if found in files
        }
        for name, path in files.items()
        if path.name != "__init__.py"
    }
    sorter = TopologicalSorter(imports)
    sorter.prepare()  # raises CycleError, which names the circle


def test_tests_lie_in_the_rooms_that_they_test() -> None:
    home = Path(__file__).parent
    files = list(home.rglob("*.py"))
    assert {path.relative_to(home).parts[0] for path in files if path.parent != home} <= {*ROOMS, "support", "cuda"}
    assert not [str(path) for path in files if len(path.read_text().splitlines()) > 400]
    names = [path.name for path in files if path.name != "conftest.py"]
    assert len(names) == len(set(names)), "two files of one name"


def _estimate(rho: float | None, status: Any = "converged") -> Estimate:
    return Estimate(
        eigenvalue=rho, rho=rho, residual=0.0, most_negative=None, most_negative_residual=None,
        most_negative_status=None, hvps=1, status=status,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "status", "verdict"),
    [
        (0.1, 0.79, "converged", "stable"),
        (0.1, 0.81, "converged", "unresolved"),
        (0.85, 1.2, "converged", "edge"),
        (1.2, 1.3, "converged", "unresolved"),
        (1.3, 9.0, "converged", "unstable"),
        (-5.0, 0.5, "converged", "stable"),
        (0.1, 0.2, "unconverged", "unresolved"),
        (0.1, 0.2, "inconsistent", "unresolved"),
        (None, None, "non-finite", "unresolved"),
    ],
)
def test_verdict(low: float | None, high: float | None, status: str, verdict: str) -> None:
    assert judge(_estimate(high, status), Generalisation(held_out=low, rho_low=low, rho_high=high)) == verdict


def test_documents_refuse_nan() -> None:
    with pytest.raises(ValueError, match="finite"):
        _estimate(float("nan"))
