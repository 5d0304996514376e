"""The verdict on a run: from points and a log, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tracks import asset, at, failed, track

from curvcli.documents import Finding, LossCourse, Report, Rule, RunVerdict, StableLr, Track, TrainingStep
from curvcli.judge.findings import explain
from curvcli.judge.gate import decide
from curvcli.judge.readings import ReportReadings, track_readings
from curvcli.judge.run import judge_run, judge_track, restart_lr, run_findings


def log(losses: Sequence[float], lr: float = 1e-3) -> list[TrainingStep]:
    return [TrainingStep(step=i + 1, loss=float(loss), lr=lr) for i, loss in enumerate(losses)]


FINE: list[float] = np.linspace(5, 2, 100).tolist()
BROKEN: list[float] = [*np.linspace(5, 2, 60).tolist(), *[4.0] * 40]


def calm(step: int, scale: float = 1.0, **data: Any) -> Report:
    report = at(asset("calm"), step, scale)
    return report.model_copy(update={"data": report.data.model_copy(update=data)})


def unstable(step: int, scale: float = 10.0) -> Report:
    return at(asset("hot"), step, scale).model_copy(update={"verdict": "unstable"})


def verdict(points: Sequence[Any], losses: Sequence[float] = FINE, **given: Any) -> RunVerdict:
    found = judge_track(track(points, log=log(losses, **given)))
    assert found is not None
    return found


def test_a_healthy_run_goes_on() -> None:
    found = verdict([calm(20), calm(60), calm(100)])
    assert (found.name, found.action, found.trend, found.step) == ("healthy", "go on", "flat", None)
    assert found.worst_rho == asset("calm").full.rho
    assert run_findings(found) == []


@pytest.mark.parametrize(("scale", "trend"), [(1.3, "rising"), (0.7, "falling"), (1.1, "flat")])
def test_trend(scale: float, trend: str) -> None:
    assert verdict([calm(20), calm(60), calm(100, scale)]).trend == trend
    assert verdict([calm(20), calm(100, scale)]).trend is None


def test_step_0_is_early_and_counts_for_nothing() -> None:
    assert verdict([unstable(0), unstable(20), calm(60), calm(100)]).name == "healthy"
    assert verdict([unstable(18), unstable(20), calm(60), calm(100)]).name == "hot"


def test_a_wrecked_run_goes_back_to_the_newest_good_checkpoint() -> None:
    points = [calm(20), calm(40), unstable(55), failed(58), calm(80, 0.01), calm(100, 0.01)]
    found = verdict(points, BROKEN)
    assert (found.name, found.action, found.step) == ("wrecked", "go back", 61)
    # Neither the one past the edge, nor the one that could not be read.
    assert (found.good_step, found.good_checkpoint) == (40, "run/checkpoint-40")
    assert "run/checkpoint-40 (step 40)" in found.advice
    assert [(f.code, f.severity) for f in run_findings(found)] == [("run-wrecked", "error")]
    assert verdict([unstable(40), calm(100, 0.01)], BROKEN).good_step == 40
    late = track([calm(80), calm(100)], log=log(BROKEN))
    found = judge_run([calm(80), calm(100)], late.log, places=[("run/checkpoint-20", 20), ("run/checkpoint-90", 90)])
    assert (found.action, found.good_step) == ("go back", 20)
    again = judge_track(late.model_copy(update={"verdict": found}))
    assert again == found
    bare = judge_track(late)
    assert bare is not None
    assert (bare.action, bare.good_step) == ("stop", None)


DATA = "look first at what came at that step: the data"


def test_a_wreck_below_the_edge_sends_one_to_the_data_first() -> None:
    lr = calm(40).optimizer.lr
    assert lr is not None
    assert 0.8 / 1.5 < _rho(calm(40)) < 0.8
    found = verdict([calm(20), calm(40), calm(100, 0.01)], BROKEN, lr=lr)
    assert (found.name, found.action) == ("wrecked", "go back")
    assert DATA in found.advice
    # Not where one before it was past the edge, where none of them was measured, or where the rate grew over that since.
    assert DATA not in verdict([unstable(20), calm(40), calm(100, 0.01)], BROKEN, lr=lr).advice
    assert DATA not in verdict([calm(20).model_copy(update={"verdict": "edge"}), calm(40)], BROKEN, lr=lr).advice
    assert DATA not in verdict([calm(20), calm(40), calm(100, 0.01)], BROKEN, lr=1.5 * lr).advice
    late = track([calm(100)], log=log(BROKEN, lr=lr))
    assert DATA not in judge_run([calm(100)], late.log, places=[("run/checkpoint-40", 40)]).advice
    # Nor where none is old enough to mean anything.
    assert DATA not in verdict([calm(5), calm(100, 0.01)], BROKEN, lr=lr).advice


def test_learning_rate_to_restart_with() -> None:
    """Closed form: lr / rho, and half of what it failed at."""
    report = calm(40)
    lr, rho = report.optimizer.lr, report.full.rho
    assert lr is not None
    assert rho is not None
    assert restart_lr(report, None) == pytest.approx(lr / rho)
    assert restart_lr(report, 1e9) == pytest.approx(lr / rho)
    assert restart_lr(report, lr) == pytest.approx(min(lr / 2, lr / rho))
    assert restart_lr(None, 0.4) == pytest.approx(0.2)
    low = StableLr(value=lr, low=lr / 7, high=None, confidence=0.8, group="adaptive", uncovered=[], ratio=1.0)
    assert restart_lr(report.model_copy(update={"stable_lr": low}), None) == pytest.approx(lr / 7)
    assert restart_lr(report.model_copy(update={"stable_lr": low}), lr / 5) == pytest.approx(lr / 10)
    assert restart_lr(None, None) is None
    uncertain = report.model_copy(update={"full": report.full.model_copy(update={"status": "unconverged"})})
    assert restart_lr(uncertain, None) is None
    found = verdict([report, calm(100)], BROKEN, lr=lr)
    assert found.restart_lr == pytest.approx(min(lr / 2, lr / rho))
    assert f"at most {found.restart_lr:.2g}" in found.advice


def test_a_lost_network_vouches_for_no_rate() -> None:
    """Flat, its rho is tiny, and the rate at which that would be 1 enormous."""
    lost = calm(100, 0.01).model_copy(update={"course": LossCourse(name="collapsed")})
    assert restart_lr(lost, 0.05) == 0.025
    assert restart_lr(lost, None) is None


def test_a_loss_that_stands_still_while_lambda_falls_by_decades() -> None:
    flat, loss = [4.0] * 100, {"loss": 4.0}
    assert verdict([calm(20, **loss), calm(100, 0.02, **loss)], flat).name == "healthy"
    found = verdict([calm(20, **loss), calm(100, 0.009, **loss)], flat)
    assert (found.name, found.step, found.action) == ("collapsed", 20, "stop")
    # One that got better, and one that uses context, have not died.
    assert verdict([calm(20, loss=4.2), calm(100, 0.009, **loss)], flat).name == "healthy"
    assert verdict([calm(20, **loss), calm(100, 0.009, **loss, unigram_loss=5.0)], flat).name == "healthy"


@pytest.mark.parametrize("step", [0, 1, 11])
def test_the_first_steps_are_early_whatever_rho_is(step: int) -> None:
    found = verdict([unstable(step)], [5.0] * step)
    assert (found.name, found.action) == ("early", "watch")


def test_hot_is_of_the_newest_or_of_most() -> None:
    assert verdict([calm(20), unstable(100)]).name == "hot"
    found = verdict([unstable(20), unstable(40), calm(100)])
    assert (found.name, found.action, found.step) == ("hot", "lower the lr", 20)
    assert found.worst_step in (20, 40)
    hottest = unstable(20)
    assert found.restart_lr == pytest.approx((hottest.optimizer.lr or 0) / _rho(hottest))
    # A bracket that spans the limit: far past the edge counts, a little does not.
    vague = [unstable(s).model_copy(update={"verdict": "unresolved"}) for s in (40, 60)]
    assert verdict([calm(20), *vague, calm(100)]).name == "hot"
    near = [unstable(s, 1.0).model_copy(update={"verdict": "unresolved"}) for s in (40, 60)]
    assert 1.25 < _rho(near[0]) < 2.5
    assert verdict([calm(20), *near, calm(100)]).name == "healthy"
    # Fewer than a third.
    cool = [calm(step) for step in (20, 50, 60, 70, 100)]
    assert verdict([unstable(15), unstable(18), *cool]).name == "healthy"
    # One crossing among several, and those of the first steps, are none.
    assert verdict([calm(20), unstable(40), calm(100)]).name == "healthy"
    assert verdict([unstable(1), unstable(5), calm(40), calm(100)]).name == "healthy"


def _rho(report: Report) -> float:
    assert report.full.rho is not None
    return report.full.rho


def test_nothing_certified_is_unresolved() -> None:
    found = verdict([calm(20), at(asset("calm"), 100, status="unconverged")])
    assert (found.name, found.action, found.worst_step) == ("unresolved", "watch", 20)
    assert judge_track(track([failed(20)])) is None


def test_a_wreck_comes_before_everything_else() -> None:
    assert verdict([calm(20), at(asset("calm"), 100, status="unconverged")], BROKEN).name == "wrecked"
    assert verdict([calm(20), unstable(100)], BROKEN).name == "wrecked"


def outcomes(document: Track, *rules: tuple[str, float | None]) -> dict[str, str]:
    gate = decide(
        [Rule(name=name, limit=limit, source="x") for name, limit in rules],
        track_readings(document),
        document.points[-1].report,
        path="run",
        kind="track",
    )
    return {**{o.rule: o.outcome for o in gate.outcomes}, "gate": gate.outcome}


def test_rules_on_the_run() -> None:
    fine, broken = (track([calm(20), calm(100)], log=log(losses)) for losses in (FINE, BROKEN))
    rules = [("max-rho", 100.0), ("max-loss-rise", 10.0), ("require-healthy", None)]
    assert outcomes(fine, *rules) == dict.fromkeys([*(name for name, _ in rules), "gate"], "passed")
    assert outcomes(broken, *rules) == {
        "max-rho": "passed", "max-loss-rise": "broken", "require-healthy": "broken", "gate": "broken",
    }  # fmt: skip
    # Without a rule of its own, too; and a healthy run has no outcome that nobody asked for.
    assert outcomes(broken, rules[0]) == {"max-rho": "passed", "require-healthy": "broken", "gate": "broken"}
    assert outcomes(fine, rules[0]) == {"max-rho": "passed", "gate": "passed"}
    hot = track([calm(20), unstable(100)], log=log(FINE))
    assert outcomes(hot, rules[2])["require-healthy"] == "broken"
    assert "require-healthy" not in outcomes(hot, ("max-rho", 1e9))
    assert outcomes(track([calm(1)]), rules[2])["require-healthy"] == "unresolved"
    assert outcomes(track([calm(100)]), rules[1])["max-loss-rise"] == "unresolved"


def test_a_lost_network_has_the_first_word() -> None:
    lost = judge_run([calm(20), calm(100)], log(BROKEN)).course
    report = calm(100).model_copy(update={"course": lost, "verdict": "unresolved"})

    def said(report: Report) -> list[Finding]:
        return explain(report, idle=0, left_out=0, notes={})

    first = said(report)[0]
    assert (first.code, first.severity) == ("loss-over-best", "error")
    # Also where the verdict warns: its sentence has odds, and a lost network has none ("a chance of 0%").
    hot = said(report.model_copy(update={"verdict": "hot", "odds": None}))
    assert hot[0].code == "loss-over-best"
    assert "chance" not in " ".join(f.message for f in hot)
    # Where curvature has an error of its own, that stays the headline and the loss comes next.
    assert [f.code for f in said(report.model_copy(update={"verdict": "unstable"}))[:2]] == ["unstable", "loss-over-best"]
    assert ReportReadings(report).run().name == "wrecked"


def test_what_is_asymmetric_asks_for_a_look_and_for_no_products() -> None:
    """As float32's products of a network that has blown up are: more of them are no better."""
    report = calm(100)
    layers = [layer.model_copy(update={"status": "asymmetric", "eigenvalue": None, "rho": None}) for layer in report.layers]
    full = report.full.model_copy(update={"status": "asymmetric", "eigenvalue": None, "rho": None})
    given = report.model_copy(update={"full": full, "body": None, "layers": layers, "verdict": "unresolved"})
    found = {f.code: f.message for f in explain(given, idle=0, left_out=0, notes={})}
    assert "blown up" in found["full-asymmetric"]
    assert "unconverged-parts" not in found
    layers[0] = layers[0].model_copy(update={"status": "unconverged"})
    found = {f.code: f.message for f in explain(given.model_copy(update={"layers": layers}), idle=0, left_out=0, notes={})}
    assert "layer 0;" in found["unconverged-parts"]


def test_a_tolerance_below_rounding_is_what_has_to_give() -> None:
    """`--tolerance 1e-12` ended with a residual of 1e-7 of lambda, and the hint was more products, which change nothing."""
    report = calm(100)
    value = report.full.eigenvalue or 0.0

    def said(residual: float, ceiling: float) -> str:
        least = {"status": "unconverged", "residual": residual * value, "ceiling": ceiling * value}
        full = report.full.model_copy(update=least)
        layers = [report.layers[0].model_copy(update={**least, "eigenvalue": value}), *report.layers[1:]]
        given = report.model_copy(update={"full": full, "body": None, "layers": layers, "verdict": "unresolved"})
        found = {f.code: f.message for f in explain(given, idle=0, left_out=0, notes={})}
        options = {
            code: found[code].split("; raise ")[1].split(":")[0] for code in ("unresolved-residual", "unconverged-parts")
        }
        assert len(set(options.values())) == 1
        return options["unresolved-residual"]

    assert said(1e-7, 1.01) == "--tolerance"
    assert said(1e-4, 1.01) == said(1e-7, 1.5) == "--max-hvps"  # a ceiling far above needs products
