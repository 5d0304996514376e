"""A gate in every format: drawn as it was decided, and no text of a document acts in one."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from junitparser import Error, Failure, JUnitXml, Skipped
from markdown_it import MarkdownIt
from places import ASSETS

from curvcli.documents import Gate, Rule, load_report
from curvcli.errors import plain
from curvcli.judge.gate import decide
from curvcli.judge.readings import ReportReadings
from curvcli.render.gate import GATE
from curvcli.render.gate_github import escape_data, escape_property


@pytest.mark.parametrize(
    ("taken", "kind", "level"),
    [("report", Error, "warning"), ("fail", Failure, "error"), ("pass", Skipped, "notice")],
)
def test_unresolved_is_drawn_as_it_is_taken(taken: str, kind: type, level: str) -> None:
    gate = hostile("x", unresolved=taken, limit=1.46)
    (case,) = next(iter(JUnitXml.fromstring(GATE["junit"].render(gate).encode())))
    assert [type(r) for r in case.result] == [kind]
    assert GATE["github"].render(gate).startswith(f"::{level} ")


def hostile(name: str, *, limit: float = 0.01, unresolved: str = "report") -> Gate:
    """A gate whose path, layer names and findings hold a text from an attacker."""
    report = load_report(ASSETS / "hot-60.gate.report.json")
    layers = [layer.model_copy(update={"name": name}) for layer in report.layers]
    findings = [f.model_copy(update={"message": name, "code": name, "severity": "error"}) for f in report.findings[:1]]
    where = report.checkpoint.model_copy(update={"path": name})
    report = report.model_copy(update={"layers": layers, "findings": findings, "checkpoint": where})
    rules = [Rule(name="max-rho", limit=limit, source=name)]
    if limit == 0.01:
        rules.append(Rule(name="max-layer-rho", limit=limit, source=name))
    return decide(rules, ReportReadings(report), report, path=name, kind="report", baseline=name, unresolved=unresolved)  # type: ignore[arg-type]


EVIL = [
    "::error::forged",
    "a\n::set-output name=x::y",
    "a\r::stop-commands::z",
    "%0A::warning::",
    "##[error]old style",
    "x</failure><failure>",
    "]]>&lt;",
    "\x00\x1b[31m\x08\ufffe",
    "a | b | c\n# title\n- [link](http://x) ![i](http://y) <img src=x onerror=y> `code` @someone",
    "\u202e\u2028::error::\u0085",
]
words = st.sampled_from(EVIL) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(words)
@settings(max_examples=60, deadline=None)
def test_no_text_forges_an_annotation(name: str) -> None:
    text = GATE["github"].render(hostile(name))
    lines = re.split(r"\r\n|\r|\n", text.removesuffix("\n"))
    assert len(lines) == 3
    assert all(line.startswith("::error title=curv gate%3A max-") for line in lines[:2])
    assert lines[2] == "curv gate: broken, 2 rules, exit code 1"
    decoded = lines[0].split("::", 2)[2].replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%")
    assert decoded.startswith(f"{plain(name)}: rho ")


def test_escapes_are_those_of_the_runner() -> None:
    assert escape_data("50%\r\n a:b,c") == "50%25%0D%0A a:b,c"
    assert escape_property("50%\r\n a:b,c") == "50%25%0D%0A a%3Ab%2Cc"


@given(words)
@settings(max_examples=60, deadline=None)
def test_junit_is_well_formed_whatever_the_text(name: str) -> None:
    root = ET.fromstring(GATE["junit"].render(hostile(name)).encode())  # noqa: S314
    assert [child.tag for child in root] == ["testsuite"]
    cases = list(root[0])
    assert [(case.tag, case.get("name")) for case in cases] == [("testcase", "max-rho"), ("testcase", "max-layer-rho")]
    assert [[child.tag for child in case] for case in cases] == [["failure"], ["failure"]]
    assert root[0].get("tests") == root[0].get("failures") == "2"
    assert all(set(case.attrib) <= {"name", "classname", "time"} for case in cases)


@given(words)
@settings(max_examples=60, deadline=None)
def test_markdown_stays_plain_text(name: str) -> None:
    """Rendered by a CommonMark parser with tables: no link, picture, HTML, or row comes out of a name."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(GATE["markdown"].render(hostile(name)))
    kinds = [token.type for token in tokens]
    assert kinds.count("tr_open") == 3
    assert kinds.count("td_open") == 2 * 5
    assert kinds.count("heading_open") == kinds.count("table_open") == kinds.count("bullet_list_open") == 1
    inline = {child.type for token in tokens for child in token.children or ()}
    assert inline <= {"text", "softbreak", "text_special"}
    assert not {"html_block", "fence", "code_block", "blockquote_open", "hr"} & set(kinds)


def test_a_terminal_gets_no_escape_sequences_from_a_file() -> None:
    assert "\x1b" not in GATE["text"].render(hostile("\x1b[31m\x1b]0;title\x07"))
    assert "[bold]x" in GATE["text"].render(hostile("[bold]x"))
