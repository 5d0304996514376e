"""The gate's rules as functions: each passes, breaks and stays unresolved, and no number makes unresolved pass."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ASSETS

from curvcli.documents import Finding, Outcome, Report, Rule, Status, VerdictName, load_report
from curvcli.documents.columns import ruled
from curvcli.judge.gate import decide, exit_code, judge, overall
from curvcli.judge.readings import NoReadings, Reading, ReportReadings


@pytest.fixture(scope="module")
def hot() -> Report:
    return load_report(ASSETS / "hot-60.gate.report.json")


@pytest.fixture(scope="module")
def calm() -> Report:
    return load_report(ASSETS / "calm-60.gate.report.json")


def change(report: Report, part: str, **fields: object) -> Report:
    return report.model_copy(update={part: getattr(report, part).model_copy(update=fields)})


def with_layers(report: Report, **statuses: str) -> Report:
    """Layers by index, as l3="unconverged"."""
    layers = [layer.model_copy(update={"status": statuses.get(f"l{layer.index}", layer.status)}) for layer in report.layers]
    return report.model_copy(update={"layers": layers})


def one(report: Report, name: str, limit: float | None = None, baseline: Report | None = None, **options: float) -> Outcome:
    rule = Rule(name=name, limit=limit, source="test")  # type: ignore[arg-type]
    (outcome,) = judge([rule], ReportReadings(report, baseline), **options)
    return outcome


def test_rho_is_held_against_its_bracket(hot: Report) -> None:
    low, high = hot.generalisation.rho_low, hot.generalisation.rho_high
    assert low is not None
    assert high is not None
    assert low < hot.full.rho < high  # type: ignore[operator]
    assert one(hot, "max-rho", high).outcome == "passed"
    assert one(hot, "max-rho", high * 0.9999).outcome == "unresolved"
    assert one(hot, "max-rho", low).outcome == "unresolved"
    broken = one(hot, "max-rho", low * 0.9999)
    assert (broken.outcome, broken.low, broken.high, broken.value) == ("broken", low, high, hot.full.rho)
    assert "measure more tokens" in one(hot, "max-rho", 1.46).message


def test_layers_are_held_against_their_residuals(hot: Report) -> None:
    sharpest = max(hot.layers, key=lambda layer: layer.rho or 0)
    assert sharpest.rho is not None
    end = sharpest.rho + sharpest.residual / hot.optimizer.threshold  # type: ignore[operator]
    assert one(hot, "max-layer-rho", end).outcome == "passed"
    assert one(hot, "max-layer-rho", sharpest.rho).outcome == "unresolved"
    broken = one(hot, "max-layer-rho", sharpest.rho * 0.9999)
    assert (broken.outcome, broken.part) == ("broken", sharpest.name)
    assert broken.low == sharpest.rho, "a Ritz value is a lower bound"
    several = one(hot, "max-layer-rho", 0.3)
    assert "; broken too: model.layers.7" in several.message


def test_others_are_named_only_where_they_are_no_pass(hot: Report) -> None:
    assert " too:" not in one(hot, "max-layer-rho", 1e6).message
    sharpest = max(layer.rho or 0 for layer in hot.layers)
    alone = one(hot, "max-layer-rho", sharpest * 0.99)
    assert alone.outcome == "broken"
    assert " too:" not in alone.message


def test_one_layer_without_a_number_is_enough_to_be_unresolved(hot: Report) -> None:
    weak = one(with_layers(hot, l3="unconverged"), "max-layer-rho", 5.0)
    assert (weak.outcome, weak.part) == ("unresolved", "model.layers.3")
    assert one(with_layers(hot, l3="unconverged"), "max-layer-rho", 1.0).outcome == "broken", "broken beats unresolved"
    assert one(with_layers(hot, l0="skipped"), "max-layer-rho", 1.0).outcome == "unresolved"


def test_layers_that_do_not_train_are_left_out_and_counted(hot: Report) -> None:
    assert one(with_layers(hot, l0="empty"), "max-layer-rho", 1.0).outcome == "passed"
    assert "1 of 9 parts do not train" in one(with_layers(hot, l0="empty"), "max-layer-rho", 1.0).message
    only = one(with_layers(hot, **{f"l{i}": "empty" for i in range(8)}), "max-layer-rho", 9.0)
    assert (only.outcome, only.part) == ("passed", "embedding, head")
    assert one(hot.model_copy(update={"layers": []}), "max-layer-rho", 9.0).outcome == "unresolved"


def test_update_ratio(hot: Report, calm: Report) -> None:
    ratio = calm.update.ratio
    assert ratio is not None
    assert one(calm, "max-update-ratio", ratio).outcome == "passed"
    assert one(calm, "max-update-ratio", ratio * 0.999).outcome == "broken"
    assert hot.update.status == "uphill"
    assert one(hot, "max-update-ratio", 1e9).outcome == "unresolved"


def test_surge_and_regression_on_the_same_shard(hot: Report, calm: Report) -> None:
    assert hot.data.sha256 == calm.data.sha256
    surge = one(hot, "max-surge", 2.0, calm)
    assert surge.outcome == "broken"
    assert surge.value == pytest.approx(hot.full.rho / calm.full.rho)  # type: ignore[operator]
    assert surge.low < surge.value < surge.high  # type: ignore[operator]
    assert one(hot, "max-surge", 2.5, calm).outcome == "passed"
    assert one(hot, "max-surge", surge.value, calm).outcome == "unresolved"
    assert one(hot, "max-surge", 2.5).outcome == "unresolved", "no baseline"

    risen = change(calm, "full", eigenvalue=calm.full.eigenvalue * 1.10)  # type: ignore[operator]
    assert one(risen, "max-regression", 11.0, calm).outcome == "passed"
    assert one(risen, "max-regression", 8.0, calm).outcome == "broken"
    assert one(risen, "max-regression", 8.9, calm).outcome == "unresolved", "10 % less the residual lies over 9.9"
    assert one(risen, "max-regression", 4.0, calm, regression_tolerance=7.0).limit == 11.0
    over = risen.full.model_copy(update={"ceiling": 1.2 * calm.full.eigenvalue})  # type: ignore[operator]
    open_above = risen.model_copy(update={"full": over})
    assert one(open_above, "max-regression", 11.0, calm).outcome == "unresolved", "up to 20 % are not ruled out"
    assert one(risen, "max-regression", 4.0, calm, regression_tolerance=7.0).outcome == "passed"
    assert one(calm, "max-regression", 0.0, calm).outcome == "passed", "itself"
    assert one(hot, "max-regression", 0.0, calm).value == pytest.approx(100 * (1903 / 13922 - 1), abs=0.1)


def test_other_data_takes_the_held_out_bracket(hot: Report, calm: Report) -> None:
    other = change(calm, "data", sha256="0" * 64)
    assert other.generalisation.held_out is not None
    loose = change(other, "generalisation", held_out=other.generalisation.held_out / 3)
    tight, wide = one(hot, "max-surge", 2.5, calm), one(hot, "max-surge", 2.5, loose)
    assert (tight.outcome, wide.outcome) == ("passed", "unresolved")
    assert wide.low < tight.low < tight.high < wide.high  # type: ignore[operator]
    nothing = change(other, "generalisation", held_out=None)
    assert one(hot, "max-surge", 100.0, nothing).outcome == "unresolved"
    assert one(hot, "max-regression", 100.0, nothing).outcome == "unresolved"


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("checkpoint", "layers", 7),
        ("optimizer", "name", "SGD"),
        ("optimizer", "preconditioner", "estimated"),
        ("full", "status", "unconverged"),
        ("full", "eigenvalue", None),
        ("full", "residual", None),
    ],
)
def test_what_does_not_compare_is_unresolved(hot: Report, calm: Report, part: str, field: str, value: object) -> None:
    for rule in ("max-surge", "max-regression"):
        assert one(hot, rule, 1e9, change(calm, part, **{field: value})).outcome == "unresolved"


def test_a_baseline_that_may_be_zero_divides_nothing(hot: Report, calm: Report) -> None:
    for value in (0.0, -1.0):
        flat = change(calm, "full", rho=value, eigenvalue=value)
        assert one(hot, "max-surge", 1e300, flat).outcome == "unresolved"
        assert one(hot, "max-regression", 1e300, flat).outcome == "unresolved"
    tiny = change(calm, "full", rho=5e-324, eigenvalue=5e-324, residual=0.0)
    outcome = one(hot, "max-surge", 1e300, tiny)  # the ratio is not finite
    assert (outcome.outcome, outcome.value) == ("unresolved", None)


def test_a_number_without_a_bracket_is_shown_without_one(hot: Report) -> None:
    assert "(" not in one(hot, "max-update-ratio", 1e6).message
    assert "(" in one(hot, "max-rho", 1e6).message


def test_findings_that_only_inform_are_left_to_the_report(hot: Report) -> None:
    found = [Finding(code=severity, severity=severity, message="x") for severity in ("info", "warning", "error")]
    rule = Rule(name="max-rho", limit=9.0, source="test")
    gate = decide([rule], ReportReadings(hot), hot.model_copy(update={"findings": found}), path="x", kind="report")
    assert [finding.code for finding in gate.findings] == ["warning", "error"]


def test_tokens_and_verdict(hot: Report) -> None:
    assert one(hot, "min-tokens", 8192).outcome == "passed"
    assert one(hot, "min-tokens", 8193).outcome == "broken"
    assert one(hot, "require-resolved").outcome == "passed"
    outcomes = {v: one(hot.model_copy(update={"verdict": v}), "require-resolved").outcome for v in get_args(VerdictName)}
    assert {verdict for verdict, outcome in outcomes.items() if outcome == "broken"} == {"early", "unresolved"}


@pytest.mark.parametrize("status", [s for s in get_args(Status) if s != "converged"])
def test_no_status_but_converged_passes_or_breaks(hot: Report, status: str) -> None:
    assert one(change(hot, "full", status=status), "max-rho", 1e9).outcome == "unresolved"
    assert one(change(hot, "full", status=status), "max-rho", 1e-9).outcome == "unresolved"
    if status != "empty":
        assert one(with_layers(hot, l4=status), "max-layer-rho", 1e9).outcome == "unresolved"


@pytest.mark.parametrize("missing", ["rho_low", "rho_high"])
def test_half_a_bracket_is_none(hot: Report, missing: str) -> None:
    for limit in (1e-9, 1e9):
        assert one(change(hot, "generalisation", **{missing: None}), "max-rho", limit).outcome == "unresolved"


def test_without_a_learning_rate_no_rho_rule_is_decided(hot: Report) -> None:
    bare = change(hot, "optimizer", lr=None, threshold=None)
    for name in ("max-rho", "max-layer-rho", "max-surge"):
        outcome = one(bare, name, 1e9, hot)
        assert outcome.outcome == "unresolved"
        assert "--lr" in outcome.message
    assert one(bare, "max-regression", 1.0, hot).outcome == "passed", "lambda needs no learning rate"


def test_nothing_measured_is_unresolved_for_every_rule() -> None:
    rules = [Rule(name=name, limit=1.0, source="test") for name in ruled() if name != "require-resolved"]
    outcomes = judge(rules, NoReadings("out of time"))
    assert {outcome.outcome for outcome in outcomes} == {"unresolved"}
    gate = decide(rules, NoReadings("out of time"), None, path="x", kind="checkpoint")
    assert (gate.outcome, gate.exit_code, gate.subject.rho) == ("unresolved", 3, None)


def test_exit_codes_and_what_beats_what(hot: Report) -> None:
    names = ("passed", "broken", "unresolved")
    made = {name: one(hot, "max-rho", limit) for name, limit in zip(names, (9.0, 0.1, 1.46), strict=True)}
    assert {name: made[name].outcome for name in names} == {name: name for name in names}
    for chosen in itertools.product(names, repeat=3):
        expected = "broken" if "broken" in chosen else "unresolved" if "unresolved" in chosen else "passed"
        assert overall([made[name] for name in chosen]) == expected
    assert overall([]) == "unresolved"
    codes = {(o, u): exit_code(o, u) for o in names for u in ("report", "pass", "fail")}  # type: ignore[arg-type]
    assert {codes["passed", u] for u in ("report", "pass", "fail")} == {0}
    assert {codes["broken", u] for u in ("report", "pass", "fail")} == {1}
    assert [codes["unresolved", u] for u in ("report", "pass", "fail")] == [3, 0, 1]


def test_another_kind_of_input_fits_in(hot: Report) -> None:
    """A track has its own history for the surge, and needs no baseline."""

    class Track(ReportReadings):
        def surge(self) -> Reading:
            return Reading("rho over the trailing median", 3.0, 2.9, 3.1)

    (outcome,) = judge([Rule(name="max-surge", limit=2.0, source="test")], Track(hot))
    assert outcome.outcome == "broken"


# --- properties --------------------------------------------------------------------------------

odd = st.sampled_from([None, 0.0, -1.0, 1e300, -1e300, 5e-324])
usual = st.floats(0.01, 10)
limits = st.floats(1e-6, 20)
LIMITED = ("max-rho", "max-layer-rho", "max-update-ratio", "max-surge", "max-regression")
RANK = {"passed": 0, "unresolved": 1, "broken": 2}


@st.composite
def reports(draw: st.DrawFn) -> Report:
    """A real report with its numbers and statuses replaced, a few of them by the oddest that a document can hold."""
    report = load_report(ASSETS / "calm-60.gate.report.json")
    spoilt = draw(st.sets(st.integers(0, 25), max_size=3))
    count = itertools.count()

    def number() -> object:
        return draw(odd if next(count) in spoilt else usual)

    def estimate() -> dict[str, object]:
        status = draw(st.sampled_from(get_args(Status))) if next(count) in spoilt else "converged"
        return {**{name: number() for name in ("eigenvalue", "rho", "residual")}, "status": status}

    report = change(report, "full", **estimate())
    report = change(report, "generalisation", held_out=number(), rho_low=number(), rho_high=number())
    status = draw(st.sampled_from(["uphill", "skipped"])) if next(count) in spoilt else "ok"
    report = change(report, "update", ratio=number(), status=status)
    report = change(report, "optimizer", threshold=number())
    report = change(report, "data", sha256=draw(st.sampled_from(["a" * 64, "b" * 64])))
    return report.model_copy(update={"layers": [layer.model_copy(update=estimate()) for layer in report.layers[:3]]})


@given(reports(), reports(), limits, limits)
@settings(max_examples=100, deadline=None)
def test_tightening_a_limit_never_helps(report: Report, baseline: Report, one_limit: float, other: float) -> None:
    tight, loose = sorted((one_limit, other))
    for name in LIMITED:
        first, second = one(report, name, tight, baseline), one(report, name, loose, baseline)
        assert RANK[first.outcome] >= RANK[second.outcome], name
    few, many = sorted((int(one_limit * 1000), int(other * 1000)))
    assert RANK[one(report, "min-tokens", many).outcome] >= RANK[one(report, "min-tokens", few).outcome]


@given(reports(), reports(), limits)
@settings(max_examples=100, deadline=None)
def test_what_is_not_certified_never_passes_and_never_breaks(report: Report, baseline: Report, limit: float) -> None:
    for name in LIMITED:
        outcome = one(report, name, limit, baseline)
        if outcome.outcome == "unresolved":
            continue
        assert outcome.low is not None
        assert outcome.high is not None
        assert outcome.low <= outcome.high
        assert outcome.limit is not None
        assert (outcome.high <= outcome.limit) == (outcome.outcome == "passed")
        if name in ("max-rho", "max-surge", "max-regression"):
            assert report.full.status == "converged"
        if name in ("max-surge", "max-regression"):
            assert baseline.full.status == "converged"
        if name == "max-update-ratio":
            assert report.update.status == "ok"
        if name == "max-layer-rho" and outcome.outcome == "passed":
            assert {layer.status for layer in report.layers} <= {"converged", "empty"}


@given(
    st.sampled_from(["report", "pass", "fail"]), st.lists(st.sampled_from(["max-rho", "max-layer-rho"]), min_size=1), limits
)
@settings(max_examples=50, deadline=None)
def test_unresolved_exits_0_only_where_asked(taken: str, names: list[str], limit: float) -> None:
    report = change(load_report(ASSETS / "calm-60.gate.report.json"), "full", status="unconverged")
    rules = [Rule(name=name, limit=limit, source="test") for name in ["max-rho", *names]]  # type: ignore[arg-type]
    gate = decide(rules, ReportReadings(report), report, path="x", kind="report", unresolved=taken)  # type: ignore[arg-type]
    assert gate.exit_code != 0 or taken == "pass"
