"""Schedules: learning rates against transformers, policies against closed forms and a real report, refusals."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from curvcli.documents import DepthEstimate, LrSchedule, Report, Schedule, load_report
from curvcli.errors import CurvError, InputError, UsageError
from curvcli.render.schedule_plot import plot, series
from curvcli.render.schedule_table import ranges
from curvcli.schedules import Measured, freeze, grow, grow_from, highest_from, lr_at, lr_schedule, settles
from curvcli.schedules.lr import read_points
from curvcli.schedules.plan import joining, split

ASSETS = Path(__file__).parent / "assets"
PEAK = 3e-3


@pytest.fixture
def init() -> Measured:
    """A Llama of 8 blocks at step 0: its truncated curve rises, 0.116 at depth 1 to 0.541 at 8, at lr 0.003."""
    return Measured.read(ASSETS / "init.json")


@pytest.fixture
def hot() -> Measured:
    """sample_checkpoints/hot at step 60, lr 0.03: restricted 0.181 at depth 0, 1.41 to 1.51 from 1 to 8."""
    return Measured.read(ASSETS / "hot-60.json")


def rates(kind: str = "constant", peak: float | None = PEAK, **options: object) -> LrSchedule:
    return lr_schedule(kind, peak=peak, **options)  # type: ignore[arg-type]


# The names and options of transformers' own schedulers are the oracle; ours are beside them.
ORACLES = [
    ("constant", {}, "constant_with_warmup", {}),
    ("linear", {}, "linear", {}),
    ("cosine", {}, "cosine", {}),
    ("cosine", {"min_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("linear", {"min_ratio": 0.1}, "polynomial", {"lr_end": 0.1 * PEAK, "power": 1.0}),
    ("wsd", {"decay_steps": 30}, "warmup_stable_decay", {"num_decay_steps": 30}),
    ("wsd", {"decay_steps": 30, "min_ratio": 0.2}, "warmup_stable_decay", {"num_decay_steps": 30, "min_lr_ratio": 0.2}),
    ("wsd", {"decay_steps": 0}, "warmup_stable_decay", {"num_decay_steps": 0}),
    ("inverse-sqrt", {}, "inverse_sqrt", {}),
]


@pytest.mark.parametrize("warmup", [0, 1, 17])
@pytest.mark.parametrize(("kind", "ours", "name", "theirs"), ORACLES)
def test_lr_is_that_of_transformers(kind: str, ours: dict, name: str, theirs: dict, warmup: int) -> None:
    schedule = rates(kind, warmup_steps=warmup, total_steps=100, **ours)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    oracle = get_scheduler(name, optimizer, warmup, 100, scheduler_specific_kwargs=theirs)
    for step in range(103):
        used = optimizer.param_groups[0]["lr"]
        assert lr_at(schedule, step) == pytest.approx(used, rel=1e-12, abs=1e-18), step
        optimizer.step()
        oracle.step()


def test_lr_of_a_file_is_a_step_function(tmp_path: Path) -> None:
    file = tmp_path / "lr.csv"
    file.write_text("step,loss,lr\n10,9,0.1\n20,8,0.3\n40,7,0.2\n")
    schedule = rates(str(file), None)
    assert [lr_at(schedule, s) for s in (10, 19, 20, 39, 40, 999)] == [0.1, 0.1, 0.3, 0.3, 0.2, 0.2]
    assert (schedule.peak, schedule.warmup_steps) == (0.3, 20)
    assert (highest_from(schedule, 10), highest_from(schedule, 40)) == (0.3, 0.2)
    assert [settles(schedule, limit, 0) for limit in (0.3, 0.25, 0.2, 0.1)] == [20, 40, 40, None]
    with pytest.raises(UsageError, match="no learning rate is known at step 9"):
        lr_at(schedule, 9)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "line 1 has no columns"),
        ("steps,lr\n0,1\n", "line 1 has no columns"),
        ("step,lr\n", "no positive learning rate"),
        ("step,lr\n0,0\n", "no positive learning rate"),
        ("step,lr\n0,1\nx,1\n", "line 3"),
        ("step,lr\n0\n", "line 2"),
        ("step,lr\n0,1\n0,2\n", "line 3: step 0 does not come after 0"),
        ("step,lr\n-1,1\n", "line 2"),
        ("step,lr\n0,nan\n", "line 2"),
        ("step,lr\n0,inf\n", "line 2"),
        ("step,lr\n0,-1\n", "line 2"),
        ("\xff\xfe\x00", "cannot read"),
    ],
)
def test_a_bad_file_of_rates_names_its_line(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "lr.csv"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=said) as caught:
        read_points(file)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("cosine", {}, "needs its total steps"),
        ("wsd", {"total_steps": 100}, "decay steps are needed"),
        ("cosine", {"total_steps": 100, "decay_steps": 3}, "no decay steps"),
        ("cosine", {"total_steps": 100, "warmup_steps": 100}, "do not fit into 100"),
        ("wsd", {"total_steps": 100, "warmup_steps": 50, "decay_steps": 51}, "do not fit into 100"),
        ("constant", {"min_ratio": 0.1}, "no least learning rate"),
        ("cosine", {"total_steps": 100, "min_ratio": 2.0}, "min_ratio"),
        ("constant", {"peak": None}, "no learning rate"),
        ("constant", {"peak": math.nan}, "peak"),
        ("constant", {"peak": 0.0}, "peak"),
        ("triangle", {}, "one of: constant"),
        ("lr.csv", {}, "drop --lr"),
    ],
)
def test_a_bad_schedule_of_rates_is_refused(kind: str, options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        rates(kind, **options)


@given(
    st.sampled_from([("linear", {}), ("cosine", {"min_ratio": 0.3}), ("wsd", {"decay_steps": 20}), ("inverse-sqrt", {})]),
    st.integers(0, 60),
    st.integers(0, 99),
    st.floats(1e-5, 2 * PEAK),
)
def test_settling_is_what_brute_force_finds(kind: tuple, warmup: int, start: int, limit: float) -> None:
    schedule = rates(kind[0], warmup_steps=warmup, total_steps=100, **kind[1])
    first = max(start, warmup)
    fits = [s for s in range(first, 100) if all(lr_at(schedule, t) <= limit for t in range(s, 100))]
    assert settles(schedule, limit, start) == (fits[0] if fits else None)
    assert highest_from(schedule, start) == max(lr_at(schedule, s) for s in range(start, 100))


def test_default_is_the_papers() -> None:
    plan = grow(48)
    assert [(p.step, p.latest, len(p.active)) for p in plan.phases] == [
        (0, 0, 24), (2000, 2500, 30), (2500, 3000, 36), (3000, 3500, 42), (3500, 4000, 48),
    ]  # fmt: skip
    assert plan.phases[1].unlock == list(range(24, 30))
    assert [len(plan.locked_at(s)) for s in (0, 1999, 2000, 3499, 3500, 10**9)] == [24, 24, 18, 6, 0, 0]
    assert {p.predicted_rho for p in plan.phases} == {p.lr for p in plan.phases} == {None}


@pytest.mark.parametrize(
    ("depth", "start", "order", "active", "queue"),
    [
        (6, 3, "last", [0, 1, 2], [3, 4, 5]),
        (6, 2, "first", [4, 5], [3, 2, 1, 0]),
        (6, 3, "interleaved", [0, 2, 4], [1, 3, 5]),
        (7, 3, "interleaved", [0, 2, 4], [1, 3, 5, 6]),
        (8, 2, "interleaved", [0, 4], [1, 2, 3, 5, 6, 7]),
        (8, 6, "interleaved", [0, 1, 2, 4, 5, 6], [3, 7]),
    ],
)
def test_orders(depth: int, start: int, order: str, active: list[int], queue: list[int]) -> None:
    assert joining(depth, start, order) == (active, queue)  # type: ignore[arg-type]


@st.composite
def plans(draw: st.DrawFn) -> Schedule:
    depth = draw(st.integers(2, 60))
    start = draw(st.integers(1, depth - 1))
    return grow(
        depth,
        start=start,
        groups=draw(st.none() | st.integers(1, depth - start)),
        interval=draw(st.integers(1, 1000)),
        warmup_steps=draw(st.integers(1, 5000)),
        order=draw(st.sampled_from(["last", "first", "interleaved"])),
    )


@given(plans())
def test_every_plan_reaches_every_block_once(plan: Schedule) -> None:
    joined = [*plan.phases[0].active, *(b for p in plan.phases[1:] for b in p.unlock)]
    assert sorted(joined) == list(range(plan.depth))
    assert plan.phases[-1].active == list(range(plan.depth))
    sizes = [len(p.unlock) for p in plan.phases[1:]]
    assert max(sizes) - min(sizes) <= 1
    for a, b in pairwise(plan.phases):
        assert (a.step < b.step, b.active) == (True, sorted({*a.active, *b.unlock}))
        assert plan.locked_at(b.step - 1) == plan.locked_at(a.step) == set(range(plan.depth)) - set(a.active)
    assert [p.latest for p in plan.phases[1:-1]] == [p.step for p in plan.phases[2:]]
    assert Schedule.model_validate_json(plan.to_json()) == plan


@given(plans())
def test_ranges_say_the_same_blocks(plan: Schedule) -> None:
    for phase in plan.phases:
        said: list[int] = []
        for part in ranges(phase.active).split(", "):
            span, _, stride = part.partition("/")
            first, _, last = span.partition("-")
            said += range(int(first), int(last or first) + 1, int(stride or 1))
        assert said == phase.active
    assert ranges([]) == "-"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 1}, "0 of 1 blocks"),
        ({"depth": 4, "start": 0}, "0 of 4 blocks"),
        ({"depth": 4, "start": 4}, "nothing to schedule"),
        ({"depth": 4, "groups": 3}, "2 locked blocks do not make 3 groups"),
        ({"depth": 4, "warmup_steps": 0}, "step 0"),
        ({"depth": 4, "total_steps": 2500}, "join at step 2500, and the run ends at 2500"),
    ],
)
def test_impossible_numbers_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        grow(**options)
    assert caught.value.hint


def test_groups_differ_by_at_most_one() -> None:
    assert [len(g) for g in split(range(10), 4)] == [2, 3, 2, 3]
    assert [len(g) for g in split(range(3), None)] == [1, 1, 1]


# --- from a report


def measured(source: Measured, curve: str, **values: object) -> Measured:
    """The report with a curve of given rho by depth ("4": None drops the depth, a string sets a status)."""
    report = source.report
    entries: list[DepthEstimate] = []
    for entry in getattr(report.cumulative, curve):
        value = values.get(f"d{entry.depth}", entry.rho)
        if isinstance(value, str):
            entries.append(entry.model_copy(update={"status": value}))
        elif value is not None:
            entries.append(entry.model_copy(update={"rho": value}))
    cumulative = report.cumulative.model_copy(update={curve: entries})
    return Measured(Report.model_validate(report.model_copy(update={"cumulative": cumulative}).model_dump()))


def test_growth_from_a_real_report(init: Measured) -> None:
    lr = rates("cosine", 0.01, warmup_steps=100, total_steps=600)
    plan = grow_from(init, lr=lr)
    rho = {e.depth: e.rho for e in init.report.cumulative.truncated}
    assert (plan.mode, plan.lock, plan.depth, plan.margin) == ("grow", "zero-output", 8, 0.8)
    assert plan.blocks == [f"model.layers.{i}" for i in range(8)]
    assert plan.provenance.report == str(ASSETS / "init.json")
    assert plan.provenance.report_sha256
    # 0.231 and 0.299 at lr 0.003: at the peak of 0.01, three blocks are under 0.8 and four over it.
    assert [len(p.active) for p in plan.phases] == [3, 4, 5, 6, 8]
    assert plan.phases[0].predicted_rho == pytest.approx(rho[3] / 0.3)
    assert plan.phases[0].lr == 0
    for phase in plan.phases[1:]:
        per_lr = rho[len(phase.active)] / 0.003  # type: ignore[operator]
        # The first step that fits: there it does, one step before it does not.
        assert per_lr * lr_at(lr, phase.step) == pytest.approx(phase.predicted_rho)
        assert phase.predicted_rho <= 0.8 < per_lr * lr_at(lr, phase.step - 1)  # type: ignore[operator]
    assert {f.code for f in plan.findings} == {"lambda-held", "estimated-preconditioner"}


@given(st.floats(0.0005, 0.02), st.floats(0.3, 1.2), st.integers(1, 3), st.sampled_from(["linear", "cosine"]))
def test_no_planned_step_is_over_the_margin(peak: float, margin: float, groups: int, kind: str) -> None:
    source = Measured(load_report(ASSETS / "init.json"))
    lr = rates(kind, peak, warmup_steps=20, total_steps=300)
    rho = {e.depth: e.rho for e in source.report.cumulative.truncated}
    fits = [k for k in range(1, 9) if rho[k] * peak / 0.003 <= margin]  # type: ignore[operator]
    if not fits or 0 < 8 - fits[-1] < groups:
        with pytest.raises(CurvError):
            grow_from(source, lr=lr, margin=margin, groups=groups)
        return
    plan = grow_from(source, lr=lr, margin=margin, groups=groups)
    assert len(plan.phases[0].active) == fits[-1]
    for step in range(300):
        depth = plan.depth - len(plan.locked_at(step))
        assert rho[depth] * lr_at(lr, step) / 0.003 <= margin * (1 + 1e-9)  # type: ignore[operator]


def test_a_full_depth_that_fits_needs_no_warm_up(init: Measured) -> None:
    plan = grow_from(init, lr=rates(peak=0.003, warmup_steps=100))
    assert [(p.step, len(p.active)) for p in plan.phases] == [(0, 8)]
    assert "no-warm-up-needed" in {f.code for f in plan.findings}


@pytest.mark.parametrize(("peak", "kind"), [(0.03, "cosine"), (0.01, "constant")])
def test_the_learning_rate_that_an_error_names_fits(init: Measured, peak: float, kind: str) -> None:
    total = 600 if kind == "cosine" else None
    with pytest.raises(CurvError) as caught:
        grow_from(init, lr=rates(kind, peak, warmup_steps=100, total_steps=total))
    said = float(caught.value.hint.split("at most " if kind == "cosine" else "fall to ")[1].split()[0])
    assert said == pytest.approx({"cosine": 0.0206, "constant": 0.00801}[kind])
    plan = grow_from(init, lr=rates("cosine", said, warmup_steps=100, total_steps=600))
    assert len(plan.phases[0].active) == {"cosine": 1, "constant": 4}[kind]


def test_a_group_that_never_fits_is_an_error_with_the_rate(init: Measured) -> None:
    lr = rates("cosine", 0.01, warmup_steps=100, total_steps=600, min_ratio=0.5)
    with pytest.raises(CurvError, match=r"8 blocks never fit .* fall to 0\.00443"):
        grow_from(init, lr=lr)


@pytest.mark.parametrize("status", ["unconverged", "non-finite", "asymmetric", "inconsistent", "empty", None])
def test_a_curve_that_is_not_converged_is_refused(init: Measured, hot: Measured, status: str | None) -> None:
    lr = rates(peak=0.003)
    with pytest.raises(InputError, match=rf"truncated rho at depth 5 \({status or 'missing'}\)"):
        grow_from(measured(init, "truncated", d5=status), lr=lr)
    with pytest.raises(InputError, match=rf"restricted rho at depth 0 \({status or 'missing'}\)"):
        freeze(measured(hot, "restricted", d0=status), lr=lr)


def test_depth_zero_of_the_cut_network_is_not_needed(init: Measured) -> None:
    assert grow_from(measured(init, "truncated", d0="unconverged"), lr=rates(peak=0.003, warmup_steps=9))


def test_groups_that_fit_at_once_join_one_step_apart(init: Measured, tmp_path: Path) -> None:
    file = tmp_path / "lr.csv"
    file.write_text("step,lr\n0,0.001\n100,0.01\n300,0.004\n")
    plan = grow_from(init, lr=rates(str(file), None))
    assert [p.step for p in plan.phases] == [0, 300, 301, 302, 303]


def test_negative_curvature_sets_no_limit(init: Measured) -> None:
    plan = grow_from(measured(init, "truncated", d8=-1.0), lr=rates(peak=1.0, warmup_steps=9))
    assert [len(p.active) for p in plan.phases] == [8]
    assert plan.phases[0].predicted_rho < 0  # type: ignore[operator]


def test_a_cut_trained_network_is_warned_of(hot: Measured) -> None:
    plan = grow_from(hot, lr=rates(peak=0.0159, warmup_steps=9))
    assert plan.findings[0].code == "cut-sharper"
    assert "rho 2.9 against 1.51" in plan.findings[0].message


# --- a run that resumes


def test_freezing_follows_the_restricted_curve(hot: Measured) -> None:
    lr = rates("cosine", 0.05, warmup_steps=100, total_steps=600)
    plan = freeze(hot, lr=lr)
    assert (plan.mode, plan.lock, plan.phases[0].step, plan.phases[0].active) == ("freeze", "no-update", 60, [])
    # Step 60 is inside warm-up: what trains has to survive the peak that is still ahead, 0.05 and not 0.03.
    restricted = {e.depth: e.rho for e in hot.report.cumulative.restricted}
    assert plan.phases[0].predicted_rho == pytest.approx(restricted[0] * 0.05 / 0.03)
    assert plan.phases[0].lr == pytest.approx(0.03)
    assert [len(p.active) for p in plan.phases] == [0, 2, 4, 6, 8]
    for phase in plan.phases[1:]:
        assert restricted[len(phase.active)] * lr_at(lr, phase.step) / 0.03 <= 0.8
    assert not {"lr-differs", "released-over-margin"} & {f.code for f in plan.findings}


def test_a_prefix_goes_on_training(hot: Measured) -> None:
    plan = freeze(hot, lr=rates(peak=0.03), margin=1.45)
    assert plan.phases[0].active == [0, 1]
    # The same margin with the peak of 0.05 still ahead: at 0.03 the two would do, and soon they would not.
    ahead = rates("cosine", 0.05, warmup_steps=100, total_steps=600)
    assert freeze(hot, lr=ahead, margin=1.45).phases[0].active == []


def test_a_constant_rate_releases_by_the_clock_and_says_so(hot: Measured) -> None:
    plan = freeze(hot, lr=rates(peak=0.03), interval=100, hold=40)
    assert [p.step for p in plan.phases] == [60, 100, 200, 300, 400]
    assert plan.phases[-1].predicted_rho == pytest.approx(hot.report.full.rho)
    assert plan.findings[0].code == "released-over-margin"
    assert "up to 1.51, 1.9 times the margin" in plan.findings[0].message
    assert freeze(hot, lr=rates(peak=0.03), interval=100).phases[1].step == 160
    with pytest.raises(UsageError, match="join at step 2060, and the run ends at 1000"):
        freeze(hot, lr=rates(peak=0.03, total_steps=1000))


def test_a_calm_run_needs_no_freezing(hot: Measured) -> None:
    plan = freeze(hot, lr=rates(peak=0.01))
    assert [(p.step, len(p.active)) for p in plan.phases] == [(60, 8)]
    assert {"nothing-to-freeze", "lr-differs"} <= {f.code for f in plan.findings}


def test_freezing_refusals(hot: Measured, init: Measured) -> None:
    with pytest.raises(CurvError, match=r"embedding and head alone have rho 6\.04; an lr of at most 0\.132"):
        freeze(hot, lr=rates(peak=1.0))
    assert freeze(hot, lr=rates(peak=0.132)).phases[0].active == []
    with pytest.raises(InputError, match="does not say at which step"):
        freeze(init, lr=rates())
    with pytest.raises(UsageError, match="at step 60, and the schedule ends at 60"):
        freeze(hot, lr=rates("linear", total_steps=60))
    with pytest.raises(CurvError, match="never fit"):
        freeze(hot, lr=rates("cosine", 0.05, warmup_steps=100, total_steps=600, min_ratio=0.5))


def test_no_learning_rate_is_no_zero(hot: Measured) -> None:
    optimizer = hot.report.optimizer.model_copy(update={"lr": None})
    with pytest.raises(InputError, match="no learning rate"):
        freeze(Measured(hot.report.model_copy(update={"optimizer": optimizer})), lr=rates())


# --- the picture


def test_the_picture_shows_the_prediction(init: Measured) -> None:
    lr = rates("cosine", 0.01, warmup_steps=100, total_steps=600)
    plan = grow_from(init, lr=lr)
    drawn = series(plan)
    rho = dict(zip(*drawn["rho"], strict=True))
    depth = dict(zip(*drawn["depth"], strict=True))
    for phase in plan.phases[1:]:
        assert rho[phase.step] == pytest.approx(phase.predicted_rho)
        assert depth[phase.step] - depth[phase.step - 1] == len(phase.unlock)
    assert rho[100] == pytest.approx(plan.phases[0].predicted_rho) == max(v for s, v in rho.items() if s < 247)
    assert dict(zip(*drawn["lr"], strict=True))[100] == 0.01
    assert plot(plan, "png").startswith(b"\x89PNG")
    assert b"<svg" in plot(plan, "svg")


def test_the_picture_of_depth_alone_has_no_prediction() -> None:
    assert set(series(grow(48))) == {"depth"}
    assert set(series(grow(48, lr=rates()))) == {"depth", "lr"}
    assert plot(grow(48, groups=24), "pdf").startswith(b"%PDF")
