"""The gate: rules held against readings. Pure functions of results; docs/how-to/gate.md has the rules in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from curvcli.documents import Gate, Outcome, OutcomeName, Report, Rule, RunName, RunVerdict, Subject, VerdictName
from curvcli.documents.base import LARGEST
from curvcli.documents.columns import ruled
from curvcli.documents.version import package_version
from curvcli.judge.limits import UNKNOWN
from curvcli.judge.readings import Reading, Readings

Unresolved = Literal["report", "pass", "fail"]
LOST: tuple[RunName, ...] = ("wrecked", "collapsed")
WORST_FIRST: tuple[OutcomeName, ...] = ("broken", "unresolved", "passed")


def judge(rules: Sequence[Rule], readings: Readings, *, regression_tolerance: float = 1.0) -> list[Outcome]:
    """One outcome a rule, in order.

    A rule on a number that is missing or not certified is unresolved. Else it is passed where the whole of the number's
    bracket keeps the limit, broken where none of it does, and unresolved between.

    Args:
        rules: max-regression's limit in percent.
        regression_tolerance: percent by which the same lambda may differ between machines; added to that limit.
    """
    outcomes = []
    known = ruled()
    for rule in rules:
        column = known[rule.name]
        asked = column.rule
        if asked is None or asked.kind == "flag":
            healthy = rule.name == "require-healthy"
            outcomes.append(_healthy(rule, readings.run()) if healthy else _resolved(rule, readings.verdict()))
        elif rule.limit is None:
            raise ValueError(f"{rule.name} has no limit")
        # A count is exact, and has no bracket to be held against.
        elif column.kind == "count" and asked.least:
            outcomes.append(_enough(rule, rule.limit, readings.of(column)[0], column.label))
        else:
            # The one rule that compares two measurements to the percent: machines round differently.
            limit = rule.limit + (regression_tolerance if rule.name == "max-regression" else 0.0)
            found = [_held(rule, limit, reading, least=asked.least) for reading in readings.of(column)]
            outcomes.append(_deciding(found, least=asked.least))
    return outcomes


def judge_each(
    rules: Sequence[Rule], points: Sequence[tuple[str, int | None, Readings]], *, regression_tolerance: float = 1.0
) -> list[Outcome]:
    """One outcome a rule: the worst of several points of a run, of equals the newest; its message says which others.

    Args:
        points: name, step and readings of each, in step order.
    """
    found = []
    for rule in rules:
        # Of the whole run there is one answer, whatever the point.
        looked = points[-1:] if rule.name == "require-healthy" else points
        each = [
            (name, step, judge([rule], readings, regression_tolerance=regression_tolerance)[0])
            for name, step, readings in looked
        ]
        worst = overall([outcome for *_, outcome in each])
        same = [one for one in each if one[2].outcome == worst]
        name, step, chosen = same[-1]
        if len(looked) > 1:
            others = ", ".join(name for name, *_ in same[:-1])
            which = "" if worst == "passed" or not others else f"; {worst} too: {others}"
            where = f"at all {len(looked)} points; {name}" if worst == "passed" else name
            chosen = chosen.model_copy(update={"step": step, "message": f"{where}: {chosen.message}{which}"})
        found.append(chosen)
    return found


def overall(outcomes: Sequence[Outcome]) -> OutcomeName:
    """Broken beats unresolved, and unresolved beats passed. Nothing judged is unresolved."""
    # A gate that held nothing has not passed.
    found = {outcome.outcome for outcome in outcomes} or {"unresolved"}
    return next(name for name in WORST_FIRST if name in found)


def exit_code(outcome: OutcomeName, unresolved: Unresolved) -> Literal[0, 1, 3]:
    """0 passed, 1 broken, 3 unresolved unless that is taken for one of the others."""
    if outcome == "unresolved":
        codes: dict[Unresolved, Literal[0, 1, 3]] = {"report": 3, "pass": 0, "fail": 1}
        return codes[unresolved]
    return 1 if outcome == "broken" else 0


def decide(
    rules: Sequence[Rule],
    readings: Readings,
    report: Report | None,
    *,
    path: str,
    kind: Literal["report", "track", "checkpoint"],
    baseline: str | None = None,
    regression_tolerance: float = 1.0,
    unresolved: Unresolved = "report",
    points: Sequence[tuple[str, int | None, Readings]] = (),
) -> Gate:
    """The gate's document: the rules judged, and what was judged.

    A run whose loss says that it is wrecked or has collapsed passes no gate, whatever rules are in force: that is an
    outcome of its own.

    Args:
        points: name, step and readings of the points that the rules have to hold for, where it is not the one alone.
        report: that the readings are of; None where there is none.
        path: of what the user named; baseline: of the report compared with.
        unresolved: what an unresolved outcome is taken for, in the exit code.
    """
    each = points or [("", None, readings)]
    outcomes = judge_each(rules, each, regression_tolerance=regression_tolerance)
    run = readings.run()
    # A network that is wrecked is often flat: every rule on rho would hold.
    if run is not None and run.name in LOST and not any(rule.name == "require-healthy" for rule in rules):
        outcomes.append(_healthy(Rule(name="require-healthy", limit=None, source="always: the run's own loss"), run))
    outcome = overall(outcomes)
    return Gate(
        subject=Subject(
            path=path,
            kind=kind,
            checkpoint=report.checkpoint.path if report else None,
            step=report.checkpoint.step if report else None,
            tokens=report.data.tokens if report else None,
            rho=report.judged.rho if report else None,
            verdict=readings.verdict(),
            stable_lr=report.stable_lr.value if report and report.stable_lr else None,
            run=run,
            points=len(each),
        ),
        baseline=baseline,
        outcome=outcome,
        unresolved=unresolved,
        exit_code=exit_code(outcome, unresolved),
        outcomes=outcomes,
        findings=[finding for finding in report.findings if finding.severity != "info"] if report else [],
        curvcli=package_version(),
    )


def _held(rule: Rule, limit: float, reading: Reading, *, least: bool) -> Outcome:
    low, value, high = reading.low, reading.value, reading.high
    if reading.reason:
        name, message = "unresolved", f"{reading.what}: {reading.reason}"
    # Not trusted to be in order: a report may come from anywhere, and NaN keeps no limit and breaks none.
    elif low is None or value is None or high is None or not -LARGEST <= low <= value <= high <= LARGEST:
        low = high = None
        name, message = "unresolved", f"{reading.what}: its bracket is missing or makes no sense"
    else:
        shown = f"{reading.what} {value:.4g}"
        bracket = "" if low == high else f" ({low:.4g} to {high:.4g})"
        if low >= limit if least else high <= limit:
            name, message = "passed", f"{shown}{bracket} is within {limit:g}"
        elif high < limit if least else low > limit:
            name, message = "broken", f"{shown}{bracket} is {'below' if least else 'above'} {limit:g}"
        else:
            remedy = f"; {reading.narrow}" if reading.narrow else ""
            name, message = (
                "unresolved",
                f"{shown} is between {low:.4g} and {high:.4g}, and so is the limit {limit:g}{remedy}",
            )
    return Outcome.model_validate(
        {
            "rule": rule.name,
            "limit": limit,
            "source": rule.source,
            "outcome": name,
            "part": reading.part,
            "value": value if value is not None and abs(value) <= LARGEST else None,
            "low": None if reading.reason else low,
            "high": None if reading.reason else high,
            "message": message + reading.note,
        }
    )


def _deciding(outcomes: Sequence[Outcome], *, least: bool) -> Outcome:
    """The worst of a rule's outcomes, of equals the one furthest on; its message counts the others."""
    worst = overall(outcomes)
    same = [outcome for outcome in outcomes if outcome.outcome == worst]
    sign = -1.0 if least else 1.0
    # A part without a number is the last to speak for the others.
    chosen = max(same, key=lambda outcome: float("-inf") if outcome.value is None else sign * outcome.value)
    if worst == "passed" or len(same) == 1:
        return chosen
    others = ", ".join(str(outcome.part) for outcome in same if outcome is not chosen)
    return chosen.model_copy(update={"message": f"{chosen.message}; {worst} too: {others}"})


def _enough(rule: Rule, limit: float, reading: Reading, noun: str) -> Outcome:
    """Of a count, which is exact."""
    value = reading.value
    name: OutcomeName = "unresolved" if value is None else "passed" if value >= limit else "broken"
    messages = {"unresolved": "nothing was measured", "passed": f"{noun} are enough", "broken": f"{noun} are too few"}
    shown = "" if value is None else f"{value:,.0f} "
    return Outcome(
        rule=rule.name,
        limit=limit,
        source=rule.source,
        outcome=name,
        part=None,
        value=value,
        low=value,
        high=value,
        message=f"{shown}{messages[name]}, {limit:,.0f} are required",
    )


def _resolved(rule: Rule, verdict: VerdictName) -> Outcome:
    return Outcome(
        rule=rule.name,
        limit=None,
        source=rule.source,
        outcome="broken" if verdict in UNKNOWN else "passed",
        part=None,
        value=None,
        low=None,
        high=None,
        message=f"the verdict is {verdict}",
    )


def _healthy(rule: Rule, run: RunVerdict | None) -> Outcome:
    """Of the run: broken where it is wrecked, collapsed or too hot, and unresolved where nobody can say yet."""
    name: OutcomeName = "unresolved"
    if run is not None and run.name in (*LOST, "hot"):
        name = "broken"
    elif run is not None and run.name == "healthy":
        name = "passed"
    message = "nothing was measured"
    if run is not None:
        message = f"the run is {run.name}: {'; '.join(run.reasons)}" + ("" if name == "passed" else f"; {run.advice}")
    return Outcome(
        rule=rule.name,
        limit=None,
        source=rule.source,
        outcome=name,
        part=None,
        step=run.step if run else None,
        value=None,
        low=None,
        high=None,
        message=message,
    )
