"""JUnit XML: a test case a rule."""

from __future__ import annotations

from io import BytesIO

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite
from junitparser.junitparser import FinalResult

from curvcli.documents import Gate, Outcome
from curvcli.errors import plain


def junit(gate: Gate) -> str:
    """A broken rule is a failure; an unresolved one an error, or what it is taken for: a failure, or skipped."""
    suite = TestSuite("curv gate")
    for outcome in gate.outcomes:
        case = TestCase(outcome.rule, classname=plain(gate.subject.path))
        case.result = _results(outcome, gate)
        suite.add_testcase(case)
    document = JUnitXml()
    document.add_testsuite(suite)
    stream = BytesIO()
    document.write(stream)
    return stream.getvalue().decode("utf-8") + "\n"


def _results(outcome: Outcome, gate: Gate) -> list[FinalResult]:
    if outcome.outcome == "passed":
        return []
    unresolved = {"report": Error, "fail": Failure, "pass": Skipped}[gate.unresolved]
    kind = Failure if outcome.outcome == "broken" else unresolved
    return [kind(plain(outcome.message), outcome.outcome)]
