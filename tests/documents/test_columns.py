"""A number has one home: one that is added to the columns is in every output, and the gate has its rule."""

from __future__ import annotations

import ast
import csv
import importlib.util
import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import yaml
from places import ASSETS, ROOT

from curvcli.documents import Rule, load_report
from curvcli.documents.base import LARGEST
from curvcli.documents.columns import PARTS, POINTS, Column, Measurement, Place, rules, shown
from curvcli.judge import gate as judging
from curvcli.judge.limits import UNSTABLE_ABOVE
from curvcli.judge.readings import Reading
from curvcli.render import cells
from curvcli.render.csv import write
from curvcli.render.frame import number

REPORT = ASSETS / "hot-60.gate.report.json"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every output of a curv that has two more numbers."""
    script, away = ROOT / "tests" / "support" / "toy_number.py", tmp_path_factory.mktemp("toy")
    done = subprocess.run([sys.executable, script, REPORT, away], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("table", ["toy error", "toy spread"]),
        ("track table", ["toy spread"]),
        ("csv", ["toy_error"]),
        ("track csv", ["toy_spread"]),
        ("markdown", ["| toy error |", "- toy spread: "]),
        ("page", [">toy error</th>", "<dt>toy spread</dt>"]),
        ("track page", [">toy error</th>", ">toy spread</th>"]),
        ("flags", ["--max-toy-error", "--min-toy-spread"]),
        ("help", ["Largest toy error of any layer.", "Least toy spread: of the full model."]),
        ("keys", ["max-toy-error", "min-toy-spread"]),
        ("schema", ["max-toy-error", "min-toy-spread"]),
        ("action", ["add --max-toy-error", "inputs.min-toy-spread }}"]),
    ],
)
def test_a_number_is_found_in_every_output(toy: dict[str, Any], output: str, words: list[str]) -> None:
    assert [word for word in words if word not in toy[output]] == []


def test_its_values_are_those_of_the_report(toy: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(toy["csv"])))
    assert [float(row["toy_error"]) for row in rows] == [float(r["residual"]) / float(r["eigenvalue"]) for r in rows]
    for row in rows:
        assert f"| {number(float(row['toy_error']), 4)} |" in toy["markdown"]
        cell = f'<td class="n" data-value="{row["toy_error"]}">{number(float(row["toy_error"]), 3)}</td>'
        assert cell in toy["page"]
    (row,) = csv.DictReader(io.StringIO(toy["track csv"]))
    assert float(row["toy_spread"]) == json.loads(REPORT.read_text())["participation"]


def test_its_rule_is_judged_by_flag_and_by_file(toy: dict[str, Any]) -> None:
    flag, file = toy["by flag"], toy["by file"]
    assert (flag["code"], file["code"]) == (1, 1)
    assert flag["outcomes"][0]["part"], "a rule on parts names the part"
    assert flag["outcomes"][0] | {"source": ""} == file["outcomes"][0] | {"source": ""}
    assert toy["passed"]["code"] == 0
    assert toy["too little"]["code"] == 1, "a lower limit is broken from below"
    assert [o["outcome"] for o in toy["between"]["outcomes"]] == ["unresolved"], "the limit lies in its bracket"


def test_its_input_is_yaml_that_the_action_can_have(toy: dict[str, Any]) -> None:
    made = yaml.safe_load(toy["action"])
    assert made["inputs"]["min-toy-spread"] == {"description": "Least toy spread: of the full model.", "default": ""}
    step = next(step for step in made["runs"]["steps"] if step.get("id") == "gate")
    assert step["env"]["CURV_MAX_TOY_ERROR"] == "${{ inputs.max-toy-error }}"


def test_action_yml_is_as_its_writer_writes_it() -> None:
    spec = importlib.util.spec_from_file_location("write_action", ROOT / "docs" / "write_action.py")
    assert spec
    assert spec.loader
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    text = writer.ACTION.read_text()
    assert writer.action(text) == text, "run python docs/write_action.py"
    with pytest.raises(ValueError, match="0 places"):
        writer.action(text.replace("# end of the inputs", ""))


def test_names_are_said_once() -> None:
    every: tuple[Sequence[Column[Any]], ...] = (PARTS, POINTS)
    for columns in every:
        assert not [key for key, count in Counter(column.key for column in columns).items() if count > 1]
        places: tuple[Place, ...] = ("table", "page", "markdown", "summary")
        for place in places:
            labels = Counter(column.label for column in shown(columns, place))
            assert not [label for label, count in labels.items() if count > 1], place
    assert len({rule.name for rule in rules()}) == len(rules())


def test_csv_is_written_in_one_place() -> None:
    assert write(["a", "=b"], [{"a": 0.1 + 0.2, "=b": "x\ny"}, {"a": None}]) == "a,'=b\r\n0.30000000000000004,x y\r\n,\r\n"
    users = [path.name for path in (ROOT / "curvcli" / "render").glob("*.py") if "DictWriter" in path.read_text()]
    assert users == ["csv.py"]


def test_limits_and_what_is_certified_are_said_once() -> None:
    """A copy of a limit, or of the question whether an estimate may be relied on, would not follow a change."""
    limits, asked = [], []
    for room in ("render", "schedules", "training", "cli", "analysis"):
        for path in (ROOT / "curvcli" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and node.value == UNSTABLE_ABOVE:
                    limits.append(path.name)
                if isinstance(node, ast.Compare) and any(
                    isinstance(c, ast.Constant) and c.value == "converged" for c in node.comparators
                ):
                    asked.append((room, path.name))
    assert limits == []
    # Where an eigensolver's own outcome becomes a document's status, no document is there yet to be asked.
    assert {room for room, _ in asked} <= {"analysis", "training"}
    assert {name for _, name in asked} <= {"api.py", "measured.py", "solve.py", "document.py", "tracker.py"}


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(2.0, 3.0, "passed"), (1.0, 1.5, "broken"), (1.0, 3.0, "unresolved"), (2.0, 2 * LARGEST, "unresolved")],
)
def test_a_lower_limit_is_held_against_the_lower_end(low: float, high: float, outcome: str) -> None:
    rule = Rule(name="max-rho", limit=2.0, source="test")
    assert judging._held(rule, 2.0, Reading("x", low, low, high), least=True).outcome == outcome


def test_a_rule_that_no_number_has_is_refused() -> None:
    with pytest.raises(ValueError, match="no rule is called 'max-nonsense'"):
        Rule(name="max-nonsense", limit=1.0, source="test")


def test_a_summary_marks_what_is_not_to_be_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    report = load_report(REPORT)
    toy = Column[Measurement]("toy", "toy", lambda m: 0.5, absent=("table",), solved=True)
    monkeypatch.setattr(cells, "POINTS", (toy,))
    assert cells.summary(report) == [("toy", "0.5000")]
    full = report.full.model_copy(update={"status": "unconverged"})
    assert cells.summary(report.model_copy(update={"full": full})) == [("toy", "0.5000?")]
