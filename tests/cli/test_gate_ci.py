"""action.yml's own shell steps, run as a runner would; the pre-commit manifest; the snippets of docs/how-to/gate.md."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import ASSETS, ROOT
from typer.main import get_command

from curvcli.cli import app
from curvcli.documents import load_gate

ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: dict[str, dict[str, Any]] = {step["id"]: step for step in ACTION["runs"]["steps"] if "id" in step}
GUIDE = (ROOT / "docs" / "how-to" / "gate.md").read_text()


def flags() -> set[str]:
    command = get_command(app).commands["gate"]  # type: ignore[attr-defined]
    return {name for parameter in command.params for name in parameter.opts}


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """A job's folders, with `curv` and `python` on its PATH."""
    for name in ("bin", "temp", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "curv").write_text(
        f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(ROOT))}\n"
        f'exec {sys.executable} -c "from curvcli.cli import main; main()" "$@"\n'
    )
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\necho "python $*" >> {tmp_path}/log\nexec {sys.executable} "$@"\n')
    for file in (tmp_path / "bin").iterdir():
        file.chmod(0o755)
    return tmp_path


def perform(runner: Path, step: str, **given: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run a step as the runner does: bash -eo pipefail, expressions filled in, files for outputs and summary."""
    inputs = {
        name: str(given.pop(name.replace("-", "_"), spec.get("default", ""))) for name, spec in ACTION["inputs"].items()
    }
    assert not given, given
    fill = lambda text: re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda m: inputs[m[1]], text)  # noqa: E731
    environment = {
        **{name: fill(value) for name, value in STEPS[step]["env"].items()},
        "PATH": f"{runner / 'bin'}:/usr/bin:/bin",
        "HOME": str(runner),
        "GITHUB_OUTPUT": str(runner / "output"),
        "GITHUB_STEP_SUMMARY": str(runner / "summary.md"),
        "GITHUB_ACTION_PATH": str(ROOT),
        "RUNNER_TEMP": str(runner / "temp"),
    }
    script = runner / "step.sh"
    script.write_text(STEPS[step]["run"])
    assert "${{" not in script.read_text(), "an input pasted into a script could run as one"
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    done = subprocess.run(
        command, env=environment, cwd=runner / "work", capture_output=True, text=True, timeout=300, check=False
    )
    file = runner / "output"
    lines = file.read_text().splitlines() if file.exists() else []
    return done, dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize(
    ("given", "code", "outcome"),
    [
        ({"max_rho": "1.6"}, 0, "passed"),
        ({"max_rho": "1.0"}, 1, "broken"),
        ({"max_rho": "1.46"}, 3, "unresolved"),
        pytest.param({"max_rho": "1.46", "unresolved": "pass"}, 0, "unresolved", marks=pytest.mark.slow),
        pytest.param({"require_resolved": "true"}, 0, "passed", marks=pytest.mark.slow),
    ],
)
def test_the_action_judges_a_report(runner: Path, given: dict[str, str], code: int, outcome: str) -> None:
    done, outputs = perform(runner, "gate", path=str(ASSETS / "hot-60.gate.report.json"), **given)
    assert done.returncode == code, done.stderr
    assert (outputs["exit-code"], outputs["outcome"]) == (str(code), outcome)
    gate = load_gate(Path(outputs["json"]))
    assert (gate.outcome, gate.exit_code) == (outcome, code)
    assert Path(outputs["junit"]).read_text().startswith("<?xml")
    assert (runner / "summary.md").read_text().startswith(f"### curv gate: {outcome}\n")
    assert ("::error" in done.stdout) == (outcome == "broken")


def test_every_rule_reaches_the_command(runner: Path) -> None:
    hot, calm = ASSETS / "hot-60.gate.report.json", ASSETS / "calm-60.gate.report.json"
    limits = ("max_rho", "max_layer_rho", "max_update_ratio", "max_surge", "max_regression", "max_loss_rise", "min_tokens")
    given = {"path": str(hot), "baseline": str(calm), "regression_tolerance": "2"}
    given |= {"require_resolved": "true", "require_healthy": "true"}
    done, outputs = perform(runner, "gate", **given, **dict.fromkeys(limits, "1"))
    assert done.returncode == 1
    gate = json.loads(Path(outputs["json"]).read_text())
    assert {o["rule"]: o["limit"] for o in gate["outcomes"]} == {
        "max-rho": 1.0,
        "max-layer-rho": 1.0,
        "max-update-ratio": 1.0,
        "max-surge": 1.0,
        "max-regression": 3.0,
        "max-loss-rise": 1.0,
        "require-healthy": None,
        "min-tokens": 1.0,
        "require-resolved": None,
    }
    used = set(re.findall(r"(?<=add )--[a-z-]+|--require-[a-z]+|--any", STEPS["gate"]["run"]))
    about_running = {"--python-version", "--torch-index", "--package", "--path"}
    assert used == {f"--{name}" for name in ACTION["inputs"]} - about_running
    assert used <= flags()


def test_the_action_fails_with_two_where_curv_cannot_run(runner: Path) -> None:
    (runner / "temp" / "curv-gate.json").write_text("of the step before")
    done, outputs = perform(runner, "gate", path="/nowhere", max_rho="1")
    assert done.returncode == 2
    assert outputs == {"exit-code": "2"}
    assert "curv: error: /nowhere does not exist" in done.stderr


@pytest.mark.slow
def test_hostile_inputs_stay_arguments(runner: Path) -> None:
    evil = '$(touch "$HOME/fired"); `touch $HOME/fired` "; touch $HOME/fired; #'
    for name in ("path", "max_rho", "baseline", "data", "budget"):
        inputs = {"path": str(ASSETS / "hot-60.gate.report.json"), "max_rho": "1", name: evil}
        done, _ = perform(runner, "gate", **inputs)
        assert done.returncode == 2, name
    done, _ = perform(runner, "gate", path="--help", max_rho="1")
    assert done.returncode == 2, "a path is no option"
    assert not (runner / "fired").exists()


def test_the_install_step(runner: Path) -> None:
    """With a python that only writes down what it was asked: torch first, then the action's own version."""
    (runner / "bin" / "python").write_text(f'#!/bin/sh\necho "$*" >> {runner}/log\n')
    done, _ = perform(runner, "install")
    assert done.returncode == 0, done.stderr
    asked = (runner / "log").read_text().splitlines()
    assert asked == [
        "-m pip install --quiet torch --index-url https://download.pytorch.org/whl/cpu",
        f"-m pip install --quiet {ROOT}",
    ]
    (runner / "log").unlink()
    perform(runner, "install", torch_index="", package="curvcli==0.1.0")
    assert (runner / "log").read_text() == "-m pip install --quiet curvcli==0.1.0\n"


def test_the_action_is_whole() -> None:
    assert ACTION["runs"]["using"] == "composite"
    assert all(("uses" in step) != ("run" in step) for step in ACTION["runs"]["steps"])
    assert all(step["shell"] == "bash" for step in ACTION["runs"]["steps"] if "run" in step)
    for output in ACTION["outputs"].values():
        name = re.fullmatch(r"\$\{\{ steps\.gate\.outputs\.([a-z-]+) \}\}", output["value"])
        assert name
        assert f"{name[1]}=" in STEPS["gate"]["run"]


def test_the_pre_commit_hook_is_the_command() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["entry"] == "curv gate"
    assert hook["pass_filenames"] is False, "curv gate takes one subject"
    assert re.search(hook["files"], "runs/last.json")
    assert not re.search(hook["files"], "train.py")


def test_the_guide_shows_what_there_is() -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    kinds = [kind for kind, _ in blocks]
    assert {"sh", "toml", "yaml"} <= set(kinds)
    shown = [line for kind, text in blocks if kind in ("sh", "yaml") for line in text.splitlines() if "curv gate " in line]
    assert len(shown) >= 4
    for line in shown:
        assert set(re.findall(r"--[a-z-]+", line)) <= flags(), line
    for kind, text in blocks:
        if kind == "toml":
            from curvcli.analysis.config import Config

            Config.model_validate(tomllib.loads(text))
        if kind == "yaml":
            document = yaml.safe_load(text)
            for step in (s for job in document.get("jobs", {}).values() for s in job.get("steps", [])):
                if "curv" in step.get("uses", ""):
                    assert set(step["with"]) <= set(ACTION["inputs"])
    rules = {name.removeprefix("--") for name in flags() if name.startswith(("--max-", "--min-", "--require"))} - {
        "max-hvps"
    }
    assert set(re.findall(r"^\| `([a-z-]+)` \|", GUIDE, re.MULTILINE)) == rules
