"""The restricted curve from the full model down: which depths the ceiling above serves, and how the others are solved."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from curvcli.analysis.measured import Measured, Solved
from curvcli.analysis.solve import Measurement
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.ritz import Extremes, Ritz, Status


def solved(value: float, *, converged: bool = True) -> Solved:
    status: Status = "converged" if converged else "max-hvps"
    found = Extremes(Ritz(value, 0.0), None, torch.ones(1), status, 1, ceiling=1.03 * value)
    return Solved(["w"], found)


@pytest.mark.parametrize(
    ("near", "solver"),
    [(True, ["tried"]), (False, ["tried", "sharp"])],
    ids=["the ceiling above serves", "not this, the next it may"],
)
def test_a_depth_that_falls_little(near: bool, solver: list[str]) -> None:
    assert curve(solved(95.0, converged=near)) == solver


def test_a_ceiling_that_would_serve_no_other_depth_need_not_be_sharp() -> None:
    assert curve(solved(92.0, converged=False)) == ["tried", "coarse"]
    assert curve(Solved(["w"], None)) == ["tried", "coarse"]


def test_of_a_curve_that_falls_no_vector_from_above_is_tried() -> None:
    assert curve(Solved(["w"], None), values=[80.0, 60.0, 59.0, 58.0]) == ["tried", *["coarse"] * 3, "tried", "coarse"]


def curve(lowered: Solved, values: Sequence[float] = (90.0,)) -> list[str]:
    """How depths are solved, by the estimate that the vector above gives and the values found; above lies 100."""
    used: list[str] = []
    left = list(values)

    def solve(hvp: Any, names: list[str], solver: str) -> Solved:
        used.append(solver)
        return solved(left.pop(0))

    def tried(hvp: Any, names: list[str], above: Solved) -> Solved:
        used.append("tried")
        return lowered

    fake: Any = SimpleNamespace(
        layer_names=[["a"]] * (1 + len(values)), outer=["w"], coarse="coarse", sharp="sharp", solver=Lanczos(), solve=solve,
        lowered=tried, upto=lambda depth: ["w"], stages=SimpleNamespace(enter=lambda name: None),
    )  # fmt: skip
    Measurement.curve(fake, None, Measured(0.0, solved(100.0)), None)  # type: ignore[arg-type]
    return used
