"""A track as a table, as CSV and as a picture: what is said, what is left out, and what fits."""

from __future__ import annotations

import csv
import io
from math import isnan

import pytest
from rich.console import Console
from tracks import asset, at, course, failed, track

from curvcli.documents import Track, TrackPoint, TrainingStep
from curvcli.render.series import track_series
from curvcli.render.track_plot import plot_track
from curvcli.render.track_table import show, to_csv


def shown(document: Track, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    show(document, Console(file=stream, width=width, color_system=None))
    stream.seek(0)
    return stream.read()


def line(text: str, step: int) -> str:
    return next(row for row in text.splitlines() if row.lstrip().startswith(f"{step} "))


@pytest.mark.parametrize("width", [60, 80, 140])
def test_fits_and_keeps_what_matters(width: int) -> None:
    text = shown(course(), width)
    assert max(map(len, text.splitlines())) <= width
    for title in ("step", "rho", "surge", "loss", "verdict"):
        assert title in text
    assert "5.1 !" in line(text, 60)
    assert "unstable" in line(text, 60)
    assert "failed" in line(text, 50)
    assert "0.989?" in line(text, 70)
    assert "step 50: optimizer.pt is truncated; copy it again" in text
    assert "surge: rho at step 60" in text
    words = " ".join(text.split())
    assert "! rho is more than 2 times the median of up to 5 checkpoints before" in words
    assert "137 Hessian-vector products, 33.9 s" in words
    assert "9 checkpoints: 6 measured, 2 cached, 1 failed" in words
    assert ("lambda" in text, "cached  " in text, "│" in text) == (True, width >= 80, width == 140)


def test_bars_stop_at_the_edge_or_say_that_they_do_not() -> None:
    text = shown(track([at(asset("hot"), 10, 0.5), at(asset("hot"), 20, 1 / 1.505), at(asset("hot"), 30, 20.0)]), 140)
    below, on, past = (line(text, step) for step in (10, 20, 30))
    assert below.count("█") * 2 == pytest.approx(on.count("█") * 1.5, abs=1)
    assert past.rstrip().endswith(">")
    assert past.count("█") == 4 * on.count("█") - 1
    assert shown(course(), 140).count("│") == len(course().points) - 2
    assert shown(course(), 140, "ascii").isascii()


def test_the_state_of_the_newest_measured_point_is_at_the_top() -> None:
    assert "STABLE   rho 0.594  at step 90" in shown(course())
    text = shown(track([at(asset("hot"), 60), failed(70)]))
    assert "UNSTABLE   rho 1.51  at step 60" in text
    assert "the newest checkpoint could not be measured" in text
    doubtful = shown(track([at(asset("hot"), 60, status="unconverged")]))
    assert "unconverged: not to be relied on" in doubtful
    assert "nothing could be measured" in shown(track([failed(10), failed(None)]))


def test_a_track_is_anybodys_text() -> None:
    point = failed(5, "a\x1b]0;owned\x07b\nc [red]d[/red]")
    text = shown(track([at(asset("hot"), 60), point], run="x\x1b[2Jy"))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "b c [red]d[/red]" in text


def test_csv_is_rfc_4180_and_exact() -> None:
    document = course()
    text = to_csv(document)
    assert text.endswith("\r\n")
    assert text.count("\r\n") == text.count("\n") == len(document.points) + 1
    found = list(csv.DictReader(io.StringIO(text)))
    assert [row["step"] for row in found] == [str(point.step) for point in document.points]
    for row, point in zip(found, document.points, strict=True):
        assert row["source"] == point.source
        if point.report is None:
            assert row["rho"] == row["lambda"] == row["verdict"] == row["lambda model.layers.0"] == ""
            continue
        assert float(row["rho"]) == point.report.full.rho
        assert float(row["lambda"]) == point.report.full.eigenvalue
        assert [float(row[f"lambda {layer.name}"]) for layer in point.report.layers] == [
            layer.eigenvalue for layer in point.report.layers
        ]
    assert found[4]["message"] == "optimizer.pt is truncated; copy it again"
    assert [row["surged"] for row in found].count("true") == 3


def test_csv_quotes_and_leaves_out_what_is_not_certified() -> None:
    report = asset("hot")
    doubtful = report.layers[1].model_copy(update={"status": "unconverged"})
    layers = [report.layers[0].model_copy(update={"name": 'a,"b"\n'}), doubtful, *report.layers[2:]]
    found = list(csv.reader(io.StringIO(to_csv(track([report.model_copy(update={"layers": layers})])), newline="")))
    assert [len(row) for row in found] == [len(found[0])] * 2
    cells = dict(zip(*found, strict=True))
    assert float(cells['lambda a,"b" ']) == report.layers[0].eigenvalue
    assert cells["lambda model.layers.1"] == ""


def test_what_is_drawn() -> None:
    data = track_series(course())
    places, rho = data["rho"]
    assert places == list(range(10, 100, 10))
    # Broken where nothing was measured and where it is not certified, which stands apart.
    assert [isnan(y) for y in rho] == [False] * 4 + [True, False, True, False, False]
    assert data["rho?"][0] == [70]
    assert data["failed"][0] == [50]
    assert data["surges"][0] == [30, 40, 60]
    assert all(low <= high for low, high in zip(data["low"][1], data["high"][1], strict=True))
    assert 70 not in data["low"][0]
    assert [isnan(y) for y in data["ratio"][1]] == [False] * 4 + [True, True, False, False, False]
    assert len(data["loss"][0]) == 90


def test_checkpoints_without_a_step_are_counted_and_no_log_is_laid_over_them() -> None:
    document = course()
    points = [
        point.model_copy(update={"step": None}) if point.step == 20 else point for point in document.points
    ]  # fmt: skip
    data = track_series(document.model_copy(update={"points": points}))
    assert data["rho"][0] == list(range(1, 10))
    assert data["loss"][0] == [1, 2, 3, 4, 6, 7, 8, 9]
    # A failed one without a step does not take the axis from the others: it has no place on it.
    assert track_series(track([at(asset("hot"), 60), failed(None), at(asset("hot"), 80)]))["rho"][0] == [60, 80]


@pytest.mark.parametrize("suffix", ["svg", *(pytest.param(s, marks=pytest.mark.slow) for s in ("png", "pdf"))])
def test_the_picture_is_of_its_format_and_always_the_same(suffix: str) -> None:
    document = track([at(asset("calm"), 10), at(asset("hot"), 20, 4.0), failed(30)])
    first = plot_track(document, suffix)
    assert first.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    assert first == plot_track(document, suffix)


def test_tables_of_little_and_of_odd_values() -> None:
    hot = asset("hot")
    bare: TrackPoint = track([hot.model_copy(update={"update": hot.update.model_copy(update={"ratio": 1.5})})]).points[0]
    held = hot.generalisation.model_copy(update={"rho_low": -17.0})
    for document in (
        track([hot]),
        track([failed(10)]),
        track([bare, at(hot, 70, -1.0)]),
        track([hot.model_copy(update={"generalisation": held}), at(hot, 70, 9.0)]),
        track([hot], log=[TrainingStep(step=1, loss=None, lr=None), TrainingStep(step=2, loss=3.0, lr=0.0)]),
    ):
        assert shown(document)
        assert to_csv(document)
