"""Pictures: what is in them lies where the numbers say, on a page as in a file; colours that everybody tells apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from math import log
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import Browser, troubles
from logs import job
from pages import HOSTILE, SCHEDULE, decided
from places import ASSETS
from tracks import asset, at, course, failed, long, track

from curvcli.documents import Report, Schedule, TrainingStep, load_report
from curvcli.judge.compare import compare
from curvcli.judge.compare_tracks import compare_tracks
from curvcli.render.html import (
    comparison_page,
    gate_page,
    log_page,
    report_page,
    schedule_page,
    track_comparison_page,
    track_page,
)
from curvcli.render.picture import FORMATS, Picture
from curvcli.render.plot import picture
from curvcli.render.schedule_plot import plot as plot_schedule
from curvcli.render.series import heat, report_series
from curvcli.render.style import PALETTE, light
from curvcli.render.track_plot import heat_map, plot_track, steps

ASSET = ASSETS / "hot-60.report.json"


@pytest.fixture(scope="module")
def report() -> Report:
    return load_report(ASSET)


def embedded(drawn: Picture, name: str = "x") -> ElementTree.Element:
    """The picture as a page has it."""
    svg = str(drawn.embed(name, "a picture")).replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
    return ElementTree.fromstring(svg)  # noqa: S314


def marks(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """What speaks, by what it says; where several say the same, the first, which is in the uppermost panel."""
    found: dict[str, ElementTree.Element] = {}
    for mark in root.iter():
        for title in mark.findall("title"):
            found.setdefault(title.text or "", mark)
    return found


def place(mark: ElementTree.Element) -> tuple[float, float]:
    if mark.tag == "use":
        return float(mark.attrib["x"]), float(mark.attrib["y"])
    numbers = [float(n) for n in re.findall(r"[\d.]+", mark.attrib["d"])]
    return (min(numbers[::2]) + max(numbers[::2])) / 2, (min(numbers[1::2]) + max(numbers[1::2])) / 2


def edge(root: ElementTree.Element) -> float:
    """Height of the first dashed line across the picture."""
    line = next(e for e in root.iter("path") if e.get("stroke") == f"var(--{NAME['limit']})" and e.get("stroke-dasharray"))
    return float(line.attrib["d"].split()[2])


# A colour of two meanings has one variable: the first that is so called.
NAME = {name: next(first for first, look in PALETTE.items() if look == PALETTE[name]) for name in PALETTE}


# --- where things lie ------------------------------------------------------------------------------------------------


def test_depths_lie_where_the_numbers_say(report: Report) -> None:
    root = embedded(picture(report))
    found, threshold = marks(root), report.optimizer.threshold
    assert threshold is not None
    assert len(found) == sum(len(x) for x, _ in report_series(report).values()) == 27
    curve = {d.depth: place(found[f"restricted to depth, depth {d.depth}: {d.eigenvalue:,.4g}"])
             for d in report.cumulative.restricted}  # fmt: skip
    values = {d.depth: d.eigenvalue for d in report.cumulative.restricted}
    assert values[0] is not None
    assert values[8] is not None
    a_decade = (curve[0][1] - curve[8][1]) / log(values[8] / values[0], 10)
    assert edge(root) == pytest.approx(curve[0][1] - a_decade * log(threshold / values[0], 10), abs=0.1)
    assert curve[1][0] - curve[0][0] == pytest.approx((curve[8][0] - curve[0][0]) / 8, abs=0.02)
    # A layer's bar ends at its value and stands between two depths; embedding and head stand before the first.
    for layer in report.layers:
        assert layer.eigenvalue is not None
        bar = found[f"layer alone, depth {layer.index + 0.5:g}: {layer.eigenvalue:,.4g}"]
        numbers = [float(n) for n in re.findall(r"[\d.]+", bar.attrib["d"])]
        assert min(numbers[1::2]) == pytest.approx(curve[0][1] - a_decade * log(layer.eigenvalue / values[0], 10), abs=0.1)
        assert curve[layer.index][0] < min(numbers[::2]) < max(numbers[::2]) < curve[layer.index + 1][0]
    outside = next(mark for label, mark in found.items() if label.startswith("embedding, head alone: "))
    assert max(float(n) for n in re.findall(r"[\d.]+", outside.attrib["d"])[::2]) < curve[0][0]


def test_bars_of_a_deep_model_stay_apart(report: Report) -> None:
    layers = [report.layers[i % 8].model_copy(update={"index": i, "name": f"layers.{i}"}) for i in range(80)]
    checkpoint = report.checkpoint.model_copy(update={"layers": 80})
    found = marks(embedded(picture(report.model_copy(update={"layers": layers, "checkpoint": checkpoint}))))
    bars = [mark for label, mark in found.items() if "alone" in label]
    spans = sorted(
        (min(x), max(x)) for bar in bars for x in [[float(n) for n in re.findall(r"[\d.]+", bar.attrib["d"])[::2]]]
    )
    assert len(spans) == 81
    assert min(b[0] - a[1] for a, b in pairwise(spans)) > 0


def test_steps_lie_where_the_numbers_say() -> None:
    root = embedded(steps(course()))
    rho: dict[str, tuple[float, float]] = {}
    for label, mark in marks(root).items():
        rho.setdefault(label.split(":")[0], place(mark))
    height = {value: rho[f"step {step}"][1] for step, value in ((10, 0.09893), (20, 0.19785), (60, 1.505), (90, 0.5936))}
    scale = (height[0.09893] - height[1.505]) / (1.505 - 0.09893)
    for value, y in height.items():
        assert (height[0.09893] - y) / scale == pytest.approx(value - 0.09893, abs=2e-3)
    assert edge(root) == pytest.approx(height[0.09893] - scale * (1 - 0.09893), abs=0.1)
    assert rho["step 20"][0] - rho["step 10"][0] == pytest.approx(rho["step 90"][0] - rho["step 80"][0], abs=0.02)
    labels = list(marks(root))
    assert "step 50: could not be measured" in labels
    assert rho["step 50"][1] == pytest.approx(height[0.09893] + scale * 0.09893, abs=0.1), "at the foot"
    assert "step 70: rho 0.989, lambda 20,882, unresolved; between 0.987 and 0.995" in next(
        label for label in labels if label.startswith("step 70")
    )
    assert next(label for label in labels if label.startswith("step 60")).endswith("times the median before")


def test_the_map_has_a_cell_per_value_in_the_class_of_its_rho() -> None:
    document = course()
    found = heat(document)
    assert found is not None
    assert [sum(cell.row == row for cell in found.cells) for row in range(10)] == [8] * 10
    hot = document.points[5].report
    assert hot is not None
    limits = (0.1, 0.2, 0.4, 0.8, 1.25, 2.5)
    assert found.parts == ["embedding, head", *(layer.name for layer in hot.layers), "full model"]
    kinds = {cell.row: cell.kind for cell in found.cells if cell.column == 5}
    for row, part in enumerate([*hot.parts, hot.full]):
        assert part.rho is not None
        assert kinds[row] == sum(limit <= part.rho for limit in limits)
    weak = [cell for cell in found.cells if cell.kind is None]
    assert [cell.label for cell in weak] == ["full model, step 70: rho 0.989, unconverged"]
    drawn = marks(embedded(heat_map(found)))
    assert set(drawn) == {cell.label for cell in found.cells}
    for cell in found.cells:
        fill = drawn[cell.label].attrib["fill"]
        assert fill == f"var(--rho{cell.kind})" if cell.kind is not None else fill.startswith("url(#x-")
    a, b = (place(drawn[f"model.layers.{layer}, step 60: rho {hot.layers[layer].rho:.3g}"]) for layer in (0, 4))
    assert a[0] == pytest.approx(b[0], abs=0.1)
    assert a[1] < b[1]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [s if s == "svg" else pytest.param(s, marks=pytest.mark.slow) for s in FORMATS])
def test_odd_documents_have_pictures(suffix: str, report: Report) -> None:
    hot = asset("hot")
    held = hot.generalisation.model_copy(update={"rho_low": -17.0})
    bare = {"eigenvalue": None, "rho": None, "status": "non-finite"}
    for document in (
        track([hot.model_copy(update={"update": hot.update.model_copy(update={"ratio": 1.5})}), at(hot, 70, -1.0)]),
        track([hot]),
        track([failed(10)]),
        track([failed(None)]),
        track([hot.model_copy(update={"generalisation": held}), at(hot, 70, 9.0), at(hot, 80, -1.0)]),
        track([hot], log=[TrainingStep(step=1, loss=None, lr=None), TrainingStep(step=2, loss=3.0, lr=0.0)]),
    ):
        if suffix == "svg":
            assert embedded(steps(document)) is not None
        else:
            assert plot_track(document, suffix)
    nothing = report.model_copy(
        update={"layers": [], "ends": None, "full": report.full.model_copy(update=bare),
                "cumulative": report.cumulative.model_copy(update={"restricted": [], "truncated": []}),
                "optimizer": report.optimizer.model_copy(update={"threshold": None, "lr": None})}
    )  # fmt: skip
    assert picture(nothing).save(suffix)
    assert heat(track([failed(3)])) is None
    assert plot_schedule(Schedule.model_validate(SCHEDULE), suffix)


def ticks(drawn: Picture) -> list[list[float]]:
    """Heights of the labelled ticks of each panel."""
    drawn.save("png")
    return [[t for t in axes.get_yticks() if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]] for axes in drawn.axes]


@pytest.mark.parametrize(
    "scale", [None, 1e-6, 1.0001, 1e7, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.3, 1, 40))]
)
def test_every_axis_has_two_ticks_to_read_by(scale: float | None) -> None:
    hot = asset("hot")
    found = ticks(steps(course() if scale is None else track([at(hot, 10), at(hot, 20, scale)])))
    assert min(map(len, found)) >= 2
    assert max(map(len, found)) <= 12
    if scale is not None:
        assert len(ticks(picture(at(hot, 10, scale)))[0]) >= 2


# --- a picture in a page ---------------------------------------------------------------------------------------------


def test_a_mark_without_its_label_is_no_picture() -> None:
    def draw(drawn: Picture) -> None:
        (line,) = drawn.axes[0].plot([0, 1, float("nan")], [0, 1, 2], "o", color=light("measured"))
        drawn.label(line, ["a", "b", "c"])

    with pytest.raises(ValueError, match="zip"):
        Picture(draw, [2.0], "").embed("x", "")


def test_a_colour_of_no_name_is_refused() -> None:
    def draw(drawn: Picture) -> None:
        drawn.axes[0].axhline(1, color="#123456")

    with pytest.raises(KeyError, match="#123456"):
        Picture(draw, [2.0], "").embed("x", "")


@pytest.mark.slow
def test_pictures_of_a_page_share_no_id_and_refer_to_their_own(report: Report) -> None:
    run = track_page(course())
    for html in (run, report_page(report)):
        ids = re.findall(r'\bid="([^"]+)"', html)
        assert len(ids) == len(set(ids)) > 3
        assert set(re.findall(r"(?:href=\"|url\()#([\w-]+)", html)) == set(ids)
        assert not re.search(r'\bstyle="|xmlns|<style type|DejaVu', html)
        assert html.count("<style>") == 1
        assert len(html) < 300_000
    assert track_page(course()) == run


def test_names_from_a_file_are_text_in_a_picture() -> None:
    evil = f"{HOSTILE[0]} $x^2$ \x1b[31m\u202e"
    layers = [asset("hot").layers[0].model_copy(update={"name": evil})]
    found = heat(track([asset("hot").model_copy(update={"layers": layers})]))
    assert found is not None
    drawn = heat_map(found)
    root = embedded(drawn)
    texts = [text.text or "" for text in root.iter("text")]
    assert any("$x^2$" in text for text in texts), "its end, as it is, and not as a formula"
    assert not any(c in text for text in [*texts, *marks(root)] for c in "\x1b\u202e")
    assert {e.tag for e in root.iter()} <= {
        "svg", "g", "defs", "clipPath", "pattern", "rect", "path", "use", "text", "title"
    }  # fmt: skip


NO_OVERLAP = """(() => {
  const meet = (a, b) => a.left + 2 < b.right && b.left + 2 < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
  const bad = [];
  for (const svg of document.querySelectorAll('.scroll svg')) {
    const texts = [...svg.querySelectorAll('text')], frame = svg.getBoundingClientRect();
    const all = texts.map((e) => [e.textContent, e.getBoundingClientRect()]);
    all.forEach(([said, a], i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.bottom > frame.bottom) bad.push('outside: ' + said);
      all.slice(i + 1).forEach(([other, b]) => { if (meet(a, b)) bad.push('overlap: ' + said + ', ' + other); });
    });
  }
  return bad;
})()"""


LABELLED: dict[str, Callable[[], str]] = {
    "report": lambda: report_page(load_report(ASSET)),
    "track": lambda: track_page(course()),
    "no log": lambda: track_page(course().model_copy(update={"log": []})),
    "long": lambda: track_page(long(60, 96)),
    "schedule": lambda: schedule_page(Schedule.model_validate(SCHEDULE)),
    "gate": lambda: gate_page(decided()),
    "compare": lambda: comparison_page(compare(asset("calm"), asset("hot"), names=("a", "b"))),
    "log": lambda: log_page(job()),
    "runs": lambda: track_comparison_page(compare_tracks(course(), long(20, 4), names=("a", "b"))),
}


@pytest.mark.parametrize(
    "name",
    [
        "report",
        "track",
        "schedule",
        "gate",
        "compare",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("runs", "log", "no log", "long")),
    ],
)
def test_labels_keep_apart(browser: Browser, tmp_path: Path, name: str) -> None:
    out = tmp_path / "page.html"
    out.write_text(LABELLED[name]())
    for width in (480, 1280):
        browser.open(out, width=width)
        assert troubles(browser) == []
        assert browser.run(NO_OVERLAP) == [], width


@pytest.mark.parametrize("scheme", [0, 1])
def test_a_page_shows_the_palette_of_its_scheme(browser: Browser, tmp_path: Path, report: Report, scheme: int) -> None:
    out = tmp_path / "x.html"
    out.write_text(report_page(report))
    browser.open(out, scheme=("light", "dark")[scheme])
    used = set(re.findall(r"var\(--(\w+)\)", out.read_text().partition("</style>")[2]))
    assert {NAME[name] for name in ("restricted", "truncated", "layer", "ends", "limit", "ink", "soft", "line")} <= used
    for name in used:
        value = browser.run(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')")
        assert value == PALETTE[name][scheme]
