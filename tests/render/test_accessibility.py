"""Pages by the rules of axe-core, in a real browser: none is broken, in the light and in the dark, folded or not."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from browser import CONTRAST, Browser
from logs import job
from pages import SCHEDULE, decided
from places import ASSETS
from tracks import asset, course

from curvcli.documents import Schedule
from curvcli.judge.compare import compare
from curvcli.judge.compare_tracks import compare_tracks
from curvcli.render import html

PAGES: dict[str, Callable[[], str]] = {
    "report": lambda: html.report_page(asset("hot")),
    "track": lambda: html.track_page(course()),
    "schedule": lambda: html.schedule_page(Schedule.model_validate(SCHEDULE)),
    "gate": lambda: html.gate_page(decided()),
    "compare": lambda: html.comparison_page(compare(asset("calm"), asset("hot"), names=("a", "b"))),
    "runs": lambda: html.track_comparison_page(compare_tracks(course(), course(), names=("a", "b"))),
    "log": lambda: html.log_page(job()),
    "explain": lambda: html.page(ASSETS / "explain-60.json"),
}
UNFOLD = "document.querySelectorAll('details').forEach((fold) => { fold.hidden = false; fold.open = true; })"
RUN = """axe.run(document, {resultTypes: ['violations']}).then((found) => found.violations.map(
  (rule) => [rule.impact, rule.id, rule.nodes.map((node) => node.html.slice(0, 120)).slice(0, 3)]))"""


def broken(browser: Browser, page: Path, scheme: str, width: int = 1280) -> list[Any]:
    """What axe-core finds: the weight of the rule, the rule, and elements that break it."""
    browser.open(page, scheme=scheme, width=width)
    browser.run(UNFOLD)
    browser.run((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
    found = browser.run(RUN, wait=True)
    assert browser.run("axe.version").startswith("4.")
    return list(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_no_rule_is_broken(browser: Browser, tmp_path: Path, name: str) -> None:
    out = tmp_path / "page.html"
    out.write_text(PAGES[name]())
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 480)):
        assert broken(browser, out, scheme, width) == []
        # axe leaves the text of pictures open, which lies on what it cannot see through.
        assert browser.run(CONTRAST) >= 4.5


@pytest.mark.slow
def test_what_is_broken_is_found(browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    page = html.gate_page(decided())
    out.write_text(page.replace(' lang="en"', "").replace("<h2>Prov", "<button></button><h2>Prov"))
    rules = {rule: impact for impact, rule, _ in broken(browser, out, "light")}
    assert rules["html-has-lang"] in ("serious", "critical")
    assert rules["button-name"] in ("serious", "critical")
