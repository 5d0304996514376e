"""Reports of Lion, Muon, and Muon beside AdamW: against a dense Hessian, over depth, and what is said of them."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from normalised import Lion, MuonWithAuxAdam, split
from rich.console import Console
from torch import Tensor

import curvcli
from curvcli.analysis.measured import InNorm
from curvcli.analysis.steepest import Steep
from curvcli.curvature.balls import MaxNorm
from curvcli.curvature.steepest import FrankWolfe
from curvcli.documents import Report, Rule, Steepest, Track, TrackPoint
from curvcli.errors import CurvError, OutOfTime
from curvcli.judge.compare import compare
from curvcli.judge.gate import judge as judge_rules
from curvcli.judge.readings import ReportReadings
from curvcli.judge.run import judge_run
from curvcli.render.compare import to_markdown
from curvcli.render.headline import head, verdict_line
from curvcli.render.largest_lr import action
from curvcli.render.series import report_series, track_series
from curvcli.render.table import show
from curvcli.render.track_plot import steps
from curvcli.render.track_table import show as show_track

LR = 0.02


def analysed(optimizer: Any, net: models.Net, batches: list[Any], **options: Any) -> Report:
    return curvcli.analyze(net, models.loss, batches, optimizer, weights=models.weights(batches), **options)


@pytest.fixture(scope="module")
def lion() -> SimpleNamespace:
    net, batches = models.Net(seed=2, blocks=2, width=4), models.data()
    optimizer = Lion(net.parameters(), lr=LR)
    models.train(net, optimizer, batches, steps=30)
    return SimpleNamespace(net=net, batches=batches, optimizer=optimizer, report=analysed(optimizer, net, batches))


@pytest.fixture(scope="module")
def hybrid() -> SimpleNamespace:
    net, batches = models.Net(seed=3, blocks=2, width=4), models.data()
    optimizer = MuonWithAuxAdam(*split(net), lr=LR, rest_lr=3e-3)
    models.train(net, optimizer, batches, steps=30)
    report = analysed(optimizer, net, batches, tolerance=1e-4)
    return SimpleNamespace(net=net, batches=batches, optimizer=optimizer, report=report)


def flat_gradient(net: models.Net, batches: list[Any]) -> dict[str, Tensor]:
    ids, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    named = dict(net.named_parameters())
    return dict(zip(named, torch.autograd.grad(models.loss(net, (ids, targets)), list(named.values())), strict=True))


def flipped(h: Tensor, tries: int = 60) -> float:
    """The largest s'Hs that flipping one sign at a time finds, from many random vectors: no gradient, no Frank-Wolfe."""
    best, generator = -float("inf"), torch.Generator().manual_seed(0)
    for _ in range(tries):
        s = torch.randint(0, 2, (len(h),), generator=generator).to(h) * 2 - 1
        while True:
            gains = -4 * s * (h @ s) + 4 * h.diagonal()
            place = int(gains.argmax())
            if gains[place] <= 1e-12:
                break
            s[place] = -s[place]
        best = max(best, float(s @ h @ s))
    return best


def test_lions_s_and_z_against_a_dense_hessian(lion: SimpleNamespace) -> None:
    found, names = lion.report.steepest, [n for n, _ in lion.net.named_parameters()]
    truth = flipped(models.dense_hessian(lion.net, lion.batches, names))
    assert 0.85 * truth < found.sharpness < 1.001 * truth
    dual = sum(float(g.abs().sum()) for g in flat_gradient(lion.net, lion.batches).values())
    assert found.dual_norm == pytest.approx(dual, rel=1e-6)
    assert found.z == pytest.approx(LR * found.sharpness / (2 * dual), rel=1e-6)
    assert (found.norm, found.lr, found.status, found.rest) == ("max", LR, "settled", 0)
    assert [name for name, _ in found.starts] == ["gradient", "momentum", "random"]
    assert found.hvps <= 24
    assert 0 <= found.spread < 1
    full = lion.report.full
    assert (full.status, full.eigenvalue, full.rho, lion.report.optimizer.threshold) == ("empty", None, None, None)
    assert full.steepest.z == found.z


def test_over_depth_s_never_falls_and_no_part_is_above_the_whole(lion: SimpleNamespace, hybrid: SimpleNamespace) -> None:
    for report in (lion.report, hybrid.report):
        depths = [e.steepest.sharpness for e in report.cumulative.restricted if e.steepest]
        assert depths == sorted(depths)
        assert depths[-1] == report.steepest.sharpness
        assert all(layer.steepest.sharpness <= report.steepest.sharpness for layer in report.layers)
        again = Report.read(report.to_json())
        assert again == report
    assert lion.report.cumulative.restricted[0].steepest == lion.report.ends.steepest
    assert hybrid.report.ends.steepest is None  # embedding and head are Adam's
    assert hybrid.report.cumulative.restricted[0].steepest is None


def test_a_hybrids_rho_is_of_adams_part_and_z_of_muons(hybrid: SimpleNamespace) -> None:
    net, report = hybrid.net, hybrid.report
    inside = [n for n, p in net.named_parameters() if n.startswith("layers.") and p.dim() == 2]
    names = [n for n, _ in net.named_parameters() if n not in inside]
    state = {n: hybrid.optimizer.state[p] for n, p in net.named_parameters()}
    roots = []
    for n in names:
        v, t = state[n]["exp_avg_sq"], state[n]["step"]
        p = (1 - 0.9**t) * ((v / (1 - 0.95**t)).sqrt() + 1e-10)
        roots.append(torch.where(v == 0, torch.zeros_like(p), p.rsqrt()).reshape(-1))
    scale = torch.cat(roots)
    dense = models.dense_hessian(net, hybrid.batches, names)
    assert report.full.eigenvalue == pytest.approx(models.top(scale[:, None] * dense * scale), rel=1e-4)
    assert report.full.rho == pytest.approx(report.full.eigenvalue / (2 / 3e-3 * 1.9 / 0.1))
    dual = sum(float(torch.linalg.matrix_norm(flat_gradient(net, hybrid.batches)[n], "nuc")) for n in inside)
    assert report.steepest.dual_norm == pytest.approx(dual, rel=1e-6)
    assert report.steepest.z == pytest.approx(LR * report.steepest.sharpness / (2 * dual))
    assert (report.steepest.tensors, report.steepest.rest) == (4, sum(v.numel() for v in roots))
    # No direction of the ball of spectral norm 1 reaches what the top eigenvalue times its largest squared length would.
    top = models.top(models.dense_hessian(net, hybrid.batches, inside))
    assert top <= report.steepest.sharpness <= top * 4 * 4
    # The next update is of all, in units of the learning rate that the report quotes.
    gradients, step, lr = flat_gradient(net, hybrid.batches), {}, report.optimizer.lr
    for n, _ in net.named_parameters():
        if n in inside:
            u, _, vh = torch.linalg.svd(state[n]["momentum_buffer"], full_matrices=False)
            step[n] = u @ vh * LR / lr
        else:
            v, t = state[n]["exp_avg_sq"], state[n]["step"]
            root = (v / (1 - 0.95**t)).sqrt() + 1e-10
            step[n] = state[n]["exp_avg"] / (1 - 0.9**t) / root * 3e-3 / lr
    slope = sum(float((gradients[n] * step[n]).sum()) for n in step)
    flat = torch.cat([step[n].reshape(-1) for n, _ in net.named_parameters()])
    bend = float(flat @ models.dense_hessian(net, hybrid.batches, [n for n, _ in net.named_parameters()]) @ flat)
    if slope > 0 and bend > 0:
        assert report.update.critical_lr == pytest.approx(2 * slope / bend, rel=1e-4)
    else:
        assert report.update.status == ("uphill" if slope <= 0 else "concave")


def test_what_is_said_of_a_run_without_rho(lion: SimpleNamespace) -> None:
    report = lion.report
    assert report.verdict == "unresolved"
    assert report.odds is None
    assert report.findings[0].code == f"norm-{report.steepest.reading}"
    assert "unconverged-parts" not in [f.code for f in report.findings]
    assert "Lion has no verdict" in report.findings[0].message
    assert f"Z {report.steepest.z:.3g}" in verdict_line(report)
    assert "in the max-norm" in head(report).plain
    run = judge_run([report])
    assert "Z is" in run.reasons[0]


def read_as(report: Report, **update: Any) -> Report:
    assert report.steepest is not None
    return report.model_copy(update={"steepest": report.steepest.model_copy(update=update)})


def test_each_reading_says_what_to_do(lion: SimpleNamespace) -> None:
    assert "lower the learning rate if" in action(read_as(lion.report, z=3.0, reading="past"))
    assert "lower the learning rate if" in judge_run([read_as(lion.report, z=3.0, reading="past")]).advice
    assert "do not raise" in action(read_as(lion.report, z=1.0, reading="edge"))
    assert action(read_as(lion.report, z=0.1, reading="below")).startswith("go on")
    assert "no verdict" in action(read_as(lion.report, z=None, reading="unresolved", status="unsettled"))


def test_a_stable_part_is_no_stable_run(hybrid: SimpleNamespace) -> None:
    report = hybrid.report
    assert report.generalisation.rho_high < 0.8, "the part is stable"
    assert (report.verdict, report.findings[0].code) == ("unresolved", "unresolved-part")
    assert {"rho-of-a-part", f"norm-{report.steepest.reading}"} <= {f.code for f in report.findings}
    assert (report.stable_lr, report.odds) == (None, None)
    assert "Muon's parameters, which rho is not of: Z" in head(report).plain


def rule(name: str, limit: float) -> Rule:
    return Rule(name=name, limit=limit, source="flag")  # type: ignore[arg-type]


def test_the_gate_holds_z_and_says_why_there_is_no_rho(lion: SimpleNamespace, hybrid: SimpleNamespace) -> None:
    def outcomes(report: Report, *rules: Rule) -> list[tuple[str, str]]:
        found = judge_rules(rules, ReportReadings(report), regression_tolerance=1.0)
        return [(o.outcome, o.message) for o in found]

    z = lion.report.steepest.z
    (below,), (above,) = outcomes(lion.report, rule("max-z", 2 * z)), outcomes(lion.report, rule("max-z", z / 2))
    assert (below[0], above[0]) == ("passed", "broken")
    assert below[1].endswith("a lower bound")
    assert outcomes(lion.report, rule("max-rho", 1.0)) == [("unresolved", "rho: Lion has no rho; hold Z with --max-z")]
    ((held, said),) = outcomes(hybrid.report, rule("max-rho", 1.0))
    assert (held, said.rpartition("; ")[2]) == (
        "passed",
        f"of {hybrid.report.steepest.rest:,} parameters, the other {hybrid.report.steepest.parameters:,} have none",
    )
    early = read_as(lion.report, reading="early")
    assert outcomes(early, rule("max-z", 2 * z)) == [("unresolved", "Z: too early to say anything")]
    plain = lion.report.model_copy(update={"steepest": None})
    assert "use rho" in outcomes(plain, rule("max-z", 1.0))[0][1]


def test_what_was_not_reached_is_skipped(lion: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*args: object) -> None:
        raise OutOfTime

    monkeypatch.setattr(Steep, "layer", late)
    report = analysed(lion.optimizer, lion.net, lion.batches)
    assert report.steepest is not None
    assert report.steepest.z == pytest.approx(lion.report.steepest.z)
    assert [layer.steepest.status for layer in report.layers if layer.steepest] == ["skipped", "skipped"]
    monkeypatch.setattr(Steep, "of", late)
    report = analysed(lion.optimizer, lion.net, lion.batches, depths=False)
    assert report.steepest is not None
    assert (report.steepest.status, report.steepest.z, report.steepest.reading) == ("skipped", None, "unresolved")
    assert "was not measured" in report.findings[0].message


def test_options_that_are_not_known_take_the_reading_away(lion: SimpleNamespace) -> None:
    lion.optimizer.param_groups[0]["mystery"] = 1
    report = analysed(lion.optimizer, lion.net, lion.batches, depths=False)
    del lion.optimizer.param_groups[0]["mystery"]
    assert report.steepest is not None
    assert report.steepest.reading == "unresolved"
    assert "option mystery=1" in report.findings[0].message


def test_a_resumed_run_freezes_by_z_and_a_fresh_one_is_not_planned_from_it(lion: SimpleNamespace) -> None:
    report = lion.report.model_copy(update={"checkpoint": lion.report.checkpoint.model_copy(update={"step": 30})})
    z = {e.depth: e.steepest.z for e in report.cumulative.restricted if e.steepest}
    plan = curvcli.schedule(resume=report, lr=LR, margin=2 * max(v for v in z.values() if v), total_steps=100)
    assert {"planned-by-z", "nothing-to-freeze"} <= {f.code for f in plan.findings}
    assert plan.phases[0].predicted_rho == pytest.approx(z[2])
    first = report.cumulative.restricted[1]
    assert first.steepest is not None
    skipped = first.model_copy(update={"steepest": first.steepest.model_copy(update={"z": None, "status": "skipped"})})
    curve = [report.cumulative.restricted[0], skipped, report.cumulative.restricted[2]]
    lacking = report.model_copy(update={"cumulative": report.cumulative.model_copy(update={"restricted": curve})})
    with pytest.raises(CurvError, match="no converged restricted rho at depth 1"):
        curvcli.schedule(resume=lacking, lr=LR, margin=2.0, total_steps=100)
    with pytest.raises(CurvError, match="Lion, which has no rho, and Z is not measured of a network cut short"):
        curvcli.schedule(report=report, lr=LR)


def test_a_comparison_shows_z_where_there_is_no_lambda(lion: SimpleNamespace, hybrid: SimpleNamespace) -> None:
    found = compare(lion.report, lion.report, names=("a", "b"))
    assert (found.changes[0].first_z, found.first.z) == (lion.report.steepest.z,) * 2
    assert "| part | Z A | Z B | B/A Z |" in to_markdown(found)
    both = to_markdown(compare(hybrid.report, hybrid.report, names=("a", "b")))
    assert "| B/A rho | Z A | Z B | B/A Z |" in both
    plain = lion.report.model_copy(update={"steepest": None})
    assert "| Z A" not in to_markdown(compare(plain, plain, names=("a", "b"))) or plain.full.steepest is not None


def test_pictures_and_tables_show_what_there_is(lion: SimpleNamespace, hybrid: SimpleNamespace) -> None:
    series = report_series(lion.report)
    assert series["restricted to depth"][1][-1] == lion.report.steepest.sharpness
    assert report_series(hybrid.report)["restricted to depth"][1][-1] == hybrid.report.full.eigenvalue
    points = [
        TrackPoint(
            checkpoint="a", step=step, source="measured", training_loss=None, surge=None, surged=False, message=None,
            report=lion.report,
        )
        for step in (10, 20)
    ]  # fmt: skip
    track = Track(
        run="r", points=points, log=[], surge_limit=2.0, window=5, findings=[], hvps=1, seconds=1.0,
        versions=lion.report.versions,
    )  # fmt: skip
    data = track_series(track)
    assert data["z"] == ([10, 20], [lion.report.steepest.z] * 2)
    assert steps(track).save("svg")
    console = Console(width=80, record=True, file=io.StringIO())
    show_track(track, console)
    text = console.export_text()
    assert " rho " not in text.splitlines()[5]
    assert f"{lion.report.steepest.z:.3g}" in text
    console = Console(width=80, record=True, file=io.StringIO())
    show(lion.report, console)
    assert "lambda" not in console.export_text()


def test_what_a_part_reaches_the_whole_does_too(lion: SimpleNamespace) -> None:
    """A direction of a part, with 0 elsewhere, is one of the whole's ball: a whole that came out lower had not settled."""
    found = lion.report.steepest.model_copy(update={"sharpness": 1.0, "z": 0.1, "status": "settled"})
    low, high = (Steepest(sharpness=s, dual_norm=1.0, z=0.1, hvps=1, status="settled") for s in (1.0, 1.5))
    steep = Steep.__new__(Steep)
    steep.names, steep.outer, steep.inner, steep.solver = ["a", "b", "c"], ["a"], [["b"], ["c"]], FrankWolfe()
    steep.balls, steep.gradients = dict.fromkeys("abc", MaxNorm()), dict.fromkeys("abc", torch.ones(2))
    steep.preconditioner = SimpleNamespace(ball_lr=0.1)  # type: ignore[assignment]
    steep.found = InNorm(found, ends=None, layers=[low, high], restricted={0: None, 1: low})
    steep.settle()
    assert steep.found.full.sharpness == 1.5
    assert steep.found.full.z == pytest.approx(0.1 * 1.5 / (2 * 6))
    assert (steep.found.full.status, steep.found.full.reading) == ("unsettled", "unresolved")
    assert steep.found.restricted[1] == low  # which has not the sharp layer
    steep.found = InNorm(found, layers=[high, low], restricted={1: low})
    steep.settle()
    assert steep.found.restricted[1] is not None
    assert steep.found.restricted[1].z == pytest.approx(0.1 * 1.5 / (2 * 4))
