"""`curv gate` as a subprocess: exit codes, formats, configuration, hostile text, and the time budget."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from junitparser import Error, Failure, JUnitXml, Skipped
from markdown_it import MarkdownIt
from test_track import course_of
from typer.testing import CliRunner

from curvcli.cli import app
from curvcli.cli.budget import GRACE
from curvcli.documents import Gate, Rule, json_schema, load_gate, load_report
from curvcli.errors import plain
from curvcli.judge.gate import decide
from curvcli.judge.readings import ReportReadings
from curvcli.render.gate import BY_SUFFIX, GATE
from curvcli.render.gate_github import escape_data, escape_property

ASSETS = Path(__file__).parent / "assets"
CURV = [sys.executable, "-c", "from curvcli.cli import main; main()"]


@pytest.fixture
def hot(tmp_path: Path) -> Path:
    return Path(shutil.copy(ASSETS / "hot-60.gate.report.json", tmp_path / "hot.json"))


@pytest.fixture
def calm(tmp_path: Path) -> Path:
    return Path(shutil.copy(ASSETS / "calm-60.gate.report.json", tmp_path / "calm.json"))


def curv(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}
    variables |= {"COLUMNS": "80", "NO_COLOR": "1", **environment}
    command = [*CURV, "gate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--max-rho", "1.6"], 0),
        (["--max-rho", "1.0"], 1),
        (["--max-rho", "1.46"], 3),
        (["--max-rho", "1.46", "--unresolved", "pass"], 0),
        (["--max-rho", "1.46", "--unresolved", "fail"], 1),
        (["--max-rho", "1.46", "--min-tokens", "9000"], 1),
        (["--max-rho", "1.6", "--max-update-ratio", "9"], 3),
        (["--max-rho", "1.0", "--unresolved", "pass"], 1),
        (["--require-resolved"], 0),
    ],
)
def test_exit_codes(hot: Path, arguments: list[str], code: int) -> None:
    done = curv(hot, *arguments)
    assert done.returncode == code, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert f"exit code {code}" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no rule is in force"),
        (["--max-rho", "nan"], "--max-rho"),
        (["--max-rho", "-1"], "--max-rho"),
        (["--max-regression", "inf", "--baseline", "HOT"], "--max-regression"),
        (["--max-surge", "2"], "pass --baseline"),
        (["--max-surge", "2", "--baseline", "/nowhere.json"], "/nowhere.json"),
        (["--max-rho", "1", "--budget", "3"], "--budget is for checkpoints"),
        (["--max-rho", "1", "--lr", "3"], "--lr is for checkpoints"),
        (["--max-rho", "1", "-o", "/nowhere/gate.json"], "not a writable directory"),
        (["--max-rho", "1", "-o", "gate.pdf"], ".xml"),
    ],
)
def test_bad_usage_is_two_and_one_line(hot: Path, arguments: list[str], words: str) -> None:
    done = curv(hot, *(str(hot) if a == "HOT" else a for a in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_bad_input_is_two(tmp_path: Path, hot: Path, samples: Path) -> None:
    (tmp_path / "other.json").write_text('{"schema": "curv.schedule/1"}')
    (tmp_path / "cut.json").write_text(hot.read_text()[:900])
    (tmp_path / "nan.json").write_text(re.sub(r'"rho": 1\.5\d+', '"rho": NaN', hot.read_text(), count=1))
    (tmp_path / "void.json").write_text("")
    for path in (tmp_path / "other.json", tmp_path / "cut.json", tmp_path / "nan.json", tmp_path / "void.json", "/nowhere"):
        done = curv(path, "--max-rho", 1)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), path
    for budget in ("", "soon", "0", "-3", "1d", "9" * 30):
        done = curv(samples / "hot", "--max-rho", 1, f"--budget={budget}")
        assert done.returncode == 2, budget
        assert "--budget" in done.stderr


def test_a_name_that_is_no_text(hot: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json")
    shutil.copy(hot, odd)
    for name in GATE:
        assert curv(odd, "--max-rho", 1, "--format", name).returncode == 1


def test_a_closed_pipe_does_not_hide_a_broken_rule(hot: Path) -> None:
    command = f"set -o pipefail; {' '.join(CURV[:2])} '{CURV[2]}' gate {hot} --max-rho 1 --format json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)  # noqa: S607
    assert (done.returncode, done.stderr) == (1, "")


def test_a_report_is_judged_without_torch(hot: Path, calm: Path, tmp_path: Path) -> None:
    outputs = [a for suffix in BY_SUFFIX for a in ("-o", str(tmp_path / f"gate{suffix}"))]
    arguments = ["gate", str(hot), "--max-surge", "9", "--baseline", str(calm), "--format", "github", *outputs]
    script = (
        f"import sys; sys.argv = ['curv', *{arguments!r}]\n"
        "from curvcli.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]"), done.stdout


# --- formats -----------------------------------------------------------------------------------


def test_every_format_says_the_same(hot: Path, tmp_path: Path) -> None:
    arguments = (hot, "--max-rho", 1, "--max-layer-rho", 3, "--max-update-ratio", 1)
    files = {suffix: tmp_path / f"gate{suffix}" for suffix in BY_SUFFIX}
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    outputs = [a for file in files.values() for a in ("-o", file)]
    done = curv(*arguments, *outputs, "--format", "github", GITHUB_STEP_SUMMARY=str(summary))
    assert done.returncode == 1
    gate = load_gate(files[".json"])
    assert [(o.rule, o.outcome) for o in gate.outcomes] == [
        ("max-rho", "broken"),
        ("max-layer-rho", "passed"),
        ("max-update-ratio", "unresolved"),
    ]
    jsonschema.validate(json.loads(files[".json"].read_text()), json_schema("gate"))
    lines = done.stdout.splitlines()
    assert [line.split("::")[1] for line in lines[:2]] == [
        "error title=curv gate%3A max-rho broken",
        "warning title=curv gate%3A max-update-ratio unresolved",
    ]
    assert lines[2:] == ["curv gate: broken, 3 rules, exit code 1"]
    assert summary.read_text() == "before\n" + files[".md"].read_text() + "\n"
    (suite,) = JUnitXml.fromfile(str(files[".xml"]))
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (3, 1, 1, 0)
    assert [[type(r) for r in case.result] for case in suite] == [[Failure], [], [Error]]
    assert [case.name for case in suite] == ["max-rho", "max-layer-rho", "max-update-ratio"]
    assert "above 1" in next(iter(suite)).result[0].message
    assert files[".txt"].read_text().count("broken") == 1
    for name, renderer in GATE.items():
        assert curv(*arguments, "--format", name).stdout == renderer.render(gate)


def test_a_summary_that_cannot_be_written_changes_nothing(hot: Path, tmp_path: Path) -> None:
    done = curv(hot, "--max-rho", 1, "--format", "github", GITHUB_STEP_SUMMARY=str(tmp_path))
    assert done.returncode == 1
    assert "job summary" in done.stderr


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
@settings(max_examples=150, deadline=None)
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
@settings(max_examples=150, deadline=None)
def test_junit_is_well_formed_whatever_the_text(name: str) -> None:
    root = ET.fromstring(GATE["junit"].render(hostile(name)).encode())  # noqa: S314
    assert [child.tag for child in root] == ["testsuite"]
    cases = list(root[0])
    assert [(case.tag, case.get("name")) for case in cases] == [("testcase", "max-rho"), ("testcase", "max-layer-rho")]
    assert [[child.tag for child in case] for case in cases] == [["failure"], ["failure"]]
    assert root[0].get("tests") == root[0].get("failures") == "2"
    assert all(set(case.attrib) <= {"name", "classname", "time"} for case in cases)


@given(words)
@settings(max_examples=150, deadline=None)
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


# --- configuration -----------------------------------------------------------------------------


def test_flags_win_over_the_nearest_table_and_explain_says_so(
    hot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curv.toml").write_text("[gate]\nmax-rho = 1.6\nmin-tokens = 100\nrequire-resolved = false\n")
    assert curv(hot).returncode == 0
    assert curv(hot, "--max-rho", 1).returncode == 1
    shown = curv(hot, "--explain", "--max-rho", 1)
    assert shown.returncode == 0
    rows = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines() if line.strip()}
    assert rows["max-rho"] == ["1", "--max-rho"]
    assert rows["min-tokens"][0] == "100"
    assert "curv.toml" in shown.stdout
    assert "require-resolved" not in rows
    assert rows["regression-tolerance"] == ["1", "default"]
    assert max(len(line) for line in shown.stdout.splitlines()) <= 80


def test_pyproject_and_the_working_directory(hot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (away / "pyproject.toml").write_text('[tool.curv.gate]\nmax-rho = 1.0\nunresolved = "pass"\n')
    assert curv(hot).returncode == 2, "nothing above the working directory"
    monkeypatch.chdir(away)
    assert curv(hot).returncode == 1
    assert curv(hot, "--max-rho", 1.46).returncode == 0
    assert curv("--explain").returncode == 0
    (tmp_path / "curv.toml").write_text("[gate]\nmax-rho = 1.6\n")
    assert curv(hot).returncode == 1, "the nearest to the working directory, not to the report"


def test_a_baseline_in_the_table_is_relative_to_its_file(
    hot: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curv.toml").write_text('[gate]\nmax-surge = 2.0\nbaseline = "calm.json"\nmax-regression = 5\n')
    done = curv(hot, "--format", "json")
    assert done.returncode == 1
    gate = json.loads(done.stdout)
    assert gate["baseline"] == str(calm)
    assert [(o["rule"], o["outcome"], o["limit"]) for o in gate["outcomes"]] == [
        ("max-surge", "broken", 2.0),
        ("max-regression", "passed", 6.0),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("max-rhoo = 1.0", "did you mean max-rho?"),
        ("max_rho = 1.0", "did you mean max-rho?"),
        ("colour = 3", "known keys: max-rho, "),
        ('max-rho = "1.0"', "gate.max-rho"),
        ("max-rho = true", "gate.max-rho"),
        ("max-rho = nan", "gate.max-rho"),
        ("max-rho = 0", "gate.max-rho"),
        ("require-resolved = 1", "gate.require-resolved"),
        ('unresolved = "maybe"', "gate.unresolved"),
    ],
)
def test_a_table_with_a_fault_is_refused(
    hot: Path, tmp_path: Path, content: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curv.toml").write_text(f"[gate]\n{content}\n")
    result = CliRunner().invoke(app, ["gate", str(hot), "--max-rho", "1"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_file_with_rules_alone_does_not_hide_the_data_above_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "nanogpt")
    (tmp_path / "nanogpt" / "curv.toml").write_text("[gate]\nmax-rho = 1.0\n")
    done = curv(tmp_path / "nanogpt" / "ckpt.pt", "-q", "--format", "json")
    assert done.returncode in (0, 1, 3), done.stderr
    assert json.loads(done.stdout)["subject"]["tokens"] == 256


# --- a checkpoint, and the time budget ---------------------------------------------------------


def test_a_checkpoint_is_measured_and_its_report_kept(samples: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = (samples / "nanogpt" / "ckpt.pt", "--tokens", 1024, "--max-rho", 50, "--min-tokens", 2000)
    done = curv(*arguments, "--report", report, "-q", "--format", "json")
    assert (done.returncode, done.stderr) == (1, "")
    gate = json.loads(done.stdout)
    assert [o["outcome"] for o in gate["outcomes"]] == ["passed", "broken"]
    assert gate["subject"]["kind"] == "checkpoint"
    assert load_report(report).full.rho == gate["subject"]["rho"]
    again = curv(report, "--max-rho", 50, "--min-tokens", 2000, "--format", "json")
    assert json.loads(again.stdout)["outcomes"] == gate["outcomes"]


@pytest.mark.parametrize("budget", [1, 6])
def test_a_tiny_budget_is_kept_and_leaves_the_gate_unresolved(samples: Path, tmp_path: Path, budget: int) -> None:
    start = time.perf_counter()
    arguments = (samples / "hot" / "checkpoint-60", "--tokens", 32768, "--max-rho", 1, "--budget", f"{budget}s")
    done = curv(*arguments, "-o", tmp_path / "gate.json", "--report", tmp_path / "r.json", OMP_NUM_THREADS="1")
    taken = time.perf_counter() - start
    assert done.returncode == 3, done.stderr
    assert taken < budget + GRACE + 6
    assert "--budget" in done.stdout
    (outcome,) = load_gate(tmp_path / "gate.json").outcomes
    assert outcome.outcome == "unresolved"
    assert outcome.low is None
    if (tmp_path / "r.json").exists():
        assert load_report(tmp_path / "r.json").full.status != "converged"


@pytest.mark.slow
def test_a_fair_budget_decides_on_the_full_model_alone(samples: Path, tmp_path: Path) -> None:
    """Less than the whole analysis takes: rho is certified, layers or depths are skipped, and the rules know it."""
    arguments = (samples / "hot" / "checkpoint-60", "--max-rho", 1, "--report", tmp_path / "r.json", "-q")
    for seconds in (15, 20, 30, 45):
        done = curv(*arguments, "--budget", seconds, OMP_NUM_THREADS="1")
        if done.returncode != 3:
            break
    assert done.returncode == 1, done.stdout
    report = load_report(tmp_path / "r.json")
    assert report.full.status == "converged"
    assert report.full.eigenvalue == pytest.approx(load_report(ASSETS / "hot-60.gate.report.json").full.eigenvalue, rel=0.01)
    skipped = [e for e in report.cumulative.truncated if e.status == "skipped"]
    assert skipped
    assert any(f.code == "out-of-time" for f in report.findings)


# --- tracks ------------------------------------------------------------------------------------


@pytest.fixture
def track(tmp_path: Path) -> Path:
    path = tmp_path / "track.json"
    path.write_text(course_of([1.0, 1.0, 1.0, 3.0]).to_json())
    return path


def test_a_track_is_judged_at_its_newest_point(track: Path) -> None:
    done = curv(track, "--max-surge", 2, "--format", "json")
    assert done.returncode == 1, done.stderr
    gate = json.loads(done.stdout)
    assert gate["subject"]["kind"] == "track"
    assert gate["subject"]["step"] == 3
    assert gate["outcomes"][0]["value"] == pytest.approx(3.0)
    assert curv(track, "--max-surge", 4).returncode == 0
    assert curv(track, "--max-surge", 4, "--budget", "5s").returncode == 2
    no_baseline = curv(track, "--max-regression", 5)
    assert no_baseline.returncode == 2
    assert "max-regression compares with a baseline" in no_baseline.stderr


def test_a_track_is_a_baseline(track: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(course_of([None] * 4 + [6.0]).points[-1].report.to_json())  # type: ignore[union-attr]
    done = curv(report, "--max-surge", 5, "--max-regression", 50, "--baseline", track, "--format", "json")
    values = {o["rule"]: o["value"] for o in json.loads(done.stdout)["outcomes"]}
    assert values["max-surge"] == pytest.approx(6.0)  # over the median 1
    assert values["max-regression"] == pytest.approx(100.0)  # over the newest, 3


def test_a_track_that_already_has_the_checkpoint_does_not_compare_it_with_itself(track: Path, tmp_path: Path) -> None:
    """As where a nightly `curv track` ran first: 0 % regression, whatever the run did."""
    newest = json.loads(track.read_text())["points"][-1]["report"]
    for path in (newest["checkpoint"]["path"], "elsewhere/checkpoint-3"):
        newest["checkpoint"]["path"] = path
        (tmp_path / "report.json").write_text(json.dumps(newest))
        done = curv(tmp_path / "report.json", "--max-regression", 50, "--baseline", track, "--format", "json")
        assert done.returncode == 1, done.stderr
        assert json.loads(done.stdout)["outcomes"][0]["value"] == pytest.approx(200.0)  # over the one before, 1


def test_rules_are_explained_without_looking_at_the_subject(tmp_path: Path) -> None:
    assert curv(tmp_path / "not there yet", "--max-rho", 1, "--explain").returncode == 0
