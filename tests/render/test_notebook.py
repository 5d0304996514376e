"""Documents in Python and notebooks: a short line, the page's top, a picture, a data frame, and any of them read back."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from logs import record, write
from places import ASSETS
from schedules import schedule
from tracks import course_of

import curvcli
from curvcli.documents import Gate, Log, Report, Schedule, Track, load_report
from curvcli.errors import InputError, UnsupportedError, UsageError
from curvcli.render.gate_plot import ratios
from curvcli.render.picture import Picture

EVIL = "<script>alert(1)</script>\"'\x1b[2J\u202e"


def report() -> Report:
    return load_report(ASSETS / "hot-60.json")


def gate() -> Gate:
    return curvcli.gate(ASSETS / "hot-60.json", max_rho=1.0, max_layer_rho=0.5, min_tokens=10)


DOCUMENTS: dict[str, Any] = {
    "Report": report,
    "Track": lambda: course_of([1.0, 1.1, 1.0]),
    "Gate": gate,
    "Schedule": lambda: schedule(4, (0, [0, 1]), (5, range(4))),
    "Comparison": lambda: curvcli.compare(report(), load_report(ASSETS / "calm-60.gate.report.json")),
    "Log": lambda: Log(Path("curvature.jsonl"), records=tuple(record(n, early=n < 3) for n in range(5))),
    "TrackComparison": lambda: curvcli.compare(course_of([1.0, 1.1]), course_of([1.0, 0.9])),
}  # fmt: skip


SOON = ("Report", "Track", "Gate", "Schedule")  # the rest are drawn by slow tests


@pytest.fixture(params=DOCUMENTS)
def document(request: pytest.FixtureRequest) -> Report | Track | Gate | Schedule:
    return DOCUMENTS[request.param]()


class Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_line(document: Report) -> None:
    text = repr(document)
    assert str(document) == text
    assert re.fullmatch(rf"<{type(document).__name__}\b.{{10,240}}>", text)
    assert "\n" not in text


def test_lines_say_what_matters() -> None:
    assert re.search(r"step 60: verdict \S+.*, rho 1\.51", repr(report()))
    assert "3 checkpoints: run " in repr(DOCUMENTS["Track"]())
    assert "broken, 3 rules" in repr(gate())
    assert "4 blocks, 1 unlock>" in repr(DOCUMENTS["Schedule"]())


def test_the_top_of_the_page(document: Report) -> None:
    text = document._repr_html_()
    outline = Outline()
    outline.feed(text)
    assert not outline.open
    assert not {"script", "html", "body", "link", "iframe", "img"} & set(outline.tags)
    assert text.startswith('<div class="curv">')
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    for line in re.findall(r"([^{}]+)\{", re.sub(r"@media[^{]*\{", "", style)):
        assert line.strip().startswith(".curv"), f"{line!r} reaches out of the fragment"
    assert len(text) < 20_000


def test_nothing_of_a_document_is_markup() -> None:
    found = report()
    evil = found.model_copy(update={"checkpoint": found.checkpoint.model_copy(update={"path": EVIL})})
    assert "<script" not in evil._repr_html_()
    assert not {"\x1b", "\u202e"} & set(evil._repr_html_() + repr(evil))
    judged = gate()
    subject = judged.subject.model_copy(update={"path": EVIL})
    assert "<script" not in judged.model_copy(update={"subject": subject})._repr_html_()


@pytest.mark.parametrize(
    "document", [n if n in SOON else pytest.param(n, marks=pytest.mark.slow) for n in DOCUMENTS], indirect=True
)
def test_a_picture_is_shown_and_written(document: Report, tmp_path: Path) -> None:
    drawn = document.plot(tmp_path / "p.svg")
    assert isinstance(drawn, Picture)
    assert drawn._repr_png_().startswith(b"\x89PNG")
    assert (tmp_path / "p.svg").read_bytes().startswith(b"<?xml")
    with pytest.raises(UsageError, match="cannot draw"):
        document.plot(tmp_path / "p.gif")


def test_frames() -> None:
    found = report()
    frame = found.to_frame()
    assert frame.loc[frame.part == "full", "eigenvalue"].item() == found.full.eigenvalue
    assert len(frame[frame.part == "layer"]) == len(found.layers)
    track = DOCUMENTS["Track"]()
    assert list(track.to_frame().rho) == [p.report.judged.rho for p in track.points]
    assert list(gate().to_frame().outcome) == [o.outcome for o in gate().outcomes]
    assert list(DOCUMENTS["Schedule"]().to_frame().step) == [0, 5]
    log = DOCUMENTS["Log"]()
    assert list(log.to_frame().rho) == [r.rho for r in log.records]
    assert list(log.to_frame().verdict) == ["early"] * 3 + ["stable"] * 2
    assert {"level", "stable_lr_low", "gradient_norm"} <= set(log.to_frame().columns)
    assert list(DOCUMENTS["Comparison"]().to_frame().part)[:2] == ["full", "ends"]
    assert list(DOCUMENTS["TrackComparison"]().to_frame().rho_b) == [1.0, 0.9]


def test_without_pandas_there_is_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnsupportedError, match="pip install 'curvcli"):
        report().to_frame()


def test_any_document_is_read(document: Report, tmp_path: Path) -> None:
    if isinstance(document, Log):
        return  # which is lines of records: see below
    (tmp_path / "d.json").write_text(document.to_json())
    assert curvcli.load(tmp_path / "d.json") == document
    assert curvcli.load(str(tmp_path / "d.json")) == document


def test_a_log_is_read(tmp_path: Path) -> None:
    write(tmp_path / "curvature.jsonl", *map(record, range(3)))
    for place in (tmp_path, tmp_path / "curvature.jsonl"):
        found = curvcli.load(place)
        assert isinstance(found, Log)
        assert len(found.records) == 3


@pytest.mark.parametrize("text", ['{"schema": "curv.report/2"}', "[]", "{", '{"schema": "curv.report/1"}'])
def test_what_is_no_document_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(InputError, match=";"):
        curvcli.load(tmp_path / "d.json")
    with pytest.raises(InputError, match=";"):
        curvcli.load(tmp_path)


def test_gate_picture_is_over_the_limits() -> None:
    for outcome in gate().outcomes:
        value, low, high = ratios(outcome)
        assert value == pytest.approx(outcome.value / outcome.limit)
        if outcome.low is not None:
            assert low <= value * 1.000001 <= high * 1.000002
    assert ratios(gate().outcomes[0].model_copy(update={"limit": None})) == (None, None, None)


def test_importing_the_package_draws_nothing() -> None:
    script = "import curvcli, sys; print({'pydantic', 'matplotlib', 'torch', 'curvcli.render'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
