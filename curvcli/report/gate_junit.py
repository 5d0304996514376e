"""JUnit XML: a test case a rule."""

from __future__ import annotations

import re
from io import BytesIO

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite
from junitparser.junitparser import FinalResult

from curvcli.results import Gate, Outcome

# What XML 1.0 cannot hold in any form, escaped or not (production 2, Char).
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(gate: Gate) -> str:
    """A broken rule is a failure; an unresolved one an error, or what it is taken for: a failure, or skipped."""
    suite = TestSuite("curv gate")
    for outcome in gate.outcomes:
        case = TestCase(outcome.rule, classname=_legal(gate.subject.path))
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
    return [kind(_legal(outcome.message), outcome.outcome)]


def _legal(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
