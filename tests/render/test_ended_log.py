"""A log whose learning rate has decayed to 0, as that of every default run of the Trainer, stands where it was before."""

from __future__ import annotations

from pathlib import Path

import pytest
from logs import record
from pages import Text
from rich.console import Console

from curvcli.documents import Log, Record
from curvcli.judge.level import alert_of
from curvcli.judge.verdict import standing
from curvcli.render.cells import record_cells, record_columns
from curvcli.render.html import TOP, log_page
from curvcli.render.notebook import line
from curvcli.render.plot_log import _heading
from curvcli.render.watch import header, table

NOTHING = "the learning rate is 0: no step is taken, and there is no edge"
SAYS = "the learning rate is 0 at step 300, as at a schedule's end: this is of step 280, at 0.000200"


def ended(step: int = 300) -> Record:
    """As the tracker writes one at a learning rate of 0."""
    return record(step, None, lr=0.0, message=NOTHING)


def log(*records: Record, age: float = 1.0, gap: float | None = None) -> Log:
    return Log(Path("run/curvature.jsonl"), exists=True, records=records, age=age, gap=gap)


FINISHED = (record(260, 0.9), record(280, 0.3, lr=2e-4), ended(290), ended(300))


def test_where_a_finished_job_stands() -> None:
    assert standing(FINISHED).step == 280
    assert standing(FINISHED[:2]).step == 280
    # Nothing else is passed over: what failed at a learning rate above 0, a weight that is no number, warm-up from 0.
    assert standing((record(10, 0.5), record(20, None))).step == 20
    assert standing((record(10, 0.5), record(20, None, lr=0.0, status="non-finite"))).step == 20
    assert standing((ended(0), ended(10))).step == 10


def test_every_view_stands_there_and_says_so() -> None:
    frame = header(log(*FINISHED)).plain
    assert " STABLE   rho 0.300" in frame
    assert SAYS in frame
    page = " ".join(Text(log_page(log(*FINISHED), layout=TOP)).text.split())
    assert "stable rho 0.300" in page
    assert "At step 280, of the batch that the tracker measured" in page
    assert SAYS[1:] in page
    assert line(log(*FINISHED)) == "<Log run/curvature.jsonl, 4 records: step 280, stable, rho 0.300>"
    assert _heading(log(*FINISHED)) == "step 280, rho 0.300"
    for view in (frame, page):
        assert "unresolved" not in view.lower()
        assert "failed" not in view


def test_its_rows_have_no_verdict_and_did_not_fail(capsys: pytest.CaptureFixture[str]) -> None:
    columns = record_columns(FINISHED)
    cells = dict(zip([c.key for c in columns], record_cells(FINISHED[-1], columns), strict=True))
    assert (cells["verdict"].text, cells["level"].text, cells["status"].text) == ("", "INFO", "lr is 0")
    Console(width=80).print(table(FINISHED, 80))
    assert capsys.readouterr().out.count("lr is 0") == 2
    assert alert_of(FINISHED[-1]).level == "INFO"


def test_a_job_that_has_ended_has_not_stalled() -> None:
    assert "looks stalled" in header(log(*FINISHED[:2], age=900.0, gap=2.0)).plain
    assert "looks stalled" not in header(log(*FINISHED, age=900.0, gap=2.0)).plain


def test_a_job_that_never_took_a_step_is_not_resolved() -> None:
    frame = header(log(ended(0), ended(10))).plain
    assert " UNRESOLVED " in frame
    assert f"no rho, lr is 0: {NOTHING}" in frame
