"""An analysis by differences of gradients beside an exact one, and when a plan takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from places import SAMPLES

from curvcli import analyze
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.analysis.plan import LEAST, Sizes, fitted, plan, predicted
from curvcli.curvature.problem import Problem
from curvcli.documents import Report
from curvcli.errors import UsageError

GIB = 2**30
SIZES = Sizes(held=2 * GIB, vector=GIB // 2, largest=GIB // 8, graph=GIB, logits=GIB // 16, rows=16, activations=GIB // 4)


def test_a_plan_takes_differences_only_where_nothing_exact_fits() -> None:
    leanest = predicted(SIZES, "fresh", 1, LEAST).total
    assert plan(SIZES, leanest, 8).mode == "fresh"
    found = plan(SIZES, leanest - 1, 8)
    assert found.mode == "differences"
    assert found.total < leanest
    assert "differences of gradients, batches of" in str(found)
    with pytest.raises(UsageError, match="needs"):
        plan(replace(SIZES, activations=0), leanest - 1, 8)
    for mode in ("kept", "fresh"):
        with pytest.raises(UsageError, match="needs"):
            plan(SIZES, leanest - 1, 8, mode)  # type: ignore[arg-type]
    assert plan(SIZES, 1000 * GIB, 8, "differences").mode == "differences"
    with pytest.raises(UsageError, match="needs"):
        plan(SIZES, predicted(SIZES, "differences", 1, LEAST).total - 1, 8, "differences")


def test_a_plan_weighs_the_graph_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = models.data()
    problem = Problem.create(models.Net(), models.loss, batches, models.weights(batches))
    seen: list[Sizes] = []
    monkeypatch.setattr("curvcli.analysis.plan.plan", lambda sizes, *_: seen.append(sizes) or plan(sizes, 2**40, 8))
    fitted(problem, 2**40, "auto", 32)
    assert 0 < seen[0].activations < seen[0].graph


def _numbers(report: Report) -> dict[str, Any]:
    parts = {"full": report.full, "ends": report.ends, "body": report.body}
    parts |= {f"layer {e.index}": e for e in report.layers}
    parts |= {f"restricted {e.depth}": e for e in report.cumulative.restricted}
    parts |= {f"truncated {e.depth}": e for e in report.cumulative.truncated}
    return {name: part for name, part in parts.items() if part is not None}


def _close(exact: Report, rough: Report, error: float, low: float | None = None) -> None:
    one, other = _numbers(exact), _numbers(rough)
    assert one.keys() == other.keys()
    for name, part in one.items():
        assert other[name].status == part.status == "converged", name
        assert other[name].eigenvalue == pytest.approx(part.eigenvalue, rel=error), name
    assert rough.verdict == exact.verdict
    assert rough.update.critical_lr == pytest.approx(exact.update.critical_lr, rel=error)
    for name in ("gradient_quotient", "preconditioned_quotient"):
        assert getattr(rough.companions, name) == pytest.approx(getattr(exact.companions, name), rel=error)
    assert rough.generalisation.rho_low == pytest.approx(
        exact.generalisation.rho_low, rel=max(3 * error, 0.1)
    )  # of few folds, between other vectors


@pytest.mark.slow
def test_a_report_in_float64() -> None:
    batches, model = models.data(), models.Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    models.train(model, optimizer, batches)
    before = {n: p.clone() for n, p in model.named_parameters()}
    exact, rough = (
        analyze(
            model, models.loss, batches, optimizer, weights=models.weights(batches), tolerance=1e-4, max_hvps=200,
            truncated=True, mode=mode,  # type: ignore[arg-type]
        )
        for mode in ("fresh", "differences")
    )  # fmt: skip
    _close(exact, rough, 1e-4)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hot/checkpoint-60", "calm/checkpoint-10"])
def test_a_sample_in_float32(name: str) -> None:
    options = Options(tokens=256, device="cpu", depths=False)
    exact, rough = (analyze_checkpoint(SAMPLES / name, replace(options, mode=mode)) for mode in ("kept", "differences"))  # type: ignore[arg-type]
    _close(exact, rough, 5e-3, low=0.1)  # the bracket's lower end is of few folds, between other vectors
    assert rough.cost.mode == "differences"
