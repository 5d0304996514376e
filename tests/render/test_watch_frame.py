"""What `curv watch` draws: a curve, its axis and limits, a header and a table that fit the terminal."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from logs import record
from rich.console import Console

from curvcli.documents import Log
from curvcli.render.fit import fitting, round_log_ticks, round_ticks, spans_decades, thin
from curvcli.render.plot_log import picture, plot_log
from curvcli.render.series import log_series
from curvcli.render.watch import LEAST_NEEDED, TITLES, curve, draw, header, screen


def test_curve_breaks_where_nothing_is_known() -> None:
    records = (
        record(0, active_depth=2), record(10, 0.6, active_depth=2), record(20, None), record(30, 0.7),
        record(40, 9.0, status="unconverged", active_depth=None), record(50, 0.8, active_depth=6),
    )  # fmt: skip
    data = curve(records)
    assert data.runs == [[(0, 0.5), (10, 0.6)], [(30, 0.7)], [(50, 0.8)]]
    assert data.doubtful == [(40, 9.0)]
    assert data.missing == [20]
    assert data.unlocks == [(20, 4), (50, 6)]
    assert (data.logarithmic, data.below) == (True, 0)


def test_a_logarithmic_axis_says_what_it_leaves_out() -> None:
    data = curve((record(0, -0.1), record(10, 0.1), record(20, 50.0)))
    assert data.runs == [[(10, 0.1), (20, 50.0)]]
    assert data.below == 1
    assert curve((record(0, -0.1), record(10, 1.0))).below == 0
    text = draw((record(0, -0.1), record(10, 0.1), record(20, 50.0)), 80, 14).plain
    assert "1 not above 0, off the log axis" in text
    assert [line.split("┤")[0].strip() for line in text.splitlines() if "┤" in line and line.strip()[0] != "│"] != []


def test_thinning_keeps_a_spike() -> None:
    points = [(step, 0.5) for step in range(10_000)]
    points[6543] = (6543, 40.0)
    kept = thin(points, 80)
    assert len(kept) <= 320
    assert {points[0], points[6543], points[-1]} <= set(kept)
    assert thin(points[:10], 80) == points[:10]


def test_the_edge_and_unlocks_are_where_they_should_be() -> None:
    records = tuple(record(step, 0.1 + step / 500, active_depth=2 if step < 300 else 4) for step in range(0, 601, 10))
    lines = draw(records, 80, 16).plain.splitlines()
    assert len(lines) == 16
    assert max(map(len, lines)) <= 80
    edge = next(line for line in lines if line.strip().startswith("1├"))
    assert edge.count("─") > 60
    # Half way along the axis, in every line of the canvas that the curve does not cross there.
    column = round(4 + 0.5 * 74)
    crossings = [n for n, line in enumerate(lines[2:-2]) if line[column - 1 : column + 2].strip("⠀ ")]
    assert len(crossings) == len(lines[2:-2])
    assert draw(records, 80, 16, utf8=False).plain.isascii()


@pytest.mark.parametrize(("rho", "said"), [(0.5, "STABLE"), (1.0, "EDGE"), (1.3, "UNSTABLE")])
def test_status_against_the_limits(rho: float, said: str) -> None:
    log = Log(Path("x"), exists=True, records=(record(0, rho),), age=3.0)
    assert f" {said} " in header(log).plain


@pytest.mark.parametrize(
    ("rho", "odds", "said"),
    [(0.5, 0.2, "STABLE"), (0.5, 0.4, "EDGE"), (1.3, 0.5, "PROBABLY TOO HOT"), (1.3, 0.9, "UNSTABLE")],
)
def test_status_by_the_odds_as_a_report_has_it(rho: float, odds: float, said: str) -> None:
    log = Log(Path("x"), exists=True, records=(record(0, rho).model_copy(update={"odds": odds}),), age=3.0)
    assert f" {said} " in header(log).plain
    assert f"chance of a bad end at such a rho: {100 * odds:.0f} %" in header(log).plain


def test_a_failed_record_is_no_number() -> None:
    log = Log(Path("x"), exists=True, records=(record(0, 0.7), record(10, None, message="oom \x1b[2J\nx")), age=3.0)
    text = header(log).plain
    assert " UNRESOLVED   no rho, failed: oom ?[2J x" in text
    assert "the last one was 0.700 at step 0" in text
    doubtful = Log(Path("x"), exists=True, records=(record(0, 0.7, status="unconverged"),), age=3.0)
    assert " UNRESOLVED " in header(doubtful).plain
    assert "not to be relied on" in header(doubtful).plain


@pytest.mark.parametrize("width", [40, 60, 80, 140])
@pytest.mark.parametrize("height", [8, 16, 24, 50])
def test_a_frame_keeps_within_the_terminal(width: int, height: int) -> None:
    records = tuple(record(1000 + step * 10, 0.1 + step / 100, active_depth=step // 40) for step in range(120))
    log = Log(Path("run/curvature.jsonl"), exists=True, records=records, damaged=3, damage="line 7: no", age=4.0, gap=9.0)
    console = Console(width=width, height=height, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    lines = console.render_lines(screen(log, console, tail=12, height=height), pad=False)
    assert len(lines) < height or height == 8
    assert all(sum(s.cell_length for s in line) <= width for line in lines)
    shown = "\n".join("".join(s.text for s in line) for line in lines)
    assert ("status" in shown and "2,190" in shown) or height == 8


def test_a_narrow_table_loses_the_least_needed_columns() -> None:
    cells = [dict.fromkeys(("step", "loss", "lr", "lambda", "rho", "residual", "update", "depth"), "1234567")
             | dict.fromkeys(("HVPs", "seconds", "status"), "12345678")]  # fmt: skip
    assert len(fitting(cells, 140, TITLES, LEAST_NEEDED)) == 11
    assert "residual" not in fitting(cells, 80, TITLES, LEAST_NEEDED)
    assert fitting(cells, 5, TITLES, LEAST_NEEDED) == ["step", "rho", "status"]


@pytest.mark.slow
def test_series_of_the_picture() -> None:
    records = (record(0, 0.5), record(10, None), record(20, 0.9, status="unconverged"), record(30, 0.0))
    data = log_series(records)
    assert repr(data["rho"]) == "([0, 10, 20, 30], [0.5, nan, nan, 0.0])"
    assert repr(data["rho, not converged"][1]) == "[nan, nan, 0.9, nan]"
    assert repr(data["threshold"][1]) == "[38000.0, nan, nan, nan]"
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        assert plot_log(Log(Path("x"), exists=True, records=records), suffix).startswith(start)
    assert plot_log(Log(Path("x"), exists=True), "png").startswith(b"\x89PNG")


def test_level_companions_and_cost_are_shown() -> None:
    more = {
        "gradient_norm": 2.134, "gradient_sigmas": 7.12, "gradient_outlier": True, "update_rms": 0.97,
        "gradient_quotient": 33.0, "attention_logit": 12.5, "attention_entropy": 0.31, "spectral_norm": 4.2,
        "overhead": 0.0481, "probe_batches": 2,
    }  # fmt: skip
    text = header(Log(Path("x"), exists=True, records=(record(0, 2.0, **more),), age=3.0)).plain
    assert "\n ERROR: rho is 2: unstable; the gradient's norm is 7.1 standard deviations above" in text
    assert "own; lower the lr to 0.0004\n" in text
    assert "\n gradient 2.13 (+7.1 sd), update RMS 0.970, g'Hg/g'g 33.0, attention logit 12.5, attention entropy" in text
    assert "spectral norm 4.20\n" in text
    assert "\n measuring takes 4.8 % of the training's time, on 2 batches of the probe" in text
    more["overhead"] = 1.467  # as every= allows, on a small network
    over = header(Log(Path("x"), exists=True, records=(record(0, 2.0, **more),), age=3.0)).plain
    assert "measuring takes 147 % of" in over, "and no 1.5e+02"
    calm = header(Log(Path("x"), exists=True, records=(record(0, 0.5),), age=3.0)).plain
    assert not any(word in calm for word in ("INFO", "gradient", "measuring"))
    failed = header(Log(Path("x"), exists=True, records=(record(0, None, message="oom \x1b[2J"),), age=3.0)).plain
    assert "\n WARN: oom ?[2J" in failed


@pytest.mark.parametrize(
    ("low", "high", "most", "found"),
    [
        (0, 1.3125, 5, [0, 0.5, 1]), (0, 4.9, 6, [0, 1, 2, 3, 4]), (-31, 12, 5, [-30, -20, -10, 0, 10]),
        (7, 1190, 5, [500, 1000]), (0, 1000, 5, [0, 200, 400, 600, 800, 1000]), (3, 3, 5, [3]),
    ],
)  # fmt: skip
def test_ticks_are_1_2_or_5_times_a_power_of_ten(low: float, high: float, most: int, found: list[float]) -> None:
    assert round_ticks(low, high, most) == pytest.approx(found)


def test_counts_have_no_tick_between_them() -> None:
    assert round_ticks(0, 2, 6, least=1) == [0, 1, 2]


@pytest.mark.parametrize(
    ("low", "high", "most", "found"),
    [(0.01, 100, 6, [0.01, 0.1, 1, 10, 100]), (1, 10, 6, [1, 2, 5, 10]), (1e-6, 1e6, 5, [1e-6, 1e-3, 1, 1e3, 1e6])],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, most: int, found: list[float]) -> None:
    assert round_log_ticks(low, high, most) == pytest.approx(found)


@pytest.mark.parametrize(("last", "rho"), [(1190, 0.9), (73, 4.7), (123_456, 80.0), (1, 0.1), (9_999_999, 3e4)])
@pytest.mark.parametrize("width", [40, 80, 140])
def test_labels_of_a_terminal_are_round_and_stand_apart(last: int, rho: float, width: int) -> None:
    records = tuple(record(last * n // 20, 0.05 + rho * n / 20) for n in (range(21) if last > 20 else (0, 20)))
    lines = draw(records, width, 14).plain.splitlines()
    steps = [int(word.replace(",", "")) for word in lines[-1].split()]
    assert len(steps) > 1
    assert len({b - a for a, b in pairwise(steps)}) == 1
    assert str(steps[1] - steps[0]).rstrip("0") in ("1", "2", "5")
    shown = [re.match(r"\s*([\d.e+-]+)[├┤]", line) for line in lines]
    rows = [(place, float(found[1])) for place, found in enumerate(shown) if found]
    assert 1.0 in [value for _, value in rows], "the edge"
    assert len(rows) > 1
    assert [value for _, value in rows] == sorted((value for _, value in rows), reverse=True)


def test_a_picture_has_a_logarithmic_axis_where_values_span_decades() -> None:
    assert spans_decades([0.01, float("nan"), 1.0])
    assert not spans_decades([0.02, 1.0])
    assert not spans_decades([0.0, 1.0])
    assert not spans_decades([])
    records = tuple(record(n, 0.5, lr=10.0 ** (n - 5), loss=3.0 + n) for n in range(4))
    scales = {axes.get_ylabel(): axes.get_yscale() for axes in picture(Log(Path("x"), records=records)).axes}
    assert scales == {"rho": "linear", "lambda": "log", "learning\nrate": "log", "training\nloss": "linear"}


def test_what_has_no_place_on_a_logarithmic_axis_is_counted_and_no_line_leads_to_it() -> None:
    drawn = picture(Log(Path("x"), records=(record(0, 0.1), record(10, 50.0), record(20, -0.2), record(30, 60.0))))
    assert drawn.axes[-1].get_xlabel() == "step\noff the axis, as not above 0: 1 of rho, 1 of lambda"
    rho = drawn.axes[0].lines[0].get_ydata()
    assert [y != y for y in rho] == [False, False, True, False]


def test_labels_of_unlocks_stand_apart_and_the_newest_stays() -> None:
    records = tuple(record(n, 0.5, active_depth=n // 2) for n in range(100))
    drawn = picture(Log(Path("x"), records=records))
    labels = [text for text in drawn.axes[0].texts if text.get_text()]
    places = [text.get_position()[0] for text in labels]
    assert labels[-1].get_text() == "49"
    assert 10 < len(places) < 26
    assert min(b - a for a, b in pairwise(places)) >= 0.04 * 99
    assert len([line for line in drawn.axes[0].lines if np.ptp(line.get_xdata()) == 0]) == 49, "each has its line"


def test_a_long_log_is_thinned_and_its_breaks_and_spikes_stay() -> None:
    records = tuple(record(n, 40.0 if n == 2543 else None if n == 4000 else 0.5) for n in range(4200))
    steps, values = log_series(records)["rho"]
    assert len(steps) < 4100
    assert 40.0 in values
    assert [step for step, y in zip(steps, values, strict=True) if y != y] == [4000]


def test_rho_of_some_parameters_has_the_others_z_beside_it() -> None:
    log = Log(Path("x"), exists=True, records=(record(0, 0.1, sharpness=300.0, z=0.454),), age=3.0)
    text = header(log).plain
    assert " UNRESOLVED " in text
    assert "the parameters without a rho: Z 0.454" in text
