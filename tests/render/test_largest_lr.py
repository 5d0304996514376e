"""What every output says of the learning rate, the odds and what to do next."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path

import pytest
from logs import record
from places import ASSETS
from rich.console import Console
from tracks import asset, at, track

from curvcli.documents import Log, LossCourse, Report, Rule, StableLr, load_report
from curvcli.judge.gate import decide
from curvcli.judge.readings import ReportReadings
from curvcli.render import gate_markdown, gate_text, table, track_table
from curvcli.render.advice import advice
from curvcli.render.headline import head, verdict_line
from curvcli.render.html import report_page, track_page
from curvcli.render.largest_lr import action, lower_to, lr_line, told
from curvcli.render.markdown import markdown
from curvcli.render.watch import header

FOUND = StableLr(
    value=0.021, low=0.008, high=0.09, confidence=0.9, group="adaptive", uncovered=["7 parameters (few)"], ratio=0.03 / 0.021
)
LINE = "largest stable lr 0.021 (0.008 to 0.09 in 90 % of ramps); you are at 0.03"


@pytest.fixture
def report() -> Report:
    found = load_report(ASSETS / "hot-60.gate.report.json")
    return found.model_copy(update={"stable_lr": FOUND, "odds": 0.64})


def printed(draw: object, *arguments: object) -> str:
    out = StringIO()
    draw(*arguments, Console(file=out, width=80, color_system=None))
    return out.getvalue()


def test_the_line() -> None:
    assert lr_line(FOUND, 0.03) == LINE
    assert lr_line(FOUND.model_copy(update={"high": None}), None) == "largest stable lr 0.021 (over 0.008 in 90 % of ramps)"


def test_every_output_of_a_report_has_it(report: Report) -> None:
    lines = printed(table.show, report).splitlines()
    assert f" {LINE}" in lines, "on one line of 80 columns"
    assert " not covered by the ramps: 7 parameters (few)" in lines
    assert " chance of a bad end at such a rho: 64 %" in lines
    assert " what to do: lower the learning rate to about 0.008" in lines
    assert LINE in markdown(report).replace("\\", "")
    assert f"L{LINE[1:]}." in report_page(report)
    assert "largest stable lr 0.021" in verdict_line(report)
    assert json.loads(report.to_json())["stable_lr"]["low"] == 0.008


def test_every_output_of_a_track_has_it(report: Report) -> None:
    run = track([at(report, step) for step in (20, 40, 60)])
    assert f" {LINE}" in printed(track_table.show, run).splitlines()
    assert "0.021" in track_page(run)
    values = next(csv.DictReader(StringIO(track_table.to_csv(run))))
    assert [float(values[k]) for k in ("stable_lr", "stable_lr_low", "stable_lr_high", "odds")] == [0.021, 0.008, 0.09, 0.64]
    assert float(values["lr_ratio"]) == pytest.approx(0.03 / 0.021)


@pytest.mark.slow
def test_an_old_track_has_no_empty_columns() -> None:
    page = track_page(track([at(asset("hot"), step) for step in (20, 40, 60)]))
    assert "max lr" not in page
    assert "max lr" in track_page(track([at(asset("hot").model_copy(update={"stable_lr": FOUND}), 20)]))


def test_a_gate_says_it(report: Report) -> None:
    gate = decide([Rule(name="max-rho", limit=1.0, source="x")], ReportReadings(report), report, path="x", kind="report")
    assert "largest stable lr 0.021" in printed(gate_text.show, gate)
    assert "largest stable lr 0.021" in gate_markdown.markdown(gate)


def test_a_certified_rho_that_is_not_positive_says_that_there_is_no_limit(report: Report) -> None:
    full = report.full.model_copy(update={"rho": -0.1, "eigenvalue": -3.0})
    flat = report.model_copy(update={"full": full, "stable_lr": None, "odds": None})
    assert told(flat) == ["no curvature is positive, so none sets a largest learning rate"]
    weak = full.model_copy(update={"status": "unconverged"})
    assert told(flat.model_copy(update={"full": weak})) == []


# --- what to do ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("stable", "go on"),
        ("edge", "go on, and do not raise the learning rate"),
        ("hot", "lower the learning rate to about 0.008"),
        ("unstable", "lower the learning rate to about 0.008"),
        ("unresolved", "no verdict: see the first finding"),
    ],
)
def test_an_action_a_verdict(report: Report, verdict: str, words: str) -> None:
    new = report.model_copy(update={"verdict": verdict})
    assert action(new) == words
    assert f"what to do: {words}" in head(new).plain


@pytest.mark.parametrize("verdict", ["unresolved", "unstable"])
def test_a_lost_network_is_to_be_stopped(report: Report, verdict: str) -> None:
    lost = LossCourse(name="collapsed", reason="it uses no context")
    new = report.model_copy(update={"verdict": verdict, "course": lost})
    assert action(new).startswith("stop: the run is collapsed; ")
    assert advice(new)[0].text.startswith("Stop: the run is collapsed; ")


def test_without_a_calibration_the_rate_is_where_rho_would_be_stable(report: Report) -> None:
    old = report.model_copy(update={"stable_lr": None})
    assert lower_to(old) == pytest.approx(0.03 * 0.8 / report.full.rho)
    above = report.model_copy(update={"stable_lr": FOUND.model_copy(update={"low": 0.04})})
    assert lower_to(above) == lower_to(old), "lowering never raises"


@pytest.mark.parametrize(
    ("step", "counted", "words"),
    [(3, 3, "step 12"), (5003, 3, "step 5,012"), (0, None, "step 12"), (None, 3, "step 12 of the optimizer")],
)
def test_when_to_measure_again(report: Report, monkeypatch: pytest.MonkeyPatch, step: int, counted: int, words: str) -> None:
    monkeypatch.setattr("curvcli.render.largest_lr.settled_after", lambda betas, momentum: 12)
    young = report.model_copy(
        update={
            "verdict": "early", "stable_lr": None, "checkpoint": report.checkpoint.model_copy(update={"step": step}),
            "optimizer": report.optimizer.model_copy(update={"step": counted}),
        }
    )  # fmt: skip
    assert action(young) == f"wait until {words}, then measure again"
    assert advice(young)[0].text == f"Wait until {words}, then measure again."
    assert head(young).plain.count("TOO EARLY") == 1
    assert "<strong>too early</strong>" in report_page(young)


def test_hot_is_said_in_words_and_has_steps(report: Report) -> None:
    hot = report.model_copy(update={"verdict": "hot"})
    assert " PROBABLY TOO HOT " in head(hot).plain
    assert "<strong>probably too hot</strong>" in report_page(hot)
    assert "to about 0.008, the low end of the largest stable one" in advice(hot)[0].text


# --- a running job ---------------------------------------------------------------------------------------------------


def test_a_young_optimizer_is_too_early_in_a_log_whatever_its_rho() -> None:
    log = Log(Path("x"), exists=True, records=(record(0, 15.0, early=True),), age=1.0)
    text = header(log).plain
    assert " TOO EARLY " in text
    assert "UNSTABLE" not in text
    assert " UNSTABLE " in header(Log(Path("x"), exists=True, records=(record(0, 15.0),), age=1.0)).plain


def test_a_log_says_the_largest_stable_rate() -> None:
    log = Log(Path("x"), exists=True, records=(record(20, 0.9, lr=0.03, stable_lr=FOUND),), age=1.0)
    assert LINE in header(log).plain
