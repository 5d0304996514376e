"""The restricted curve from the full model down: which depths the bounds from above serve, and how the others are solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, pi
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvcli.analysis import curve as module
from curvcli.analysis.curve import curve, serving
from curvcli.analysis.measured import Measured, Solved
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.operator import DenseOperator
from curvcli.curvature.ritz import Extremes, Ritz, Status

COARSE = Lanczos(tolerance=0.03, margin=0.1, max_products=100)


def solved(value: float, *, converged: bool = True) -> Solved:
    status: Status = "converged" if converged else "max-hvps"
    found = Extremes(Ritz(value, 0.0), None, torch.ones(1), status, 1, ceiling=1.03 * value)
    return Solved(["w"], found)


def margins(lowered: Solved, monkeypatch: pytest.MonkeyPatch, values: Sequence[float] = (90.0,)) -> list[float]:
    """How near ceilings are asked for, by the estimate that the vector above gives and the values found; above lies 100."""
    used: list[float] = []
    left = list(values)

    def solve(hvp: Any, names: list[str], solver: Lanczos) -> Solved:
        used.append(solver.margin)
        return solved(left.pop(0))

    fake: Any = SimpleNamespace(
        layer_names=[["a"]] * (1 + len(values)), outer=["w"], coarse=COARSE, solver=Lanczos(), solve=solve,
        upto=lambda depth: ["w"], stages=SimpleNamespace(enter=lambda name: None),
    )  # fmt: skip
    monkeypatch.setattr(module, "lowered", lambda *arguments: lowered)
    curve(fake, None, Measured(0.0, solved(100.0)), None)  # type: ignore[arg-type]
    return used


@pytest.mark.parametrize("part", ["ends", "layers"])
def test_a_depth_that_comes_out_below_its_own_part_is_solved_afresh(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two eigenvalues on top that Lanczos took for one: below the depth that has the first, the second is on top."""
    known = Measured(0.0, solved(100.0), ends=solved(80.0 if part == "ends" else 1.0))
    known.layers = [solved(80.0 if part == "layers" else 1.0), solved(99.0)]
    fake: Any = SimpleNamespace(
        layer_names=[["a"]] * 2, coarse=COARSE, solver=Lanczos(), solve=lambda *_: solved(85.0),
        upto=lambda depth: ["w"], stages=SimpleNamespace(enter=lambda name: None),
    )  # fmt: skip
    monkeypatch.setattr(module, "lowered", lambda *arguments: solved(60.0))
    curve(fake, None, known, None)  # type: ignore[arg-type]
    assert known.restricted[1].value == 85.0


def test_a_depth_that_falls_little(monkeypatch: pytest.MonkeyPatch) -> None:
    assert margins(solved(95.0), monkeypatch) == []
    assert margins(solved(95.0, converged=False), monkeypatch) == [0.03], "not this depth, the next it may serve"


def test_a_ceiling_that_would_serve_no_other_depth_need_not_be_sharp(monkeypatch: pytest.MonkeyPatch) -> None:
    assert margins(solved(92.0, converged=False), monkeypatch) == [0.1]
    assert margins(Solved(["w"], None), monkeypatch, [80.0, 60.0]) == [0.1, 0.1]


def test_the_second_eigenvalue_is_waited_for_where_the_next_depth_may_lie_above_it() -> None:
    fake: Any = SimpleNamespace(coarse=COARSE, solver=Lanczos())
    seen = Solved(["w"], None)
    assert serving(fake, 5, solved(100.0), seen, solved(20.0)).apart == pytest.approx(0.84)
    assert serving(fake, 5, solved(100.0), seen, solved(-20.0)).apart == pytest.approx(0.8)
    assert serving(fake, 2, solved(100.0), seen, solved(20.0)).apart == 0, "no depth is left that it could serve"


class Dense:
    """A measurement of a matrix whose entries are those of embedding and head, then those of each layer."""

    def __init__(self, matrix: Tensor, ends: int, layers: int) -> None:
        self.matrix, self.ends, self.layers = matrix, ends, layers
        self.width = (len(matrix) - ends) // layers
        self.layer_names, self.outer = [["l"]] * layers, ["e"]
        self.solver, self.coarse, self.exact = Lanczos(max_products=100), COARSE, True
        self.stages = SimpleNamespace(enter=lambda name: None)
        self.preconditioner = SimpleNamespace(root=SimpleNamespace(restrict=len))
        self.cold = 0

    def upto(self, depth: int) -> list[str]:
        return ["w"] * (self.ends + depth * self.width)

    def in_time(self) -> None:
        pass

    def operator(self, hvp: Any, names: list[str]) -> Any:
        size = len(names)
        found: Any = DenseOperator(self.matrix[:size, :size])
        found.root = SimpleNamespace(carry=lambda vector, root: vector[:size])
        return found

    def solve(self, hvp: Any, names: list[str], solver: Lanczos) -> Solved:
        self.cold += 1
        return Solved(names, solver.extremes(self.operator(hvp, names)))

    def curve(self) -> list[Solved]:
        none: Any = None
        full = Solved(self.upto(self.layers), self.solver.extremes(self.operator(None, self.upto(self.layers))))
        found = Measured(0.0, full, ends=self.solve(none, self.upto(0), self.coarse))
        self.cold = 0
        curve(self, none, found, None)  # type: ignore[arg-type]
        return [found.restricted[depth] for depth in range(self.layers + 1)]

    def lucky(self) -> bool:
        """Whether at each depth the start has of the two top eigenvectors what it lacks once in 1,000 solves."""
        for size in (len(self.upto(depth)) for depth in range(self.layers + 1)):
            start = DenseOperator(self.matrix[:size, :size]).space.random(torch.Generator().manual_seed(self.solver.seed))
            parts = torch.linalg.eigh(self.matrix[:size, :size]).eigenvectors[:, -2:].T @ (start / start.norm())
            if float(parts.abs().min()) < self.solver.doubt * (pi / (2 * size)) ** 0.5:
                return False
        return True

    def truths(self) -> list[float]:
        sizes = [len(self.upto(depth)) for depth in range(self.layers + 1)]
        return [float(torch.linalg.eigvalsh(self.matrix[:n, :n])[-1]) for n in sizes]


def coupled(seed: int, *, top: float = 1.0, negative: float = 1.0) -> Tensor:
    """A few outliers over a bulk, with eigenvectors spread over all layers but weighed differently."""
    draw, ends, layers, width = torch.Generator().manual_seed(seed), 60, 8, 40
    size = ends + layers * width
    noise = torch.randn(size, size, generator=draw, dtype=torch.float64) / size**0.5
    outliers = torch.randn(size, 5, generator=draw, dtype=torch.float64) / size**0.5
    weights = torch.rand(layers + 1, 5, generator=draw, dtype=torch.float64) ** 2 * 3
    owner = torch.tensor([0] * ends + [1 + k for k in range(layers) for _ in range(width)])
    outliers = outliers * weights[owner]
    strength = torch.tensor([8 * top, 5.0, 4.0, 3.0, -6 * negative], dtype=torch.float64)
    return (noise + noise.T) / 2 + outliers @ torch.diag(strength) @ outliers.T


def test_depths_above_the_second_eigenvalue_need_no_fresh_start() -> None:
    """An isolated top that falls from depth to depth by more than a ceiling would allow."""
    dense = Dense(coupled(0, top=6.0), 60, 8)
    found = dense.curve()
    assert [s.value for s in found] == pytest.approx(dense.truths(), rel=0.01)
    falls = [below / above for below, above in zip(dense.truths(), dense.truths()[1:], strict=False)]
    assert min(falls[1:]) < 0.9
    assert dense.cold <= 2
    warm = [s.extremes for s in found[1:-1] if s.extremes and s.extremes.bottom is None]
    assert len(warm) >= 5
    assert all(e.products <= 4 and e.top and e.top.value <= e.ceiling <= 1.1 * e.top.value for e in warm)


@settings(max_examples=60, deadline=None)
@example(44, 0.3, 0.1)  # at depth 2 the start has half of what it has but for a chance of 1 in 1,000
@given(st.integers(0, 100_000), st.sampled_from([0.3, 0.7, 1.0, 2.0, 6.0]), st.sampled_from([0.1, 1.0, 20.0]))
def test_the_top_lies_between_value_and_ceiling(seed: int, top: float, negative: float) -> None:
    dense = Dense(coupled(seed, top=top, negative=negative), 60, 8)
    assume(dense.lucky())  # else a ceiling may be too low: 1 solve in 1,000
    for one, truth in zip(dense.curve(), dense.truths(), strict=True):
        assert one.value <= truth * (1 + 1e-9) <= one.ceiling * (1 + 2e-9)
        assert not one.converged or one.ceiling <= 1.1 * one.value * (1 + 1e-9)


def test_a_top_that_is_left_behind_gives_way_to_the_second() -> None:
    """The full model's top lies in the last layer alone: depths below have its second, which no vector from above has."""
    size = 60 + 8 * 40
    values = torch.linspace(-1, 1, size, dtype=torch.float64)
    values[-1], values[70] = 10.0, 9.5
    dense = Dense(torch.diag(values), 60, 8)
    found = dense.curve()
    assert [s.value for s in found] == pytest.approx(dense.truths(), rel=0.01)


def paired(seed: int, gap: float) -> Tensor:
    """Two eigenvectors on top whose eigenvalues agree but for a gap, spread over all layers unlike."""
    draw, size = torch.Generator().manual_seed(seed), 60 + 8 * 40
    noise = torch.randn(size, size, generator=draw, dtype=torch.float64) / size**0.5
    weights = torch.rand(9, 2, generator=draw, dtype=torch.float64)
    owner = torch.tensor([0] * 60 + [1 + k for k in range(8) for _ in range(40)])
    top = torch.linalg.qr(torch.randn(size, 2, generator=draw, dtype=torch.float64) * weights[owner]).Q
    return (noise + noise.T) / 2 + top * torch.tensor([10.0, 10.0 * (1 - gap)], dtype=torch.float64) @ top.T


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.0, 0.005])
def test_a_pair_on_top_hides_no_depth(gap: float) -> None:
    """The bound on the second supposes that there is none. What Lanczos takes for one vector has a part in each."""
    for seed in range(20):
        dense = Dense(paired(seed, gap), 60, 8)
        dense.solver = replace(dense.solver, seed=seed)
        found = dense.curve()
        assert all(s.converged for s in found)
        assert [s.value for s in found] == pytest.approx(dense.truths(), rel=0.03)


def test_where_products_are_not_exact_each_depth_starts_afresh() -> None:
    dense = Dense(coupled(0, top=6.0), 60, 8)
    dense.exact = False
    dense.curve()
    assert dense.cold == 7


def test_what_is_found_has_to_lie_above_the_bound_by_its_residual() -> None:
    dense = Dense(coupled(0, top=6.0), 60, 8)
    top = dense.solver.extremes(dense.operator(None, dense.upto(8)))
    last = dense.upto(7)

    def tried(second: float, ceiling: float, vector: Tensor | None) -> Solved:
        wide = replace(top, second=second, ceiling=ceiling, vector=vector)
        return module.lowered(dense, None, last, Solved(dense.upto(8), wide))  # type: ignore[arg-type]

    found = tried(0.5 * top.ceiling, inf, top.vector)
    assert found.converged
    assert found.extremes
    assert found.extremes.top
    residual = found.extremes.top.residual
    assert 1e-5 * found.value < residual
    assert not tried(found.value - residual / 2, inf, top.vector).converged
    assert tried(found.value - residual / 2, 1.05 * found.value, top.vector).converged, "the ceiling is near enough"
    assert not tried(inf, inf, top.vector).converged
    assert not tried(0.5 * top.ceiling, inf, None).converged


def test_what_is_not_symmetric_bounds_no_depth() -> None:
    """A first product says nothing of symmetry, and so cannot stand for the depths below."""
    skew = torch.randn(380, 380, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 380**0.5
    dense = Dense(coupled(0, top=6.0) + 1.5 * (skew - skew.T), 60, 8)
    full = dense.solver.extremes(dense.operator(None, dense.upto(8)))
    assert full.status == "asymmetric"
    found = module.lowered(dense, None, dense.upto(7), Solved(dense.upto(8), full))  # type: ignore[arg-type]
    assert not found.converged
