"""`curv report`: what the page says, that nothing in it runs or loads, and how it behaves in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from browser import CONTRAST, Browser, troubles
from pages import HOSTILE, SCHEDULE, Text
from places import ASSETS
from real import curv

from curvcli.documents import VerdictName, load_report
from curvcli.render.advice import advice
from curvcli.render.html import page, report_page

ASSET = ASSETS / "hot-60.report.json"


def document(tmp_path: Path, **changes: object) -> Path:
    """The asset with values at dotted paths replaced, as a file."""
    found = json.loads(ASSET.read_text())
    for place, value in changes.items():
        *parents, last = place.split("__")
        at = found
        for parent in parents:
            at = at[int(parent) if parent.isdigit() else parent]
        at[int(last) if last.isdigit() else last] = value
    path = tmp_path / "report.json"
    path.write_text(json.dumps(found))
    return path


def hostile(tmp_path: Path) -> Path:
    one = HOSTILE[0]
    return document(
        tmp_path, checkpoint__path="".join(HOSTILE), checkpoint__format=HOSTILE[1], data__path=HOSTILE[2],
        data__sha256=HOSTILE[3], optimizer__name=one, layers__0__name="".join(HOSTILE), findings__0__code=HOSTILE[2],
        findings__0__message="".join(HOSTILE), findings__1__code="unresolved-tokens", attribution__0__tensor=HOSTILE[3],
        cost__device=HOSTILE[1], cost__mode=one, versions__torch=HOSTILE[1], versions__python=HOSTILE[4],
    )  # fmt: skip


def test_says_what_the_report_says() -> None:
    text = " ".join(Text(page(ASSET)).text.split())
    report = load_report(ASSET)
    for wanted in (
        "sample_checkpoints/hot/checkpoint-60", "unstable rho 1.51", "threshold 1,265", "between 1.44 and 1.51",
        "What to do next", "a learning rate of about 0.016", report.data.sha256, "907 entries", "2.13.0",
        "137 Hessian-vector products", "curv.report/1", *(finding.message for finding in report.findings),
        *(mass.tensor for mass in report.attribution),
    ):  # fmt: skip
        assert wanted in text, wanted
    assert page(ASSET) == page(ASSET)


def test_the_learning_rate_in_the_advice_is_right() -> None:
    """By the threshold of docs/explanation/method.md, not by the proportion that the advice is made with."""
    report = load_report(ASSET)
    found = re.search(r"about ([\d.]+)\.", advice(report)[0].text)
    assert found
    beta, decay = report.optimizer.betas[0], report.optimizer.weight_decay  # type: ignore[index]
    threshold = (2 / float(found[1]) - decay) * (1 + beta) / (1 - beta)
    assert report.full.eigenvalue / threshold == pytest.approx(0.8, rel=0.02)  # type: ignore[operator]


@pytest.mark.parametrize("verdict", get_args(VerdictName))
def test_every_verdict_has_its_page(tmp_path: Path, verdict: str) -> None:
    html = page(document(tmp_path, verdict=verdict, findings__0__code="unresolved-tokens"))
    assert f'class="verdict {verdict}"' in html
    assert "--tokens 32768" in html


def test_missing_values_are_no_numbers(tmp_path: Path) -> None:
    nothing = {"eigenvalue": None, "rho": None, "residual": None, "most_negative": None, "most_negative_residual": None,
               "most_negative_status": None, "hvps": 3, "status": "non-finite"}  # fmt: skip
    path = document(
        tmp_path, full=nothing, verdict="unresolved", layers=[], cumulative={"restricted": [], "truncated": []},
        optimizer__lr=None, optimizer__threshold=None, tokens=[], attribution=[], participation=None, checkpoint__step=None,
        generalisation={"held_out": None, "rho_low": None, "rho_high": None}, optimizer__betas=None, findings=[],
    )  # fmt: skip
    text = Text(page(path)).text
    assert "No estimate: non-finite." in text
    assert "None" not in text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert "Curvature over depth" not in text


def test_one_missing_value_among_numbers(tmp_path: Path) -> None:
    gone = dict.fromkeys(
        ("eigenvalue", "rho", "residual", "most_negative", "most_negative_residual", "most_negative_status")
    )
    layer = {**json.loads(ASSET.read_text())["layers"][3], **gone, "status": "non-finite"}
    html = page(document(tmp_path, layers__3=layer))
    row = next(line for line in html.splitlines() if "model.layers.3<" in line and "<tr>" in line)
    assert row.count('data-value="">-</td>') == 4  # of a document without ceilings, whose page has no column of them
    assert '<td class="weak">non-finite</td>' in row
    assert not re.search(r"\bnan\b|<NA>|&lt;NA", html)


def test_a_bound_is_shown_as_one(tmp_path: Path) -> None:
    layer = {**json.loads(ASSET.read_text())["layers"][3], "most_negative": -7.5, "most_negative_residual": 0.5}
    for status, shown in (("unconverged", ">≤ -7.50<"), ("converged", ">-7.50<")):
        html = page(document(tmp_path, layers__3={**layer, "most_negative_status": status}))
        assert shown in next(line for line in html.splitlines() if "model.layers.3<" in line and "<tr>" in line)


def test_nothing_is_loaded_and_nothing_hostile_is_markup(tmp_path: Path) -> None:
    html = page(hostile(tmp_path))
    parsed = Text(html)
    assert parsed.tags.count("script") == 1
    assert "img" not in parsed.tags
    names = {name for _, name, _ in parsed.attributes}
    assert not {name for name in names if name.startswith("on")} | ({"src", "href", "style", "action"} & names)
    assert "".join(HOSTILE) in parsed.text
    assert "jajajajaja" not in html
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", html)


def test_a_schedule_has_a_page_too(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(SCHEDULE))
    text = " ".join(Text(page(path)).text.split())
    for wanted in (
        "Schedule: grow, 4 blocks, the last ones locked at first",
        "late (warning): one < two",
        "2-3",
        "peak 0.001000",
        "curv.schedule/1",
    ):
        assert wanted in text, wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "x.json does not exist; write one with"),
        ("{", "no JSON document"),
        ("[" * 200_000, "no JSON document"),
        ("[]", "has no page"),
        ('{"schema": "curv.curvature/1"}', "has no page"),
        ('{"schema": ["a"]}', "has no page"),
        ('{"schema": "curv.report/1"}', "is not a curv.report/1 document"),
    ],
)
def test_what_has_no_page(tmp_path: Path, content: str | None, said: str) -> None:
    path, out = tmp_path / "x.json", tmp_path / "x.html"
    if content is not None:
        path.write_text(content)
    done = curv("report", path, "-o", out)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
    assert not out.exists()


@pytest.mark.slow
def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    out = tmp_path / "x.html"
    script = (
        f"import sys; sys.argv = ['curv', 'report', {str(ASSET)!r}, '-o', {str(out)!r}]\n"
        "from curvcli.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert out.read_text() == curv("report", ASSET).stdout


# --- in a real browser -----------------------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(report_page(load_report(ASSET)))
    return path


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1280, "light")])
def test_the_page_fits_and_adapts(browser: Browser, shown: Path, width: int, scheme: str) -> None:
    browser.open(shown, width=width, scheme=scheme)
    assert troubles(browser) == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 30)"}[scheme]
    line = browser.run(
        "getComputedStyle([...document.querySelectorAll('svg.depths use')]"
        ".find(e => e.textContent.startsWith('restricted'))).fill"
    )
    assert line == {"light": "rgb(31, 78, 156)", "dark": "rgb(134, 179, 255)"}[scheme]
    assert browser.run(CONTRAST) >= 4.5


def test_tables_sort_by_keyboard(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    column = "[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[{}].dataset.value)"
    heading = "document.querySelectorAll('table')[0].tHead.rows[0].cells[{}].getAttribute('aria-sort')"
    before = browser.run(column.format(3))
    for _ in range(40):
        browser.press("Tab", 9)
        if browser.run("document.activeElement.innerText") == "lambda":
            break
    assert browser.run("document.activeElement.tagName") == "BUTTON"
    browser.press("Enter", 13, "\r")
    values = [float(v) for v in browser.run(column.format(3))]
    assert values == sorted(float(v) for v in before) != [float(v) for v in before]
    assert browser.run(heading.format(3)) == "ascending"
    browser.press(" ", 32, " ")
    assert [float(v) for v in browser.run(column.format(3))] == values[::-1]
    assert browser.run(heading.format(3)) == "descending"
    # A missing count of parameters stays last both ways, and names sort by their numbers.
    for _ in range(2):
        browser.run("document.querySelector('table').tHead.rows[0].cells[2].firstElementChild.click()")
        assert browser.run(column.format(2))[-18:] == [""] * 18
    assert browser.run(heading.format(3)) is None
    assert browser.run("document.querySelectorAll('[aria-sort]').length") == 1
    assert troubles(browser) == []


def test_hostile_values_do_not_run(browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    html = page(hostile(tmp_path))
    owned = "document.documentElement.dataset.owned ?? null"
    out.write_text(html)
    browser.open(out)
    assert browser.run(owned) is None
    assert browser.run("document.title").endswith("".join(HOSTILE))
    assert troubles(browser) == []
    # The second wall: were the escaping to fail, the policy would still let none of it run.
    unescaped = html.replace("<main>", f"<main>{''.join(HOSTILE[:2])}")
    out.write_text(unescaped)
    browser.open(out)
    assert browser.run(owned) is None
    assert any("Content Security Policy" in trouble for trouble in troubles(browser))
    # And the sample is live: without either wall it runs.
    out.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", unescaped))
    browser.open(out)
    assert browser.run(owned) == "1"


def test_print_is_light_and_whole(browser: Browser, shown: Path) -> None:
    browser.open(shown, width=700, scheme="dark", media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("[...document.querySelectorAll('.scroll')].every(e => getComputedStyle(e).overflowX === 'visible')")
    assert browser.run("document.documentElement.scrollWidth") <= 700
