"""The page of a track: what it says, and how it behaves in a real browser."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from browser import CONTRAST, Browser, troubles
from pages import HOSTILE, Text
from real import curv
from tracks import asset, at, course, failed, long, track

from curvcli.documents import Track, load_track
from curvcli.render.advice import track_advice
from curvcli.render.html import page, track_page


def text(document: Track) -> str:
    return " ".join(Text(track_page(document)).text.split())


def test_says_what_the_track_says(tmp_path: Path) -> None:
    path = tmp_path / "track.json"
    path.write_text(course().to_json())
    assert load_track(path) == course()
    out = tmp_path / "track.html"
    done = curv("report", path, "-o", out)
    assert (done.returncode, done.stdout) == (0, "")
    said = " ".join(Text(out.read_text()).text.split())
    assert out.read_text() == page(path)
    for wanted in (
        "9 checkpoints, steps 10 to 90, 6 measured, 2 cached, 1 failed", "stable rho 0.594",
        "At step 90, the newest checkpoint:",
        "between 0.592 and 0.597. It is 0.90 times the median of the checkpoints before.",
        "surge (warning): rho at step 60 is 3.1 times", "Findings at step 90", "idle-entries",
        "curv compare run/checkpoint-40 run/checkpoint-60", "curv track run", "5.1 !", "0.989 ?",
        "step 50: optimizer.pt is truncated; copy it again", "34 more, each under 0.5 %, together 0.7 %",
        "curv.track/1",
        "719cd3565dd9aa8f2bac7e977c7d9af962249b",
        *(f"run/checkpoint-{step}" for step in range(10, 100, 10)), "torch 2.13.0",
    ):  # fmt: skip
        assert wanted in said, wanted


def test_the_newest_that_could_be_measured_is_said_to_be_that() -> None:
    said = text(track([at(asset("hot"), 60), failed(70)]))
    assert "unstable rho 1.51 At step 60, the newest checkpoint that could be measured: lambda" in said
    assert "1 of 2 checkpoints could not be measured" in said
    said = text(track([at(asset("hot"), 60, status="unconverged")]))
    assert "It is unconverged, and not to be relied on." in said


@pytest.mark.slow
def test_nothing_measured_is_no_number() -> None:
    said = text(track([failed(10), failed(None, "damaged")]))
    assert "nothing measured None of the checkpoints could be measured" in said
    assert "Over " not in said
    assert "rho of each layer" not in said
    no_lr = asset("hot")
    bare = {"eigenvalue": None, "rho": None, "residual": None, "status": "non-finite", "most_negative": None}
    gone = [layer.model_copy(update=bare) for layer in no_lr.layers]
    nothing = no_lr.model_copy(update={"full": no_lr.full.model_copy(update=bare), "layers": gone, "verdict": "unresolved"})
    for document in (track([failed(1)]), track([nothing]), track([nothing, at(no_lr, 70)])):
        said = text(document)
        assert not re.search(r"\b[nN]a[nN]\b|\bNone,|: None|rho -,", said)
    assert "No estimate: non-finite." in text(track([nothing]))


def test_advice_names_the_checkpoint_before_that_was_measured() -> None:
    steps = track_advice(track([at(asset("calm"), 10, 0.1), at(asset("calm"), 20, 0.1), failed(30), at(asset("hot"), 40)]))
    assert steps[0].command == "curv compare run/checkpoint-20 run/checkpoint-40"
    assert steps[1].command == "curv track run"
    assert "Lower the learning rate" in steps[2].text
    assert track_advice(track([failed(1)]))[0].command == "curv track run"


def hostile() -> Track:
    report = at(asset("hot"), 60)
    evil = "".join(HOSTILE)
    layers = [layer.model_copy(update={"name": f"{evil}{layer.index}"}) for layer in report.layers]
    data = report.data.model_copy(update={"path": evil, "sha256": HOSTILE[3]})
    bad = report.model_copy(update={"layers": layers, "data": data})
    first = track([at(asset("calm"), 10, 0.1)]).points[0]
    document = track([first, bad, failed(70, evil)], run=evil)
    changes = {"checkpoint": evil, "message": evil, "step": None, "surged": True, "surge": 3.0}
    points = [document.points[0], *(point.model_copy(update=changes) for point in document.points[1:])]
    return document.model_copy(update={"points": points})


def test_nothing_hostile_is_markup() -> None:
    html = track_page(hostile())
    parsed = Text(html)
    assert parsed.tags.count("script") == 1
    assert "img" not in parsed.tags
    names = {name for _, name, _ in parsed.attributes}
    assert not {name for name in names if name.startswith("on")} | ({"src", "href", "style", "action"} & names)
    assert "".join(HOSTILE) in parsed.text
    assert "jajajajaja" not in html
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", html)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "track.html"
    out.write_text(track_page(course()))
    return out


WEAK = "[...document.querySelectorAll('svg.heat use, svg.heat path')].find(e => e.textContent.endsWith(', unconverged'))"


@pytest.mark.parametrize(("width", "scheme"), [(380, "dark"), (1280, "light")])
def test_in_a_browser(browser: Browser, shown: Path, width: int, scheme: str) -> None:
    browser.open(shown, width=width, scheme=scheme)
    assert troubles(browser) == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(CONTRAST) >= 4.5
    assert browser.run("document.querySelectorAll('svg.heat title').length") == 80
    assert browser.run("document.querySelectorAll('svg.steps').length") == 1
    # The map's classes go one way in lightness, so that they can be told apart in grey, away from the page's own.
    shades = browser.run(
        "[...Array(7).keys()].map(n => getComputedStyle(document.documentElement).getPropertyValue('--rho' + n)"
        ".match(/[0-9a-f]{2}/g).map(c => parseInt(c, 16)).reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0))"
    )
    assert shades == sorted(shades, reverse=scheme == "light")
    assert min(abs(a - b) for a, b in pairwise(shades)) > 10
    # Not converged is hatched and no colour: the pattern is found, and what it draws shows.
    assert browser.run(f"getComputedStyle({WEAK}).fill").startswith('url("#heat-')
    assert browser.run("getComputedStyle(document.querySelector('svg.heat pattern path')).stroke") != "none"


@pytest.mark.slow
def test_a_long_run_of_a_deep_model_stays_usable(browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "long.html"
    out.write_text(track_page(long()))
    assert out.stat().st_size < 5e6
    browser.open(out)
    assert troubles(browser) == []
    assert browser.run("document.documentElement.scrollWidth") <= 1280
    assert browser.run("document.querySelectorAll('svg.heat title').length") == 200 * 98
    heading = "document.querySelector('table.sortable').tHead.rows[0].cells[2]"
    browser.run(f"{heading}.querySelector('button').click()")
    values = browser.run("[...document.querySelector('table.sortable').tBodies[0].rows].map(r => +r.cells[2].dataset.value)")
    assert len(values) == 200
    assert values == sorted(values)


def test_print_is_light_and_whole(browser: Browser, shown: Path) -> None:
    browser.open(shown, width=700, scheme="dark", media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.documentElement).getPropertyValue('--rho0')") == "#f6f0c8"
    assert browser.run("document.documentElement.scrollWidth") <= 700


def test_hostile_values_do_not_run(browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text(track_page(hostile()))
    browser.open(out)
    assert browser.run("document.documentElement.dataset.owned ?? null") is None
    assert troubles(browser) == []
    assert browser.run("document.documentElement.scrollWidth") <= 1280


def test_other_json_has_no_page(tmp_path: Path) -> None:
    path = tmp_path / "track.json"
    path.write_text(json.dumps({**json.loads(course().to_json()), "points": []}))
    done = curv("report", path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "is not a curv.track/1 document" in done.stderr
