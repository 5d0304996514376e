"""The benchmark of false certificates: its operators have the eigenvalues that they claim, and its oracle is right."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import count, islice
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from curvcli.curvature.lanczos import Lanczos
from curvcli.models.blocks import find_blocks

# No package, and not typed as strictly.
spectra, oracle, networks, certificate = map(import_module, ("spectra", "oracle", "networks", "certificate"))


def dense(operator: Any) -> Tensor:
    return torch.stack([operator.matvec(row) for row in torch.eye(operator.space.size, dtype=operator.space.dtype)]).double()


def small(family: str, number: int = 3) -> Iterator[Any]:
    """Samples of at most 200 entries, of the float64 ones among them for the reflected operators."""
    samples = (spectra.sample(family, index) for index in count())
    return islice((s for s in samples if s.operator.space.size <= 200), number)


@pytest.mark.parametrize("family", [name for name in spectra.FAMILIES if name != "outlier"])
def test_eigenvalues_are_as_claimed(family: str) -> None:
    for task in small(family):
        matrix = dense(task.operator)
        rounding = (1e-13 if task.operator.space.dtype == torch.float64 else 1e-6) * task.norm
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=rounding)
        values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        torch.testing.assert_close(values, task.operator.values.sort().values, rtol=0, atol=10 * rounding)
        assert task.top == pytest.approx(float(values[-1]), abs=10 * rounding)
        assert task.norm == pytest.approx(float(values.abs().max()), abs=10 * rounding)


def test_one_in_a_million_is_an_eigenvalue_and_no_other_is_as_large() -> None:
    task = spectra.sample("outlier", 0)
    operator = task.operator
    vector = operator.eigenvector(0)
    assert float((operator.matvec(vector) - task.top * vector).norm()) < 1e-5 * task.norm
    assert operator.space.size == 1_000_000
    assert float(operator.values[1:].max()) < task.top / 1.19


def test_blocks_do_not_speak_with_each_other() -> None:
    for task in small("decoupled"):
        block = task.operator.block
        coupled = dense(task.operator)[block[:, None] != block]
        assert len(coupled)
        assert not coupled.any()


def test_the_top_lies_in_a_small_block_and_a_start_in_another() -> None:
    tasks = list(small("decoupled", 8))
    assert {task.start is None for task in tasks} == {False, True}
    for task in tasks:
        operator = task.operator
        top = operator.block == operator.block[int(operator.values.argmax())]
        assert int(top.sum()) <= max(1, operator.space.size // 50)
        assert task.start is None or not task.start[top].any()


def test_a_warm_start_is_nearly_the_second_eigenvector() -> None:
    for task in small("warm"):
        matrix, unit = dense(task.operator), (task.start / task.start.norm()).double()
        values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        assert float(unit @ matrix @ unit) == pytest.approx(float(values[-2]), rel=1e-4)
        assert 0.2 <= float(values[-2] / values[-1]) <= 0.951


@pytest.mark.parametrize("warm", [False, True])
def test_ceilings_fail_as_often_as_they_may(warm: bool) -> None:
    """At a doubt of 1 in 4 and 200 starts that nobody chose; the warm part of one is the second eigenvector."""
    *_, task = small("power", 2)
    second = task.operator.eigenvector(int(task.operator.values.argsort()[-2]))
    below = 0
    for seed in range(200):
        solver = Lanczos(tolerance=0.0, doubt=0.25, max_products=2, seed=seed)
        below += solver.extremes(task.operator, second if warm else None).ceiling < task.top - 1e-6 * task.norm
    assert 25 <= below <= 68  # at most 50 are expected, with a standard deviation of 6; of a bound that is loose, none


def test_a_sample_is_the_same_whenever_it_is_drawn_and_1_000_are_drawn() -> None:
    first, again, other = (spectra.sample("power", index) for index in (5, 5, 6))
    assert torch.equal(first.operator.values, again.operator.values)
    assert first.top != other.top
    assert sum(number for _, number in spectra.FAMILIES.values()) == 1000


@pytest.mark.parametrize("starts", [1, 2, 3])
def test_the_oracle_finds_the_top_of_a_small_block(starts: int) -> None:
    matrix = torch.diag(torch.linspace(-3, 1, 150, dtype=torch.float64))
    matrix[0, 0], matrix[1, 1] = 1.02, 1.01
    found = oracle.top(lambda block: block @ matrix, 150, starts=starts, tolerance=1e-6, most=150, seed=0)
    assert found.value == pytest.approx(1.02, abs=1e-10)
    assert found.residual <= 1e-6
    assert found.vectors < 150


def test_the_oracle_of_an_operator_that_its_space_is_too_small_for() -> None:
    found = oracle.top(lambda block: 2 * block, 3, starts=2, tolerance=1e-6, most=450, seed=0)
    assert found.value == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "RMSprop", "SGD"])
def test_the_oracle_agrees_with_dense_matrices(kind: str) -> None:
    """Hessian by finite differences; P typed out here once more."""
    model, batches = models.Net(), models.data()
    optimizer = networks.optimizer_of(networks.Case("", kind, 1e-2, 1), model)
    models.train(model, optimizer, batches)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    made = oracle.Oracle(model, models.loss, whole, optimizer, "layers")
    decay = {"Adam": 1e-3}.get(kind, 0.0)
    scale = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if kind == "SGD":
            scale[name] = torch.ones_like(p)
        elif kind == "RMSprop":
            scale[name] = 1 / (state["square_avg"].sqrt() + 1e-8)
        else:
            second = 1 - (0.99 if kind == "AdamW" else 0.999) ** 12
            scale[name] = 1 / ((1 - 0.9**12) * ((state["exp_avg_sq"] / second).sqrt() + 1e-8))

    def expected(names: list[str], depth: int | None = None) -> float:
        matrix = models.dense_hessian(model, batches, names, depth)
        root = torch.cat([scale[n].detach().flatten() for n in names]).sqrt()
        return models.top((matrix + decay * torch.eye(len(matrix))) * root * root[:, None])

    for names, truncated in (
        (models.depth_names(model, 3), None),
        (models.depth_names(model, 1), None),
        (models.layer_names(model, 1), None),
        (models.depth_names(model, 2), 2),
    ):
        assert made.top(names, truncated=truncated).value == pytest.approx(expected(names, truncated), rel=1e-5)
    assert made.names() == models.depth_names(model, 3)
    assert made.names(depth=1) == models.depth_names(model, 1)
    assert made.names(layer=1) == models.layer_names(model, 1)


@pytest.mark.parametrize("family", networks.FAMILIES)
def test_the_oracle_and_the_report_mean_the_same_blocks(family: str) -> None:
    task = networks.build(networks.Case(family, "AdamW", 4e-3, 3))
    blocks = find_blocks(task.model)
    assert blocks.prefix == task.stack
    assert isinstance(getattr(blocks.parent, blocks.attribute), nn.ModuleList)
    assert task.loss(task.model, task.draw(4, torch.Generator().manual_seed(0))).dim() == 0


@pytest.mark.slow
def test_a_checkpoint_has_a_truth_for_everything_in_its_report() -> None:
    case = networks.Case("mlp", "AdamW", 4e-3, 3)
    ((step, task, optimizer),) = networks.train(case, (2,))
    row = certificate.checkpoint(case, step, task, optimizer)
    layers = len(task.model.get_submodule(task.stack))
    assert len(row["readings"]) == 3 + 3 * layers
    assert all(r["truth_residual"] < 1e-5 for r in row["readings"])
    found = certificate.summary([row])
    assert (found["full"]["converged"], found["full"]["false"]) == (1, 0)
    assert found["layer"]["readings"] == layers


def _row(**changes: Any) -> dict[str, Any]:
    row = {"status": "converged", "value": 96.9, "truth": 100.0, "truth_residual": 1e-7, "ceiling": None, "products": 7}
    return {**row, **changes}


def test_what_counts_as_false() -> None:
    assert certificate.is_false(_row())
    assert certificate.is_false(_row(value=103.1))
    assert certificate.is_false(_row(value=1.0, truth=0.0))
    assert not certificate.is_false(_row(value=97.1))
    assert not certificate.is_false(_row(status="unconverged"))
    assert not certificate.is_false(_row(status="non-finite", value=None))
    assert not certificate.is_false(_row(truth_residual=0.1))
    assert not certificate.is_false(_row(value=0.0, truth=0.0))
    assert not certificate.is_false(_row(norm=1e6))  # float32 beside a negative end ten thousand times as large
    counted = certificate.count(
        [_row(), _row(ceiling=99.9), _row(ceiling=101.0), _row(status="max-hvps"), _row(truth_residual=1)]
    )
    assert [counted[k] for k in ("readings", "without_truth", "converged", "false")] == [5, 1, 3, 3]
    assert [counted[k] for k in ("ceilings", "ceilings_below")] == [2, 1]
