"""Tables of a page as CSV: the numbers at full precision, doubt and bounds kept, and a button that copies them."""

from __future__ import annotations

import csv
import io
import re
from html import unescape
from pathlib import Path

import pytest
from browser import Browser, troubles
from markupsafe import Markup
from tracks import asset, at, course, failed, track

from curvcli.documents import Report
from curvcli.render import html
from curvcli.render.table_csv import of_table


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_charts", lambda *given: Markup(""))


def tables(page: str) -> list[list[dict[str, str]]]:
    """The CSV of each table of a page, read as a spreadsheet does."""
    texts = re.findall(r'<details class="csv"[^>]*>.*?<pre[^>]*>(.*?)</pre>', page, re.DOTALL)
    return [list(csv.DictReader(io.StringIO(unescape(text)))) for text in texts]


@pytest.mark.usefixtures("undrawn")
def test_every_table_has_its_csv_at_full_precision() -> None:
    report = asset("hot")
    page = html.report_page(report)
    found = tables(page)
    assert len(found) == page.count("<table") == page.count('class="csv"')
    assert float(found[0][0]["lambda"]) == report.full.eigenvalue
    assert found[0][0]["name"] == "full model"
    weights = [row for rows in found for row in rows if row.get("tensor")]
    assert {float(row["share"]) for row in weights} == {mass.mass for mass in report.attribution}


@pytest.mark.usefixtures("undrawn")
def test_doubt_and_bounds_are_no_plain_numbers() -> None:
    calm: Report = asset("calm")
    weak = at(calm, 20, status="unconverged")
    document = track([at(calm, 10), weak, failed(30)])
    points = tables(html.track_page(document))[0]
    assert [row["rho"] for row in points] == [str(calm.full.rho), f"{weak.full.rho} ?", ""]
    assert [row["verdict"] for row in points] == ["stable", "unresolved", "failed"]
    sources = tables(html.track_page(document))[-1]
    assert [row["format"] for row in sources] == ["trainer", "trainer", "could not be measured"]
    estimates = tables(html.report_page(calm))[0]
    statuses = [e.most_negative_status for e in (calm.full, *calm.parts)]
    bounded = [row["most negative"].startswith("≤ ") for row in estimates[: len(statuses)]]
    assert bounded == [status == "unconverged" for status in statuses]
    assert any(bounded)


@pytest.mark.parametrize(
    ("cells", "line"),
    [
        ('<td class="n" data-value="-0.125">-0.125</td>', "-0.125"),
        ('<td class="n" data-value="">-</td>', '""'),
        ('<td>a</td><td class="bar"><svg></svg></td><td>b</td>', "a,b"),
        ("<td>=1+1</td>", "'=1+1"),
        ("<td>-x, &quot;y&quot;</td>", '"\'-x, ""y"""'),
        ("<td>a &lt;b&gt;</td><td colspan='2'>c</td>", "a <b>,c,"),
        ('<td data-value="0.5">≤ 0.500 ?</td>', "≤ 0.5 ?"),
    ],
)
def test_a_cell(cells: str, line: str) -> None:
    assert of_table(f"<table><tbody><tr>{cells}</tr></tbody></table>") == f"{line}\n"


def test_a_page_in_somebody_elses_has_none() -> None:
    assert "csv" not in html.top(asset("hot"))


@pytest.mark.slow
def test_the_button_copies_the_table(browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text(html.track_page(course()))
    browser.open(out)
    assert troubles(browser) == []
    assert browser.run("[...document.querySelectorAll('details.csv')].every((fold) => fold.hidden)")
    browser.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.run("document.querySelector('p.copy button').focus()")
    browser.press("Enter", 13, "\r")
    copied = browser.run("navigator.clipboard.readText()", wait=True)
    rows = list(csv.DictReader(io.StringIO(copied)))
    assert [row["step"] for row in rows] == [str(step) for step in range(10, 100, 10)]
    assert browser.run("document.querySelector('p.copy [role=status]').textContent") == "copied"
    assert troubles(browser) == []
    names = browser.run("[...document.querySelectorAll('p.copy button')].map((b) => b.getAttribute('aria-label'))")
    assert len(names) == len(set(names)) > 3


@pytest.mark.slow
def test_where_nothing_may_be_copied_the_text_is_selected(browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text(html.report_page(asset("hot")))
    for refusal in ("() => Promise.reject(new Error('no'))", "undefined"):
        browser.open(out)
        whole = f"{{ writeText: {refusal} }}" if refusal != "undefined" else refusal
        browser.run(f"Object.defineProperty(navigator, 'clipboard', {{ value: {whole} }})")
        browser.run("document.querySelector('p.copy button').click()")
        browser.run("Promise.resolve()", wait=True)
        fold = "document.querySelector('details.csv')"
        assert browser.run(f"!{fold}.hidden && {fold}.open")
        assert browser.run(f"getSelection().toString().trim() === {fold}.querySelector('pre').textContent.trim()")


@pytest.mark.slow
def test_without_script_and_in_print(browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text(html.report_page(asset("hot")))
    shown = "document.querySelector('details.csv').checkVisibility()"
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(out)
        assert browser.run(shown)
        assert browser.run("document.querySelectorAll('p.copy').length") == 0
        browser.run("document.querySelector('details.csv summary').focus()")
        browser.press("Enter", 13, "\r")
        assert browser.run("document.querySelector('details.csv pre').checkVisibility({contentVisibilityAuto: true})")
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
    browser.open(out, width=700, media="print")
    assert not browser.run(shown)
    assert not browser.run("document.querySelector('p.copy').checkVisibility()")
