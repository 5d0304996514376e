"""One line for each usage error, singulars, the width of a dumb terminal, and what inspect says beforehand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from places import ASSETS, SAMPLES
from real import curv, inspected, refusal
from terminal import Terminal

from curvcli.documents import load_gate, load_report
from curvcli.errors import counted
from curvcli.render.gate_text import text
from curvcli.render.headline import head


@pytest.mark.parametrize(
    ("words", "said", "where"),
    [
        ("analyze", "Missing argument 'CHECKPOINT'", "curv analyze -h"),
        ("analyze x --nonsense", "No such option: --nonsense", "curv analyze -h"),
        ("gate x --max-rho abc", "Invalid value for '--max-rho'", "curv gate -h"),
        ("schedule verify", "Missing argument 'SCHEDULE'", "curv schedule verify -h"),
        ("analyse", "No such command 'analyse'", "curv -h"),
        ("schedule --depth 0", "Invalid value for '--depth'", "curv schedule -h"),
        (
            "track x --format xml",
            "Invalid value for '--format': 'xml' is not one of 'table', 'json', 'csv'",
            "curv track -h",
        ),
    ],
)
def test_a_usage_error_is_one_line_that_says_where_the_help_is(words: str, said: str, where: str) -> None:
    line = refusal(*words.split())
    assert line.startswith(f"curv: error: {said}")
    assert line.endswith(f"; see {where}")


@pytest.mark.parametrize("verb", ["analyze", "track", "gate", "compare", "explain", "schedule"])
def test_a_page_is_made_elsewhere(verb: str) -> None:
    assert "; curv report makes a page of what -o wrote; see " in refusal(verb, "--format", "html")


def test_the_words_of_an_error_reach_no_terminal_as_they_are() -> None:
    assert "\x1b" not in refusal("analyze", "x", "--\x1b[2Jx")


def test_without_words_there_is_help() -> None:
    done = curv()
    assert done.returncode == 2
    assert "Usage: curv" in done.stdout
    assert done.stderr == ""


def test_exit_codes_of_verbs_are_kept() -> None:
    assert curv("gate", ASSETS / "hot-60.json", "--max-rho", 1).returncode == 1
    assert curv("--version").returncode == 0


def test_one_is_singular() -> None:
    assert (counted(1, "rule"), counted(2, "rule"), counted(0, "rule"), counted(1234, "rule")) == (
        "1 rule", "2 rules", "0 rules", "1,234 rules"
    )  # fmt: skip
    report = load_report(ASSETS / "hot-60.json")
    one = report.model_copy(update={"data": report.data.model_copy(update={"tokens": 1})})
    assert " 1 token," in head(one).plain


def test_a_gate_of_one_rule(tmp_path: Path) -> None:
    assert curv("gate", ASSETS / "hot-60.json", "--max-rho", 9, "-o", tmp_path / "g.json").returncode == 0
    assert "1 of 1 rule, exit code 0" in text(load_gate(tmp_path / "g.json"))


@pytest.mark.parametrize("columns", [100, 60])
def test_a_dumb_terminal_has_its_own_width(columns: int) -> None:
    terminal = Terminal(columns, 50, "gate", "--explain", "--max-rho", "1", "--baseline", "x" * 200, TERM="dumb")
    assert terminal.finish() == 0
    longest = max(len(line.rstrip()) for line in terminal.raw.decode().splitlines())
    assert columns - 10 < longest <= columns


def test_inspect_says_why_its_counts_are_not_those_of_a_report() -> None:
    assert inspected(SAMPLES / "nanogpt" / "ckpt.pt")["notes"]["counts"].startswith("28 tensors are stored and 27 have")
    assert "counts" not in inspected(SAMPLES / "calm")["notes"]


def test_inspect_says_which_learning_rate_will_be_used(run: Path) -> None:
    state = torch.load(run / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        group["lr"] = 0.0
    torch.save(state, run / "optimizer.pt")
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    last = [entry["learning_rate"] for entry in log if entry.get("learning_rate")][-1]
    assert f"takes the last logged one, {last:g}" in inspected(run)["notes"]["learning-rate"]
    (run / "trainer_state.json").unlink()
    assert "--lr" in inspected(run)["notes"]["learning-rate"]
    shutil.rmtree(run)
