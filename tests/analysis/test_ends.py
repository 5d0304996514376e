"""Embedding and head are a part like any layer: measured alone with a certificate, and in every output."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import models
import pytest
import torch
from places import ASSETS
from rich.console import Console
from tracks import asset, track

from curvcli.analysis.api import analyze
from curvcli.documents import Report, Rule, load_report
from curvcli.judge.compare import compare
from curvcli.judge.gate import judge
from curvcli.judge.readings import ReportReadings
from curvcli.render import compare as compared
from curvcli.render import table, track_table
from curvcli.render.csv import csv as report_csv
from curvcli.render.html import report_page, track_page
from curvcli.render.markdown import markdown
from curvcli.render.plot import plot
from curvcli.render.series import heat, report_series

OUTER = ["embed.weight", "head.weight", "head.bias"]


def flat_blocks() -> models.Net:
    """Blocks that do next to nothing: embedding and head are sharpest."""
    model = models.Net()
    with torch.no_grad():
        for layer in model.layers:
            layer.down.weight.mul_(0.01)
            layer.up.weight.mul_(0.01)
    return model


def measured(model: models.Net, *, depths: bool = False) -> Report:
    batches = models.data()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    return analyze(
        model, models.loss, batches, optimizer, weights=models.weights(batches), tolerance=1e-4, max_hvps=400, depths=depths
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return measured(flat_blocks())


def test_they_are_measured_without_depths_too(report: Report) -> None:
    assert report.ends is not None
    truth = models.top(models.dense_hessian(flat_blocks(), models.data(), OUTER))
    assert report.ends.eigenvalue == pytest.approx(truth, rel=1e-4)
    assert (report.ends.status, report.ends.name, report.ends.parameters) == ("converged", "embedding, head", 7 * 5 + 6 * 7)
    assert report.ends.residual is not None
    assert report.ends.residual <= 3e-4 * truth
    assert report.cumulative.restricted == []
    assert [part.name for part in report.parts] == ["embedding, head", "layers.0", "layers.1", "layers.2"]
    assert sum(part.parameters for part in report.parts) == report.checkpoint.parameters


def test_they_are_the_beginning_of_the_restricted_curve() -> None:
    whole = measured(models.Net(), depths=True)
    assert whole.ends is not None
    assert whole.ends.eigenvalue == pytest.approx(whole.cumulative.restricted[0].eigenvalue, rel=1e-4)
    assert whole.ends.hvps > 0


def test_the_sharpest_part_is_named(report: Report) -> None:
    found = next(f.message for f in report.findings if f.code == "sharpest-layer")
    assert found.startswith("embedding and head are sharper than any layer, lambda")
    assert "ends-dominate" in [f.code for f in report.findings], "without depths too"


def test_every_output_has_them(report: Report) -> None:
    assert report.ends is not None
    value = report.ends.eigenvalue
    rows = list(csv.DictReader(io.StringIO(report_csv(report))))
    assert [(row["part"], row["name"], float(row["eigenvalue"])) for row in rows if row["part"] == "ends"] == [
        ("ends", "embedding, head", value)
    ]
    assert "| ends | embedding, head |" in markdown(report)
    console = Console(file=io.StringIO(), width=100)
    table.show(report, console)
    assert "embedding, head" in console.file.getvalue()  # type: ignore[attr-defined]
    assert report_series(report)["embedding, head alone"] == ([-0.5], [value])
    page = report_page(report)
    assert f"<title>embedding, head alone: {value:,.4g}</title>" in page
    assert "<td>ends</td><td>embedding, head</td>" in page
    assert plot(report, "svg") != plot(report.model_copy(update={"ends": None}), "svg")


def test_tracks_have_them(report: Report) -> None:
    run = track([report.model_copy(update={"checkpoint": report.checkpoint.model_copy(update={"step": 3})})])
    row = next(csv.DictReader(io.StringIO(track_table.to_csv(run))))
    assert float(row["lambda embedding, head"]) == report.ends.eigenvalue  # type: ignore[union-attr]
    found = heat(run)
    assert found is not None
    assert found.cells[0].label.startswith("embedding, head, step 3: rho")
    assert "<td>ends</td><td>embedding, head</td>" in track_page(run)


def test_a_gate_on_layers_looks_at_them(report: Report) -> None:
    rho = report.ends.rho  # type: ignore[union-attr]
    assert rho is not None
    below = max(layer.rho or 0.0 for layer in report.layers)
    assert rho > 1.1 * below
    outcome = judge([Rule(name="max-layer-rho", limit=(rho + below) / 2, source="x")], ReportReadings(report))[0]
    assert (outcome.outcome, outcome.part) == ("broken", "embedding, head")


def test_a_comparison_has_them(report: Report) -> None:
    assert report.ends is not None
    before = report.ends.model_copy(
        update={"eigenvalue": report.ends.eigenvalue / 10, "rho": report.ends.rho / 10, "residual": 0.0, "ceiling": None}
    )  # type: ignore[operator]
    found = compare(report.model_copy(update={"ends": before}), report, names=("a", "b"))
    assert [(change.part, change.name) for change in found.changes[:2]] == [
        ("full", "without rare rows"),
        ("ends", "embedding, head"),
    ]
    assert found.changes[1].ratio == pytest.approx(10)
    assert "rho of embedding, head rose most" in found.findings[0].message
    assert "| embedding, head |" in compared.to_markdown(found)


def test_where_they_do_not_train_they_are_left_out() -> None:
    model = models.Net()
    for name in OUTER:
        model.get_parameter(name).requires_grad_(False)
    frozen = measured(model)
    assert frozen.ends is not None
    assert (frozen.ends.status, frozen.ends.parameters) == ("empty", 0)
    outcome = judge([Rule(name="max-layer-rho", limit=1e9, source="x")], ReportReadings(frozen))[0]
    assert outcome.outcome == "passed"
    assert "1 of 4 parts do not train" in outcome.message


def test_old_documents_are_read() -> None:
    """Written before embedding and head were measured alone: the restricted curve's depth 0 is them."""
    text = (ASSETS / "hot-60.gate.report.json").read_text()
    assert '"ends"' not in text
    old = asset("hot")
    assert old.ends is None
    first = old.cumulative.restricted[0]
    assert (old.parts[0].name, old.parts[0].eigenvalue, old.parts[0].rho) == ("embedding, head", first.eigenvalue, first.rho)
    assert sum(part.parameters for part in old.parts) == old.checkpoint.parameters
    assert len(old.parts) == 9


def test_old_documents_without_depths_are_read(tmp_path: Path) -> None:
    found = json.loads((ASSETS / "hot-60.gate.report.json").read_text())
    found["cumulative"] = {"restricted": [], "truncated": []}
    (tmp_path / "old.json").write_text(json.dumps(found))
    old = load_report(tmp_path / "old.json")
    assert old.parts == old.layers
    assert "<td>embedding, head</td>" not in report_page(old)
    assert report_series(old)["embedding, head alone"] == ([], [])


def test_a_bottom_within_its_residual_is_never_read_as_converged(tmp_path: Path) -> None:
    """Documents of old versions have them, as -12.7 with a residual of 202."""
    found = json.loads((ASSETS / "hot-60.gate.report.json").read_text())
    layer = found["layers"][0]
    layer |= {"most_negative": -12.7, "most_negative_residual": 202.0, "most_negative_status": "converged"}
    found["full"] |= {"most_negative": -300.0, "most_negative_residual": 20.0, "most_negative_status": "converged"}
    found["layers"][1] |= {"most_negative": None, "most_negative_residual": None, "most_negative_status": "converged"}
    (tmp_path / "old.json").write_text(json.dumps(found))
    old = load_report(tmp_path / "old.json")
    assert [e.most_negative_status for e in (old.full, *old.layers[:2])] == ["converged", "unconverged", "unconverged"]
