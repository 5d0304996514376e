"""What `curv watch` draws: a curve, its axis and limits, a header and a table that fit the terminal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from logs import record
from rich.console import Console

from curvcli.documents import Log
from curvcli.render.fit import fitting, thin
from curvcli.render.plot_log import plot_log
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
