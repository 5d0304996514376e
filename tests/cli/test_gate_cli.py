"""`curv gate` by its command: exit codes, what is written where, and configuration."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import real
from junitparser import Error, Failure, JUnitXml
from places import ASSETS
from real import CURV, Done

from curvcli.documents import json_schema, load_gate
from curvcli.render.gate import BY_SUFFIX, GATE


@pytest.fixture
def hot(tmp_path: Path) -> Path:
    return Path(shutil.copy(ASSETS / "hot-60.gate.report.json", tmp_path / "hot.json"))


@pytest.fixture
def calm(tmp_path: Path) -> Path:
    return Path(shutil.copy(ASSETS / "calm-60.gate.report.json", tmp_path / "calm.json"))


def curv(*arguments: object, **environment: str) -> Done:
    return real.curv("gate", *arguments, **environment)


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
        ([], "no rule is in force: none was passed, and no curv.toml or pyproject.toml in "),
        (
            ["--explain"],
            "or above it has a [gate]; pass one, as --max-rho 1.0 (curv gate -h has all), or put it into [gate]",
        ),
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
    done = curv(hot, "--max-rho", "1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.slow
def test_a_file_with_rules_alone_does_not_hide_the_data_above_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "nanogpt")
    (tmp_path / "nanogpt" / "curv.toml").write_text("[gate]\nmax-rho = 1.0\n")
    done = curv(tmp_path / "nanogpt" / "ckpt.pt", "--max-hvps", 3, "--mode", "kept", "-q", "--format", "json")
    assert done.returncode in (0, 1, 3), done.stderr
    assert json.loads(done.stdout)["subject"]["tokens"] == 256


def test_rules_are_explained_without_looking_at_the_subject(tmp_path: Path) -> None:
    assert curv(tmp_path / "not there yet", "--max-rho", 1, "--explain").returncode == 0
