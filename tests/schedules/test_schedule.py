"""Schedules from what was measured: growth, freezing, refusals, and their picture."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ASSETS
from rates import rates

from curvcli.documents import DepthEstimate, Finding, Report, base, load_report
from curvcli.errors import CurvError, InputError, UsageError
from curvcli.files import parse as files
from curvcli.render.schedule_plot import plot
from curvcli.render.series import schedule_series
from curvcli.schedules import Measured, freeze, grow, grow_from, lr_at


@pytest.fixture
def init() -> Measured:
    """A Llama of 8 blocks at step 0: its truncated curve rises, 0.116 at depth 1 to 0.541 at 8, at lr 0.003."""
    return Measured.read(ASSETS / "init.json")


@pytest.fixture
def hot() -> Measured:
    """sample_checkpoints/hot at step 60, lr 0.03: restricted 0.181 at depth 0, 1.41 to 1.51 from 1 to 8."""
    return Measured.read(ASSETS / "hot-60.json")


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


def test_the_digest_is_of_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that is measured again while it is planned from: the schedule names the one whose numbers it has."""
    path = tmp_path / "report.json"
    path.write_bytes(written := (ASSETS / "init.json").read_bytes())

    def read_limited(file: Path, most: int) -> bytes:
        content = files.read_limited(file, most)
        file.write_text("another report")
        return content

    monkeypatch.setattr(base, "read_limited", read_limited)
    assert Measured.read(path).sha256 == sha256(written).hexdigest()


def test_growth_from_a_real_report(init: Measured) -> None:
    lr = rates("cosine", 0.01, warmup_steps=100, total_steps=600)
    plan = grow_from(init, lr=lr)
    rho = {e.depth: e.rho for e in init.report.cumulative.truncated}
    assert (plan.mode, plan.lock, plan.depth, plan.margin) == ("grow", "zero-output", 8, 0.8)
    assert plan.blocks == [f"model.layers.{i}" for i in range(8)]
    assert plan.provenance.report == str(ASSETS / "init.json")
    assert plan.provenance.report_sha256 == sha256((ASSETS / "init.json").read_bytes()).hexdigest()
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


def test_a_plan_from_a_lost_network_says_so(hot: Measured) -> None:
    lost = Finding(code="no-context", severity="error", message="the run is collapsed")
    report = hot.report.model_copy(update={"findings": [lost, *hot.report.findings]})
    assert lost in freeze(replace(hot, report=report), lr=rates(peak=0.01)).findings


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


@pytest.mark.slow
def test_the_picture_shows_the_prediction(init: Measured) -> None:
    lr = rates("cosine", 0.01, warmup_steps=100, total_steps=600)
    plan = grow_from(init, lr=lr)
    drawn = schedule_series(plan)
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
    assert set(schedule_series(grow(48))) == {"depth"}
    assert set(schedule_series(grow(48, lr=rates()))) == {"depth", "lr"}
    assert plot(grow(48, groups=24), "pdf").startswith(b"%PDF")
