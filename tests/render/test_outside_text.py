"""Names, paths and messages of files, in every output: nothing that a terminal, a forge, a page or a spreadsheet obeys."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ASSETS
from typer.testing import CliRunner

from curvcli.cli import app
from curvcli.cli.progress import reporting
from curvcli.documents import Finding, Report, dumps, load_report
from curvcli.documents.base import visible_json
from curvcli.errors import InputError, plain
from curvcli.judge.compare import compare
from curvcli.render import TEXT
from curvcli.render.compare import to_csv as comparison_csv
from curvcli.render.compare import to_markdown as comparison_markdown
from curvcli.render.csv import cell
from curvcli.render.facts import show_facts
from curvcli.render.html import page
from curvcli.render.markdown import escape

HOT = load_report(ASSETS / "hot-60.gate.report.json")
ESCAPE = "\x1b]0;title\x07\x1b[31m"
BIDI = "\u202eevil\u2066\u200f"
C1 = "\x9b31m\x85"
EVIL = f"{ESCAPE}{BIDI}{C1}\nsecond\r\u2028line\x00\U000e0041"
FORBIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]")


def hostile(text: str) -> Report:
    layers = [layer.model_copy(update={"name": text}) for layer in HOT.layers]
    found = [Finding(code="a", severity="warning", message=text)]
    parts = {
        "checkpoint": HOT.checkpoint.model_copy(update={"path": text}),
        "optimizer": HOT.optimizer.model_copy(update={"name": text}),
        "data": HOT.data.model_copy(update={"path": text}),
        "cost": HOT.cost.model_copy(update={"device": text}),
    }
    return HOT.model_copy(update={**parts, "layers": layers, "findings": found})


@given(st.text(max_size=60) | st.just(EVIL))
@settings(max_examples=80, deadline=None)
def test_plain_is_one_line_that_can_be_printed(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable()
    assert len(shown) == len(text)
    assert plain(shown) == shown
    if text.isprintable():
        assert shown == text


@given(st.dictionaries(st.text(max_size=9), st.text(max_size=30) | st.just(EVIL) | st.just("\ud800"), max_size=4))
@settings(max_examples=80, deadline=None)
def test_json_says_the_same_and_shows_nothing(document: dict[str, str]) -> None:
    text = visible_json(json.dumps(document, ensure_ascii=False))
    assert json.loads(text) == document
    assert not FORBIDDEN.search(text)


def _verbs(folder: Path) -> dict[str, list[str]]:
    """Every verb and format that shows a document's text."""
    report = folder / f"{ESCAPE}{BIDI} report.json"
    report.write_text(hostile(EVIL).to_json())
    gate = ["gate", str(report), "--max-rho", "0.01", "--max-layer-rho", "0.01"]
    found = {f"gate {kind}": [*gate, "--format", kind] for kind in ("text", "json", "github", "junit", "markdown")}
    found |= {
        f"compare {kind}": ["compare", str(report), str(report), "--format", kind]
        for kind in ("table", "json", "csv", "markdown")
    }
    found["report"] = ["report", str(report)]
    return found


@pytest.mark.parametrize("verb", [
    *(f"gate {kind}" for kind in ("text", "json", "github", "junit", "markdown")),
    *(f"compare {kind}" for kind in ("table", "json", "csv", "markdown")), "report",
])  # fmt: skip
def test_nothing_from_a_document_is_obeyed(verb: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, _verbs(tmp_path)[verb], env={"COLUMNS": "10000"})
    assert done.exit_code in (0, 1), done.stderr
    assert "line" in done.stdout
    for stream in (done.stdout, done.stderr):
        assert not FORBIDDEN.search(stream.replace("\r\n", "\n"))
    assert not re.search(r"^second", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("kind", sorted(TEXT))
def test_nor_from_a_checkpoint(kind: str) -> None:
    text = TEXT[kind](hostile(EVIL))
    assert not FORBIDDEN.search(text)
    assert not re.search(r"^second", text, re.MULTILINE)


def test_nor_in_a_page(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(hostile(f"{EVIL}<script>alert(1)</script>").to_json())
    text = page(tmp_path / "r.json")
    assert "<script>alert" not in text
    assert not FORBIDDEN.search(text)


def test_nor_in_an_error(tmp_path: Path) -> None:
    error = InputError(f"no {EVIL}", hint=EVIL)
    assert str(error).isprintable()
    assert len(str(InputError("x" * 10**6, hint="short it"))) < 1000
    assert str(InputError("x" * 10**6, hint="short it")).endswith("short it")
    for words in (["inspect"], ["report"], ["gate", "--max-rho", "1"], ["schedule", "--depth", "2", "-o"], ["track"]):
        done = CliRunner().invoke(app, [*words, str(tmp_path / f"no{ESCAPE}" / f"a{BIDI}b\nc")])
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr[:-1].isprintable()


def test_nor_in_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(False, verbose=True) as tell:
        tell(f"reading {EVIL}", 0.1)
    err = capsys.readouterr().err
    assert "reading" in err
    assert err.removesuffix("\n").isprintable()


def test_nor_in_what_inspect_shows(capsys: pytest.CaptureFixture[str]) -> None:
    show_facts({"path": EVIL, "notes": {EVIL: EVIL}, "dtypes": [EVIL]})
    out = capsys.readouterr().out
    assert not FORBIDDEN.search(out)
    assert not FORBIDDEN.search(dumps({"path": EVIL}))


FORMULAS = ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1", "\n@x"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_cell_runs_nothing(text: str) -> None:
    first, second = hostile(text), hostile(text)
    for document in (TEXT["csv"](first), comparison_csv(compare(first, second, names=(text, text)))):
        cells = [value for row in csv.reader(io.StringIO(document)) for value in row]
        assert any(text.strip()[1:] in value for value in cells)
        for value in cells:
            if value.lstrip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20"):
                float(value)  # a number stays one


def test_negative_numbers_stay_numbers() -> None:
    assert (cell(-1.5), cell(-3), cell(None), cell("-"), cell("layer")) == (-1.5, -3, None, "'-", "layer")
    text = TEXT["csv"](HOT.model_copy(update={"full": HOT.full.model_copy(update={"most_negative": -2.5})}))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert float(rows[0]["most_negative"]) == -2.5


@given(st.text(max_size=40) | st.sampled_from(["| a |", "`x`", "<b>", "[l](u)", "\\", "@all", "#1", "~~s~~", "$x$"]))
@settings(max_examples=80, deadline=None)
def test_markdown_is_words(text: str) -> None:
    from markdown_it import MarkdownIt

    row = f"| a | b |\n|---|---|\n| x {escape(text)} | y |"
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(row)
    assert [token.type for token in tokens].count("td_open") == 2
    assert {child.type for token in tokens for child in token.children or ()} <= {"text", "text_special"}


def test_a_comparison_of_hostile_names_is_a_table() -> None:
    first = hostile("| x |\n# title <img src=x> [l](u)")
    text = comparison_markdown(compare(first, first, names=("`a`|", "b")))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 1 + len(first.parts)
    assert not re.search(r"(?<!\\)<img", text)


def test_a_directory_is_told_what_a_page_is_made_of(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert "is a directory, and a page is made of a document; measure it first: curv analyze" in done.stderr


def test_a_track_and_a_report_are_told_what_is_compared(tmp_path: Path) -> None:
    from tracks import course_of

    track, report = tmp_path / "track.json", tmp_path / "report.json"
    track.write_text(course_of([1.0, 1.1, 1.2]).to_json())
    report.write_text(HOT.to_json())
    for words in ([str(track), str(report)], [str(report), str(track)]):
        done = CliRunner().invoke(app, ["compare", *words])
        assert done.exit_code == 2
        assert "is a track of many checkpoints, and " in done.stderr
        assert "is none; name two tracks" in done.stderr
    remedy = ["gate", str(report), "--baseline", str(track), "--max-regression", "10"]
    done = CliRunner().invoke(app, remedy)
    assert done.exit_code in (0, 1, 3), done.stderr
