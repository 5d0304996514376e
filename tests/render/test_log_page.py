"""The page of a job's log: what it says of the last record, what it warns of, and what becomes of a log in trouble."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from logs import job, record, write
from markupsafe import Markup
from pages import HOSTILE, Text
from typer.testing import CliRunner

from curvcli.cli import app
from curvcli.documents import Log
from curvcli.errors import InputError
from curvcli.render import html
from curvcli.render.html import MOST_RAISED, MOST_RECORDS, TOP, log_page, page
from curvcli.render.plot_log import picture


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their charts, which take seconds to draw."""
    monkeypatch.setattr(html, "_charts", lambda *given: Markup(""))


def text(page: str) -> str:
    return " ".join(Text(page).text.split())


@pytest.mark.usefixtures("undrawn")
def test_says_what_the_log_says() -> None:
    said = text(log_page(job()))
    for wanted in (
        "60 records, steps 0 to 590, 2 records superseded after a resume", "stable rho 0.790",
        "At step 590, the last record", "Gradient 0.420 (+0.6 sd), update RMS 0.900, g'Hg/g'g 99.0, attention logit 11.6",
        "Measuring takes 4.8 % of the training's time, on 2 batches of the probe.",
        "step 400: ERROR: rho is 1.9: unstable; the gradient's norm is 7.1 standard deviations above the run's own; lower",
        "step 500: WARN: out of memory", "1 damaged line, the last: line 7: step: Field required", "curv.curvature/1",
        "too early", "unconverged", "0.500 ?",
    ):  # fmt: skip
        assert wanted in said, wanted
    assert not re.search(r"\bnan\b|\bNone\b", said)


@pytest.mark.slow
def test_the_picture_has_a_panel_for_each_number_that_there_is_and_for_levels() -> None:
    panels = [" ".join(axes.get_ylabel().split()) for axes in picture(job()).axes]
    assert panels == [
        "rho", "level", "lambda", "lr over critical lr", "learning rate", "training loss", "gradient norm", "g'Hg/g'g",
        "update RMS", "attention logit", "attention entropy", "spectral norm", "share of time, %",
    ]  # fmt: skip
    bare = picture(Log(Path("x"), records=(record(0), record(10))))
    assert [axes.get_ylabel() for axes in bare.axes] == ["rho", "lambda", "learning\nrate", "training\nloss"]
    muon = tuple(record(n, None, z=0.4, status="converged") for n in (0, 10))
    assert picture(Log(Path("x"), records=muon)).axes[0].get_ylabel() == "Z"


@pytest.mark.slow
def test_marks_of_levels_say_what_they_mean() -> None:
    shown = log_page(job())
    assert "<title>step 500: WARN: out of memory</title>" in shown
    assert len(re.findall(r"<title>step 400: ERROR: [^<]*</title>", shown)) == 2, "in the wide picture and in the narrow one"


def test_a_long_log_shows_its_newest_and_says_of_how_many() -> None:
    records = tuple(record(n, 2.0 if n % 40 == 0 else 0.5) for n in range(MOST_RECORDS + 60))
    said = text(log_page(Log(Path("x"), exists=True, records=records), layout=TOP))
    raised = sum(n % 40 == 0 for n in range(len(records)))
    assert f"{raised - MOST_RAISED} earlier records at WARN or ERROR." in said
    assert "step 520: ERROR" in said
    assert "step 120: ERROR" not in said


@pytest.mark.usefixtures("undrawn")
def test_the_newest_record_stands_first() -> None:
    body = log_page(job(records=12)).partition("<tbody>")[2]
    assert re.findall(r'<tr><td class="n" data-value="(\d+)">', body)[:2] == ["110", "100"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("place", ["curvature.jsonl", ".", ".."])
def test_the_command_takes_a_log_or_its_directory(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder / "curvature.jsonl", *(record(n) for n in range(3)))
    done = CliRunner().invoke(app, ["report", str(folder / place), "-o", str(tmp_path / "x.html")])
    assert done.exit_code == 0, done.stderr
    assert "3 records, steps 0 to 2" in text((tmp_path / "x.html").read_text())


@pytest.mark.usefixtures("undrawn")
def test_a_log_without_records_and_one_of_something_else_have_none(tmp_path: Path) -> None:
    path = tmp_path / "curvature.jsonl"
    path.write_text("")
    with pytest.raises(InputError, match="has no record yet; a page is made once"):
        page(path)
    assert "no record yet" in text(log_page(Log(path))), "in a notebook"
    path.write_text('{"schema": "curv.report/1"}\n')
    with pytest.raises(InputError, match=r"is no curv\.curvature/1 log"):
        page(path)
    with pytest.raises(InputError, match=r"none\.jsonl does not exist"):
        page(tmp_path / "none.jsonl")


@pytest.mark.slow
def test_nothing_of_a_log_is_markup() -> None:
    evil = "".join(HOSTILE)
    log = Log(Path(f"run/{HOSTILE[0]}"), records=(record(0), record(1, None, message=evil)), damaged=1, damage=evil)
    parsed = Text(log_page(log))
    assert parsed.tags.count("script") == 1
    assert "img" not in parsed.tags
    names = {name for _, name, _ in parsed.attributes}
    assert not {name for name in names if name.startswith("on")} | ({"src", "href", "style"} & names)
    assert HOSTILE[0] in parsed.text
