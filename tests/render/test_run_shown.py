"""The verdict on a run where people read it, and no more findings than they asked for."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from tracks import asset, at, track

from curvcli.documents import BodyEstimate, Finding, Rule, Track, TrainingStep
from curvcli.judge.gate import decide
from curvcli.judge.readings import ReportReadings
from curvcli.judge.run import judge_track, run_findings
from curvcli.render import gate_text, table, track_table
from curvcli.render.html import track_page
from curvcli.render.track_markdown import markdown
from curvcli.render.track_plot import _heading

LOSSES = [*[5 - 0.05 * i for i in range(60)], *[4.0] * 40]
NOTES = [Finding(code=f"note-{i}", severity="info", message="said") for i in range(7)]


@pytest.fixture(scope="module")
def wrecked() -> Track:
    log = [TrainingStep(step=i + 1, loss=loss, lr=1e-3) for i, loss in enumerate(LOSSES)]
    found = track([at(asset("calm"), 40), at(asset("calm"), 100, 0.01)], log=log)
    verdict = judge_track(found)
    assert verdict is not None
    return found.model_copy(update={"verdict": verdict, "findings": [*run_findings(verdict), *NOTES]})


def shown(document: Track, width: int = 80, *, verbose: bool = False) -> str:
    stream = io.StringIO()
    track_table.show(document, Console(file=stream, width=width, color_system=None), verbose=verbose)
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_run_and_what_to_do_stand_under_the_table(wrecked: Track, width: int) -> None:
    text = shown(wrecked, width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert " RUN WRECKED the loss is 4," in words
    assert "what to do: stop, go back to run/checkpoint-40 (step 40) and restart with a learning rate of at most" in words
    assert text.index("RUN WRECKED") > text.index("verdict")
    assert "run-wrecked" not in text  # it has been said


def test_page_markdown_and_picture_say_it_too(wrecked: Track) -> None:
    page = track_page(wrecked)
    assert "<title>run wrecked, " in page
    assert "<strong>run wrecked</strong>" in page
    assert "go back to run/checkpoint-40" in page
    assert all(note.code in page for note in NOTES)
    text = markdown(wrecked)
    assert text.startswith("## curv: run wrecked\n")
    assert "**what to do**: stop, go back to run/checkpoint-40" in text
    assert "| 100 | stable |" in text
    assert _heading(wrecked).startswith("run wrecked since step 61; newest stable, rho ")


def test_a_track_of_an_older_version_is_judged_by_todays_rules(wrecked: Track) -> None:
    assert "RUN WRECKED" in shown(wrecked.model_copy(update={"verdict": None}))


def test_five_findings_unless_all_are_asked_for(wrecked: Track) -> None:
    few, many = shown(wrecked), shown(wrecked, verbose=True)
    assert [note.code in few for note in NOTES] == [True] * 5 + [False] * 2
    assert "2 more with --verbose" in few
    assert all(note.code in many for note in NOTES)
    assert "more with" not in many
    late = [*NOTES, Finding(code="grave", severity="error", message="said")]
    assert "grave: said" in shown(wrecked.model_copy(update={"findings": late}))


def test_of_a_report_and_of_a_gate() -> None:
    report = asset("hot").model_copy(update={"findings": NOTES})
    for verbose in (False, True):
        stream = io.StringIO()
        table.show(report, Console(file=stream, width=80, color_system=None), verbose=verbose)
        assert ("note-5" in stream.getvalue(), "2 more with --verbose" in stream.getvalue()) == (verbose, not verbose)
    warned = [note.model_copy(update={"severity": "warning"}) for note in NOTES]
    report = asset("calm").model_copy(update={"findings": warned})
    rule = Rule(name="max-rho", limit=9.0, source="x")
    gate = decide([rule], ReportReadings(report), report, path="x", kind="report")
    stream = io.StringIO()
    gate_text.show(gate, Console(file=stream, width=80, color_system=None), verbose=False)
    assert "2 more with --verbose" in stream.getvalue()
    assert "note-6" in gate_text.text(gate)  # a file has room for all


def test_a_status_in_place_of_rho_folds_no_name() -> None:
    """At 80 columns `unconverged` took the room of "without rare rows", which went on in a line of its own."""
    report = asset("hot")
    weak = {"status": "unconverged"}
    body = BodyEstimate(**{**report.full.model_dump(), **weak}, rows=3)
    layers = [layer.model_copy(update=weak) for layer in report.layers]
    stream = io.StringIO()
    given = report.model_copy(update={"body": body, "layers": layers})
    table.show(given, Console(file=stream, width=80, color_system=None))
    assert "\nwithout rare rows " in stream.getvalue()
