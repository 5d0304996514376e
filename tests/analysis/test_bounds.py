"""What a part's value says of the whole: who bounds whom."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import models
import pytest
import torch

from curvcli.analysis.api import analyze
from curvcli.analysis.measured import Measured, Solved, violates
from curvcli.analysis.solve import Measurement
from curvcli.curvature.ritz import Extremes, Ritz


def test_products_that_are_not_symmetric_bound_nothing() -> None:
    part = Solved(["w"], Extremes(Ritz(2.0, 0.01), None, None, "asymmetric", 3, ceiling=2.1))
    whole = Solved(["w"], Extremes(Ritz(1.98, 0.01), None, None, "converged", 3, ceiling=2.05))
    assert whole.over([part]) is whole
    assert not violates(part, Solved(["w"], replace(whole.extremes, ceiling=1.99)))  # type: ignore[type-var]


def test_the_body_lies_between_its_layers_and_the_full_model() -> None:
    """The verdict is on it, so no layer is to come out above it, nor the full model below it."""

    def solved(value: float, names: list[str]) -> Solved:
        return Solved(names, Extremes(Ritz(value, 0.01), None, None, "converged", 3, ceiling=1.1 * value))

    found = Measured(0.0, solved(2.0, ["e", "a"]), body=solved(2.01, ["e", "a"]), rare={"e": 1})
    for value, names, wrong in ((2.02, ["a"], False), (2.5, ["e"], False), (2.5, ["a"], True)):
        found.full, found.layers = solved(2.0, ["e", "a"]), [solved(value, names)]
        Measurement.settle(SimpleNamespace(layer_names=[names]), found)  # type: ignore[arg-type]
        assert found.body is not None
        assert (found.body.value, found.body.inconsistent) == (2.01, wrong), "a layer that looks rows up is no part of it"
    found.full, found.layers, found.body = solved(2.0, ["e", "a"]), [], solved(2.01, ["e", "a"])
    Measurement.settle(SimpleNamespace(layer_names=[]), found)  # type: ignore[arg-type]
    assert found.full.value == 2.01


@pytest.mark.parametrize("count", [4, 1])
def test_the_upper_end_of_rho_covers_the_ceiling(count: int) -> None:
    """Of the same batch four times no fold moves the value: what is left is how well a solve knows it, 1 %."""
    model, (batch, _) = models.Net(), models.data(rows=720)  # no row is rare
    report = analyze(model, models.loss, [batch] * count, torch.optim.SGD(model.parameters(), lr=0.1), parts=False)
    full, threshold = report.full, report.optimizer.threshold
    assert report.body is None
    assert full.eigenvalue is not None
    assert full.residual is not None
    assert full.ceiling is not None
    assert full.ceiling > full.eigenvalue + 10 * full.residual
    most = full.ceiling + (0.01 * full.eigenvalue if count > 1 else 0.0)
    assert report.generalisation.rho_high == pytest.approx(most / threshold, rel=1e-6)
