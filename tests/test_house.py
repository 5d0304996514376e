"""The layout that the documentation promises: who may import whom, file sizes, verdict rules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from curvcli.documents import Estimate, Generalisation
from curvcli.judge.verdict import judge

PACKAGE = Path(__file__).resolve().parent.parent / "curvcli"
# A room imports itself and what stands before it in its line; nothing else.
ALLOWED = {
    "plain": set(),
    "errors": {"plain"},
    "limits": {"errors"},
    "progress": {"plain"},
    "resources": set(),
    "results": {"errors", "limits", "plain"},
    "verdict": {"results"},
    "config": {"errors", "limits"},
    "readings": {"results"},
    "gate": {"results", "readings"},
    "curvature": {"errors", "results"},
    "optimizers": {"errors", "results", "curvature"},
    "inputs": {"errors", "limits", "plain", "results", "curvature", "optimizers"},
    "measurement": {"errors", "results", "resources", "curvature", "optimizers"},
    "analysis": {"errors", "results", "resources", "curvature", "optimizers", "inputs", "verdict", "measurement"},
    "checkpoints": {"errors", "results", "curvature", "optimizers", "inputs", "measurement", "analysis", "config"},
    "cache": {"errors", "limits", "results", "measurement"},
    "tracking": {"errors", "results", "inputs", "measurement", "readings", "checkpoints", "cache"},
    "compare": {"results"},
    "schedule": {"errors", "results"},
    "training": {"errors", "results", "resources", "curvature", "optimizers", "inputs", "schedule"},
    "verify": {"errors", "results", "inputs", "checkpoints", "training"},
    "report": {"errors", "plain", "results", "schedule", "verdict"},
    "cli": {
        "errors",
        "plain",
        "results",
        "config",
        "readings",
        "gate",
        "cache",
        "tracking",
        "compare",
        "progress",
        "report",
        "checkpoints",
        "measurement",
        "schedule",
        "training",
        "verify",
    },
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "curvcli":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("curvcli") for alias in node.names), f"{path}: import names, not modules"
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert _imports(path) - {room} <= ALLOWED[room]
    assert len(path.read_text().splitlines()) <= 400


# Inside inputs: formats know networks and optimizer state; data, networks and state do not know each other.
INSIDE_INPUTS = {"formats": {"networks", "state"}, "networks": set(), "state": set(), "data": set()}


@pytest.mark.parametrize("room", INSIDE_INPUTS)
def test_rooms_of_inputs_do_not_know_each_other(room: str) -> None:
    for path in (PACKAGE / "inputs" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            _, _, rest = module.partition("curvcli.checkpoints.")
            assert rest.split(".")[0] in INSIDE_INPUTS[room] | {room} or rest.split(".")[0] not in INSIDE_INPUTS, path


def _estimate(rho: float | None, status: str = "converged") -> Estimate:
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
