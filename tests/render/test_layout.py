"""How pages are laid out: actions first, small shares folded, wide tables that say so, charts that a phone can show."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, troubles
from logs import job, record
from matplotlib.figure import Figure
from pages import HOSTILE, SCHEDULE, Text, decided
from places import ASSETS
from schedules import schedule
from tracks import asset, at, course, failed, long, track

from curvcli.documents import Comparison, Finding, Log, Report, Schedule, TrackComparison, TrackPoint, load_report
from curvcli.judge.compare import compare
from curvcli.judge.compare_tracks import compare_tracks
from curvcli.render.compare_plot import growth
from curvcli.render.compare_plot import picture as comparison_picture
from curvcli.render.compare_tracks_plot import picture as runs_picture
from curvcli.render.gate_plot import picture as gate_picture
from curvcli.render.html import (
    comparison_page,
    gate_page,
    log_page,
    page,
    report_page,
    schedule_page,
    top,
    track_comparison_page,
    track_page,
)
from curvcli.render.picture import NARROW, WIDE, Picture, foot, readable_log
from curvcli.render.plot import picture
from curvcli.render.plot_log import picture as log_picture
from curvcli.render.schedule_plot import picture as schedule_picture
from curvcli.render.series import heat, near_start, newest_columns, part_brackets
from curvcli.render.track_plot import MOST_NARROW, heat_map, steps

ASSET = ASSETS / "hot-60.report.json"


def report() -> Report:
    return load_report(ASSET)


def planned() -> Schedule:
    return Schedule.model_validate(SCHEDULE)


def compared() -> Comparison:
    return compare(asset("calm"), asset("hot"), names=("calm/60", "hot/60"))


def runs() -> TrackComparison:
    calm = asset("calm")
    other: list[Report | TrackPoint] = [failed(20), *(at(calm, step, 0.4 + step / 50) for step in (30, 40, 60, 80, 90))]
    return compare_tracks(course(), track(other, run="other"), names=("runs/hot/track.json", "runs/calm/track.json"))


def text(html: str) -> str:
    return " ".join(Text(html).text.split())


PAGES: dict[str, Callable[[], str]] = {
    "report": lambda: report_page(report()),
    "track": lambda: track_page(course()),
    "schedule": lambda: schedule_page(planned()),
    "gate": lambda: gate_page(decided()),
    "explain": lambda: page(ASSETS / "explain-60.json"),
    "compare": lambda: comparison_page(compared()),
    "runs": lambda: track_comparison_page(runs()),
    "log": lambda: log_page(job()),
}


FAST = ("report", "track", "schedule", "gate", "compare", "explain")  # of those, in a browser


@cache
def html_of(name: str) -> str:
    return PAGES[name]()


# --- what comes first, what is folded --------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_what_to_do_comes_before_findings(whole: bool) -> None:
    for html in (html_of("report"), html_of("track")) if whole else (top(report()), top(course())):
        titles = [title for title in re.findall(r"<h2>(.*?)</h2>", html) if title.startswith(("What", "Findings"))]
        assert titles[:2] == ["What to do next", "Findings"]
        assert titles.count("What to do next") == 1


def test_small_shares_are_folded_and_none_is_lost() -> None:
    found = report()
    shown, folded = html_of("report").split("<details>")
    folded = folded.partition("</details>")[0]
    large = [mass for mass in found.attribution if mass.mass >= 0.005]
    small = [mass for mass in found.attribution if mass.mass < 0.005]
    assert len(large) > 5
    assert len(small) > 5
    assert all(f"<td>{mass.tensor}</td>" in shown for mass in large)
    assert all(f"<td>{mass.tensor}</td>" in folded and f"<td>{mass.tensor}</td>" not in shown for mass in small)
    together = 100 * sum(mass.mass for mass in small)
    assert f"{len(small)} more, each under 0.5 %, together {together:.1f} %" in text(f"<p>{folded}</p>")
    # Without layers and depths there is no chart, which would take its time.
    bare = {"layers": [], "cumulative": found.cumulative.model_copy(update={"restricted": [], "truncated": []})}
    assert "<details>" not in report_page(found.model_copy(update={**bare, "attribution": large}))
    assert f"{len(small)} tensors, each under" in text(report_page(found.model_copy(update={**bare, "attribution": small})))


# --- pictures --------------------------------------------------------------------------------------------------------

PICTURES: dict[str, Callable[[float], Picture]] = {
    "report": lambda width: picture(report(), width=width),
    "nothing but a model": lambda width: picture(
        report().model_copy(
            update={
                "layers": [],
                "cumulative": report().cumulative.model_copy(update={"restricted": [], "truncated": []}),
            }
        ),
        width=width,
    ),
    "track": lambda width: steps(course(), width=width),
    "one checkpoint": lambda width: steps(track([asset("hot")]), width=width),
    "map": lambda width: heat_map(heat(course()), width=width),  # type: ignore[arg-type]
    "schedule": lambda width: schedule_picture(planned(), width=width),
    "bare schedule": lambda width: schedule_picture(schedule(4, (0, [0, 1]), (5, range(4))), width=width),
    "gate": lambda width: gate_picture(decided(), width=width),
    "log": lambda width: log_picture(Log(Path("x"), exists=True, records=tuple(map(record, range(6)))), width=width),
    "compare": lambda width: comparison_picture(compared(), width=width),
    "runs": lambda width: runs_picture(runs(), width=width),
    "a job's log": lambda width: log_picture(job(), width=width),
}


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", [n if n != "a job's log" else pytest.param(n, marks=pytest.mark.slow) for n in PICTURES])
def test_every_axis_has_a_label_and_more_than_one_tick(name: str, width: float) -> None:
    drawn = PICTURES[name](width)
    drawn.figure.draw_without_rendering()
    assert drawn.figure.get_figwidth() == width
    assert drawn.axes[-1].get_xlabel()
    for axes in drawn.axes:
        assert axes.get_ylabel()
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-9 * (high - low)
            ticks = [t for t in axis.get_majorticklocs() if low - slack <= t <= high + slack]
            assert len(ticks) > 1, (axes.get_ylabel(), axis.axis_name, ticks)


@pytest.mark.parametrize(
    ("least", "found"), [(95.5, 50), (120.1, 100), (1.2, 1), (2.3, 1), (7.0, 5), (0.025, 0.02), (1, 0.5)]
)
def test_bars_begin_at_a_round_value_below_them(least: float, found: float) -> None:
    assert foot(least) == pytest.approx(found)
    assert foot(least) < least


def test_bars_say_where_they_begin_and_how_far_they_may_reach() -> None:
    found = report()
    drawn = picture(found)
    (axes,) = drawn.axes
    assert axes.get_title(loc="right") == f"bars begin at {axes.get_ylim()[0]:g}" == "bars begin at 50"
    layers = list(found.layers)
    layers[1] = layers[1].model_copy(update={"ceiling": 500.0})
    layers[2] = layers[2].model_copy(update={"status": "unconverged"})
    brackets = {place: ends for place, *ends in part_brackets(found.model_copy(update={"layers": layers}))}
    assert set(brackets) == {-0.5, 0.5, 1.5, 3.5, 4.5, 5.5, 6.5, 7.5}
    assert brackets[0.5] == [layers[0].eigenvalue, layers[0].eigenvalue + layers[0].residual]  # type: ignore[operator]
    assert brackets[1.5] == [layers[1].eigenvalue, 500.0]
    drawn = picture(found.model_copy(update={"layers": layers}))
    segments = [segment.tolist() for c in drawn.axes[0].collections for segment in c.get_segments()]  # type: ignore[attr-defined]
    assert [[1.5, layers[1].eigenvalue], [1.5, 500.0]] in segments


@pytest.mark.parametrize(
    ("step", "verdict", "faint"), [(60, "stable", True), (0, "stable", False), (None, "stable", True), (6, "early", False)]
)
def test_the_truncated_curve_of_a_trained_network_is_muted(step: int | None, verdict: Any, faint: bool) -> None:
    found = report()
    checkpoint = found.checkpoint.model_copy(update={"step": step})
    found = found.model_copy(update={"checkpoint": checkpoint, "verdict": verdict})
    (curve,) = (line for line in picture(found).axes[0].lines if str(line.get_label()).startswith("truncated"))
    assert near_start(found) is not faint
    assert ("means little once trained" in str(curve.get_label())) is faint
    assert (curve.get_alpha() or 1) < 1 if faint else curve.get_alpha() is None


def test_a_narrow_map_has_the_newest_checkpoints_and_says_of_how_many() -> None:
    whole = heat(long(60, 4))
    assert whole is not None
    found = newest_columns(whole, 7)
    assert found.steps == whole.steps[-7:]
    last = {cell.label: cell.kind for cell in whole.cells if cell.column >= 53}
    assert {cell.label: cell.kind for cell in found.cells} == last
    assert {cell.column for cell in found.cells} == set(range(7))
    assert newest_columns(whole, 100) == whole
    drawn = heat_map(whole, width=NARROW)
    assert f"the newest {MOST_NARROW} of 60" in drawn.axes[0].get_xlabel()
    assert "newest" not in heat_map(whole).axes[0].get_xlabel()
    for some in (drawn, heat_map(whole)):
        labels = {label.get_text() for label in some.axes[0].get_xticklabels()}
        assert "60,000" in labels, "the newest is named"


# --- pages of schedules, gates and comparisons -----------------------------------------------------------------------


def test_a_schedule_shows_its_picture_and_no_empty_provenance() -> None:
    html = html_of("schedule")
    assert html.count("<svg") == 2
    assert "<svg" not in top(planned())
    assert not re.search(r"<dd>\s*(none|None)?\s*</dd>", html)
    for gone in ("Checkpoint", "Blocks"):
        assert f"<dt>{gone}</dt>" not in html
    assert "<dt>Report</dt><dd>r.json</dd>" in html
    bare = schedule_page(schedule(4, (0, [0, 1]), (5, range(4))))
    assert not re.search(r"<dd>\s*(none|None)?\s*</dd>", bare)
    assert "<dt>Margin</dt>" not in bare


def test_unlocks_are_a_list_that_stands_apart_from_their_lines() -> None:
    """At the right end each would stand over the line of another."""
    axes = schedule_picture(schedule(4, (0, [0, 1]), (5, [0, 1, 2]), (9, range(4)))).axes[0]
    assert axes.get_title(loc="left") == "blocks join: 1 at 5, 1 at 9"
    assert not axes.get_title(loc="right")


def test_round_values_of_a_logarithmic_axis_are_written_alike() -> None:
    axes = Figure().add_subplot()
    axes.set_yscale("log")
    axes.set_ylim(500, 1.5e6)
    readable_log(axes.yaxis)
    said = [axes.yaxis.get_major_formatter()(value) for value in axes.get_yticks() if 500 <= value <= 1.5e6]
    assert said[-1] == "1,000,000"
    assert not [text for text in said if "e" in text]


def test_a_gate_and_a_comparison_have_pages(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    path.write_text(decided().to_json())
    said = text(page(path))
    for wanted in ("hot.json", "broken", "3 rules, exit code 1", "max-layer-rho", "from curv.toml", "curv.gate/1", "8,192"):
        assert wanted in said, wanted
    path.write_text(compared().to_json())
    said = text(page(path))
    for wanted in (
        "calm/60 against hot/60", "A: stable rho 0.660", "B: unstable rho 1.51", "rose most, to 6.36 times", "1,903",
        "13,922", "curv.compare/1",
    ):  # fmt: skip
        assert wanted in said, wanted


def test_growth_is_that_of_rho_with_the_bracket_moved_by_the_learning_rates() -> None:
    change = compared().changes[0]
    assert change.ratio is not None
    assert change.rho_ratio is not None
    assert change.low is not None
    grown = growth(change)
    assert grown is not None
    assert grown[0] == pytest.approx(1.505 / 0.6596, rel=1e-3)
    assert grown[1] / change.low == pytest.approx(grown[0] / change.ratio)
    bare = growth(change.model_copy(update={"rho_ratio": None}))
    assert bare == (change.ratio, change.low, change.high)
    assert growth(change.model_copy(update={"ratio": None})) is None
    nothing = compared().model_copy(
        update={"changes": [change.model_copy(update={"ratio": None, "message": "it is skipped"})]}
    )
    html = comparison_page(nothing)
    assert "<svg" not in html
    assert "it is skipped" in html
    assert "why no ratio" in html
    assert "why no ratio" not in html_of("compare")


def hostile_runs(evil: str) -> TrackComparison:
    """Two runs with text from outside wherever their page has some."""
    found = runs()
    side = found.first.model_copy(update={"path": evil, "run": evil})
    finding = Finding(code=evil, severity="warning", message=evil)
    return found.model_copy(update={"first": side, "second": side, "findings": [finding]})


def test_nothing_of_a_gate_or_a_comparison_is_markup() -> None:
    evil = "".join(HOSTILE)
    found = compared()
    changes = [change.model_copy(update={"name": evil}) for change in found.changes]
    side = found.first.model_copy(update={"path": evil, "checkpoint": evil})
    for html in (
        comparison_page(found.model_copy(update={"changes": changes, "first": side})),
        gate_page(decided(evil)),
        track_comparison_page(hostile_runs(evil)),
    ):
        parsed = Text(html)
        assert parsed.tags.count("script") == 1
        assert "img" not in parsed.tags
        names = {name for _, name, _ in parsed.attributes}
        assert not {name for name in names if name.startswith("on")} | ({"src", "href", "style"} & names)
        assert "jajajajaja" not in html
        assert evil in parsed.text


# --- in a real browser -----------------------------------------------------------------------------------------------

HINT = "getComputedStyle(e, '::before').content"
FRAMES = f"[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth > e.clientWidth + 2, {HINT} !== 'none'])"
# Of every chart that shows: its class, whether all of it is in sight, the size of its smallest text in pixels.
CHARTS = """[...document.querySelectorAll('.scroll svg:not(.bar svg)')]
  .filter(s => s.getBoundingClientRect().width).map(s => [
  s.getAttribute('class'),
  s.getBoundingClientRect().right <= s.closest('.scroll').getBoundingClientRect().right + 1,
  Math.min(...[...s.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize)))
    * s.getBoundingClientRect().width / s.viewBox.baseVal.width])"""


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PAGES])
def test_a_page_on_a_phone_and_on_a_screen(browser: Browser, tmp_path: Path, name: str) -> None:
    out = tmp_path / "page.html"
    out.write_text(html_of(name))
    for width, narrow in ((480, True), (1280, False)):
        browser.open(out, width=width, scheme="dark")
        assert troubles(browser) == []
        assert browser.run("document.documentElement.scrollWidth") <= width
        frames = browser.run(FRAMES)
        assert all(wide == hinted for wide, hinted in frames), "what is wider than its frame says so, and nothing else"
        assert any(wide for wide, _ in frames) or not narrow
        charts = browser.run(CHARTS)
        assert bool(charts) == (name != "explain"), "which has bars in its tables alone"
        for kind, whole, size in charts:
            assert kind.endswith("-narrow") is narrow
            assert whole, "the newest checkpoint and the deepest block are in sight"
            assert size >= 9, kind
    if name == "report":  # the same table in a window that has room beside the text, and in one that has none
        assert all(not hinted for _, hinted in frames)
        browser.open(out, width=1000)
        assert any(hinted for _, hinted in browser.run(FRAMES))
    browser.open(out, width=700, media="print")
    assert browser.run("document.documentElement.scrollWidth") <= 700
    assert all(not hinted for _, hinted in browser.run(FRAMES))
    assert all(not kind.endswith("-narrow") for kind, *_ in browser.run(CHARTS))


def test_tables_hint_and_shares_unfold_without_script(browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text(html_of("report"))
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(out, width=480)
        assert all(hinted for _, hinted in browser.run(FRAMES))
        folded = "document.querySelector('details:not(.csv) table').checkVisibility({contentVisibilityAuto: true})"
        assert browser.run(folded) is False
        browser.run("document.querySelector('details:not(.csv) > summary').focus()")
        browser.press("Enter", 13, "\r")
        assert browser.run(folded) is True
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
