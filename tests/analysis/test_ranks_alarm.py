"""Several ranks, of which the first alone hears the alarm, in the middle of a product."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from ranks import launch
from rare import measured
from torch import Tensor

from curvcli import analyze
from curvcli.analysis.solve import Measurement
from curvcli.curvature.hvp import FreshGraph
from curvcli.curvature.ranks import Processes, within
from curvcli.documents import Report
from curvcli.errors import OutOfTime


def _rung(rank: int, stage: str) -> None:
    """From now on rank 0 is broken into at the first product of a stage."""
    doing: list[str] = []
    product = FreshGraph.product
    setup = Measurement.__init__

    def watched(self: Measurement, *arguments: object, **options: object) -> None:
        setup(self, *arguments, **options)  # type: ignore[arg-type]
        enter = self.stages.enter
        self.stages.enter = lambda name, **how: (doing.append(name), enter(name, **how))[1]  # type: ignore[method-assign]

    def broken(self: FreshGraph, names: list[str], tangents: list[Tensor]) -> list[Tensor]:
        if rank == 0 and doing and doing[-1] == stage:
            raise OutOfTime
        return product(self, names, tangents)

    Measurement.__init__ = watched  # type: ignore[method-assign, assignment]
    FreshGraph.product = broken  # type: ignore[method-assign, assignment]


def _layers(rank: int, path: Path) -> None:
    _rung(rank, "layer 1")
    model, batches = models.Net(), models.data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    models.train(model, optimizer, batches)
    with within(Processes()):
        report = analyze(model, models.loss, batches, optimizer, weights=models.weights(batches), mode="fresh")
    (path / f"{rank}.json").write_text(report.to_json())


def _body(rank: int, path: Path) -> None:
    _rung(rank, "full model without rare rows")
    with within(Processes()):
        report, _, _ = measured(2, mode="fresh")
    (path / f"{rank}.json").write_text(report.to_json())


@pytest.mark.slow
def test_what_was_finished_stands_in_all_ranks(tmp_path: Path) -> None:
    launch(_layers, tmp_path)
    for rank in range(2):
        report = Report.model_validate_json((tmp_path / f"{rank}.json").read_text())
        assert report.full.status == "converged"
        assert [layer.status for layer in report.layers] == ["converged", "skipped", "skipped"]


@pytest.mark.slow
def test_the_full_model_stands_in_all_ranks_where_its_body_was_broken_into(tmp_path: Path) -> None:
    launch(_body, tmp_path)
    for rank in range(2):
        report = Report.model_validate_json((tmp_path / f"{rank}.json").read_text())
        assert report.full.status == "converged"
        assert report.body is not None
        assert report.body.status == "skipped"
