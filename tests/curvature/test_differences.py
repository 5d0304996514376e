"""Products by differences of gradients: near exact ones, at a length that is found, and refused where they are wrong.

The reference is double backward, and a dense Hessian; both share first-order autograd with differences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from fused import FusedCrossEntropy, OneWayTanh
from torch import Tensor, nn

from curvcli import analyze
from curvcli.curvature.differences import FACTOR, Differences, Step, choose, settled, trusted
from curvcli.curvature.hvp import FreshGraph
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.operator import DenseOperator
from curvcli.curvature.problem import Problem
from curvcli.curvature.ritz import Extremes
from curvcli.curvature.stepped import Stepped, suited
from curvcli.errors import UnsupportedError

EXACT = Lanczos(tolerance=1e-2, margin=3e-2)


def _problem(dtype: torch.dtype = torch.float64) -> Problem:
    batches = models.data()
    return Problem.create(models.Net().to(dtype), models.loss, batches, models.weights(batches))


def _direction(problem: Problem) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in problem.parameters.values()]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).double()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-8), (torch.float32, 3e-3)])
def test_a_product_finds_its_own_length(dtype: torch.dtype, error: float) -> None:
    problem = _problem(dtype)
    names, tangents = list(problem.parameters), _direction(problem)
    exact = _flat(FreshGraph(problem).product(names, tangents))
    # On one row of the embedding, of which a step relative to all weights is a large part.
    sharp = [t * 0 for t in tangents]
    sharp[0][2] = 1e3
    for along in (tangents, [1e-6 * t for t in tangents], sharp):
        truth = _flat(FreshGraph(problem).product(names, along))
        found = _flat(Differences(problem, Step()).product(names, along))
        assert float((found - truth).norm() / truth.norm()) < error
    half = Differences(problem, Step()).subset([1]).product(names, tangents)
    truth = _flat(FreshGraph(problem.subset([1])).product(names, tangents))
    assert float((_flat(half) - truth).norm() / truth.norm()) < error
    assert float((exact - truth).norm() / truth.norm()) > 0.1  # another function
    zero = Differences(problem, Step()).product(names, [0 * t for t in tangents])
    assert not any(bool(image.any()) for image in zero)


def test_of_some_parameters() -> None:
    problem = _problem()
    names = ["layers.1.up.weight", "head.bias"]
    tangents = [t for n, t in zip(problem.parameters, _direction(problem), strict=True) if n in names]
    truth = _flat(FreshGraph(problem).product(names, tangents))
    found = _flat(Differences(problem, Step()).product(names, tangents))
    assert float((found - truth).norm() / truth.norm()) < 1e-8


def test_weights_are_the_same_to_the_bit_afterwards_whatever_happens() -> None:
    problem = _problem(torch.float32)
    before = [(p, p.data_ptr(), p.detach().clone()) for p in problem.parameters.values()]
    calls = []

    def breaks(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(not torch.equal(before[0][0], before[0][2]))
        if len(calls) == 3:  # of four: the second side, the first batch
            raise ValueError("of the user's")
        return models.loss(model, batch)

    names, tangents = list(problem.parameters), _direction(problem)
    Differences(problem, Step(length=1e-3)).product(names, tangents)
    with pytest.raises(ValueError, match="of the user's"):
        Differences(replace(problem, loss=breaks), Step(length=1e-3)).product(names, tangents)
    assert calls == [True, True, True]  # they had been moved
    for parameter, place, value in before:
        assert parameter.data_ptr() == place
        assert torch.equal(parameter.detach().view(torch.int32), value.view(torch.int32))
        assert parameter.grad is None


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e2])
def test_a_length_is_found_from_either_side(start: float) -> None:
    """Truncation c h^2 and rounding of a known size s / h: the best is (s / 2c)^(1/3) = 0.0079."""
    generator = torch.Generator().manual_seed(0)

    def image(h: float) -> Tensor:
        noise = torch.randn(100, generator=generator, dtype=torch.float64)
        return 7.0 + (h**2 + 1e-6 / h * noise) / 10  # of norm 1

    length, found, apart = settled(image, lambda a, b: float((a - b).norm()), start, enough=0.0)
    assert 0.0079 / FACTOR < length < 0.0079 * FACTOR
    assert float((found - 7).norm()) < 1.5 * apart < 5e-3


class _Noisy(DenseOperator):
    """A matrix whose images are off by what differences of a length are off by; the length is the step's."""

    def __init__(self, matrix: Tensor, step: Step, rounding: float) -> None:
        super().__init__(matrix)
        self.step, self.rounding = step, rounding
        self.lengths: list[float] = []
        self.generator = torch.Generator().manual_seed(1)

    def matvec(self, vector: Tensor) -> Tensor:
        image, length = self.matrix @ vector, self.step.length
        if length is None:
            return image
        self.lengths.append(length)
        noise = torch.randn(len(vector), generator=self.generator, dtype=torch.float64)
        return image + 1e6 * length**2 * vector**3 + self.rounding / length * noise / noise.norm()


def _matrix() -> tuple[Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(80, 80, generator=generator, dtype=torch.float64)).Q
    values = torch.cat([torch.tensor([100.0, 90.0, -50.0]), torch.linspace(0, 5, 77)]).double()
    return basis @ torch.diag(values) @ basis.T, 100.0


@pytest.mark.parametrize("rounding", [1e-9, 1e-7, 1e-5])
def test_the_certificate_holds_what_differences_leave_in_doubt(rounding: float) -> None:
    matrix, truth = _matrix()
    solver, step = suited(EXACT, "differences")
    assert isinstance(solver, Stepped)
    assert step is not None
    operator = _Noisy(matrix, step, rounding)
    found = solver.extremes(operator)
    length = operator.lengths[-2]
    assert rounding / length + 1e6 * length**2 < 0.05 * truth  # where neither is much, which the step finds
    assert found.top is not None
    assert found.status == "converged"
    assert found.vector is not None
    true = float((matrix @ found.vector - found.top.value * found.vector).norm())
    assert true <= found.top.residual <= 0.01 * truth
    assert abs(found.top.value - truth) <= found.top.residual
    assert found.ceiling >= truth
    assert step.floor is not None
    assert "lay" in step.said()["differences"]


def test_both_bounds_from_above_hold_what_differences_leave_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, theirs = [], Lanczos.extremes

    def told(self: Lanczos, *arguments: Any) -> Extremes:
        exact.append(theirs(self, *arguments))
        return exact[-1]

    monkeypatch.setattr(Lanczos, "extremes", told)
    monkeypatch.setattr("curvcli.curvature.stepped._Paced.refined", lambda *_: False)
    step = Step(reach=50.0)
    found = Stepped(step=step).extremes(_Biased(_matrix()[0], step))
    assert found.ceiling > exact[-1].ceiling + 1
    assert found.second - exact[-1].second == pytest.approx(found.ceiling - exact[-1].ceiling)


def test_nothing_is_converged_that_is_closer_than_the_differences_are() -> None:
    matrix, _ = _matrix()
    solver, step = suited(EXACT, "differences")
    assert step is not None
    found = solver.extremes(_Noisy(matrix, step, 10.0))
    assert found.status != "converged"
    plain = EXACT.extremes(DenseOperator(matrix))
    assert plain.status == "converged"
    assert suited(EXACT, "fresh") == (EXACT, None)


class _Biased(DenseOperator):
    """A matrix whose images are too long by 2 % at a step of 1, and by its square at others: all of them alike."""

    def __init__(self, matrix: Tensor, step: Step) -> None:
        super().__init__(matrix)
        self.step = step

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector * (1 + 0.02 * (self.step.length or 0.0) ** 2)


def test_what_is_off_alike_everywhere_shows_at_another_length(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, truth = _matrix()
    monkeypatch.setattr("curvcli.curvature.stepped._Paced.refined", lambda *_: False)
    for reach, status in ((50.0, "max-hvps"), (0.5, "converged")):  # steps of 1 and of a tenth
        step = Step(reach=reach)
        found = Stepped(step=step).extremes(_Biased(matrix, step))
        assert found.status == status
        assert found.top is not None
        assert abs(found.top.value - truth) <= found.top.residual
        assert found.ceiling >= truth
    assert step.floor is not None
    assert 1e-5 < step.floor < 1e-3


def test_another_step_is_looked_for_where_two_lengths_disagree() -> None:
    matrix, truth = _matrix()
    step = Step(reach=50.0)
    found = Stepped(step=step).extremes(_Biased(matrix, step))
    assert found.status == "converged"
    assert found.top is not None
    assert found.top.value == pytest.approx(truth, rel=2e-3)
    assert step.reach is not None
    assert step.reach < 5


def _network(kink: nn.Module, rows: int = 256, width: int = 64) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), kink, nn.Linear(width, width), kink, nn.Linear(width, 4))
    batches = [torch.randn(rows, 8)]
    return Problem.create(model, lambda m, b: nn.functional.cross_entropy(m(b), b[:, :4].argmax(1)), batches)


def test_kinks_are_refused_in_one_sentence() -> None:
    trusted(_network(nn.GELU()))
    with pytest.raises(UnsupportedError, match="relu have kinks") as error:
        choose(_network(nn.ReLU()), mode="differences")
    assert "--mode fresh" in str(error.value.hint)


def test_kinks_are_refused_whatever_two_lengths_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small jumps add up to what lengths agree on: only an exact product tells."""
    monkeypatch.setattr("curvcli.curvature.differences.AGREE", 1e9)
    with pytest.raises(UnsupportedError, match=r"are \d+% off an exact product on this model: its relu have kinks"):
        trusted(_network(nn.ReLU()))
    trusted(_network(nn.GELU()))


def _one_way() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))

    def loss(m: nn.Module, b: Tensor) -> Tensor:
        hidden = OneWayTanh.apply(m[0](b))
        return FusedCrossEntropy.apply(m[1](hidden), b.argmax(dim=1) % 2)

    return Problem.create(model, loss, [torch.randn(8, 3), torch.randn(8, 3)])


@pytest.mark.slow
def test_a_model_without_second_derivatives_is_measured() -> None:
    problem = _one_way()
    with pytest.raises(UnsupportedError, match="second derivatives"):
        analyze(problem.model, problem.loss, problem.batches)
    report = analyze(problem.model, problem.loss, problem.batches, mode="differences")
    plain = analyze(
        problem.model,
        lambda m, b: nn.functional.cross_entropy(m[1](torch.tanh(m[0](b))), b.argmax(dim=1) % 2),
        problem.batches,
    )
    assert report.full.status == "converged"
    assert report.cost.mode == "differences"
    assert report.full.eigenvalue == pytest.approx(plain.full.eigenvalue, rel=1e-2)
    assert any(f.code == "differences" for f in report.findings)
    assert not any(f.code == "differences" for f in plain.findings)


def test_kinks_without_an_exact_product_are_refused_by_their_operations() -> None:
    problem = Problem.create(nn.Linear(3, 2), lambda m, b: OneWayTanh.apply(m(b)).square().mean(), [torch.randn(8, 3)])
    trusted(problem)
    with pytest.raises(UnsupportedError, match="relu have kinks, where a gradient jumps, and it has no second"):
        trusted(replace(problem, loss=lambda m, b: OneWayTanh.apply(m(b).relu()).square().mean()))


def test_where_no_two_lengths_agree_there_is_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _network(nn.GELU())
    monkeypatch.setattr("curvcli.curvature.differences.AGREE", 0.0)
    found = Differences(problem, Step()).product(list(problem.parameters), _direction(problem))
    assert all(bool(image.isnan().all()) for image in found)
    monkeypatch.setattr("curvcli.curvature.differences._exact", lambda *_, **__: None)
    monkeypatch.setattr("curvcli.curvature.differences.kinks_of", lambda _: [])
    with pytest.raises(UnsupportedError, match=r"those of two step lengths lie \d+% apart: float32 rounds too much"):
        trusted(problem)
