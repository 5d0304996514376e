"""Every example runs, from its README's own lines at toy sizes; what CI systems run is held against the tool."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from places import ASSETS, ROOT, SAMPLES
from real import CURV, curv, variables
from typer.main import get_command

from curvcli.cli import app

EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__")
TRAINED = ("nanogpt_loop", "transformers_trainer", "lightning", "accelerate", "accelerate_fsdp", "axolotl", "torchtitan")
LAUNCHED = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
FEW = ["--tokens", "128", "--max-hvps", "4", "--mode", "kept", "--device", "cpu", "-q"]


def lines(folder: Path) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the examples beside the text that they train on."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    (tmp_path / "sample_checkpoints").symlink_to(SAMPLES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "examples"


def test_every_folder_is_in_the_list_and_has_a_readme() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for folder in FOLDERS:
        assert f"[{folder.name}]({folder.name}/README.md)" in listed
        assert (folder / "README.md").is_file()
    assert set(TRAINED) < {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("name", TRAINED)
def test_lines_are_understood(name: str) -> None:
    found = lines(EXAMPLES / name)
    assert found[0][0] in LAUNCHED
    assert "train.py" in found[0]
    for words in found:
        if words[0] == "curv":
            command = get_command(app).commands[words[1]]  # type: ignore[attr-defined]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_it_runs(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / name
    monkeypatch.chdir(folder)
    for words in lines(folder):
        if words[0] in LAUNCHED:
            small = [*LAUNCHED[words[0]], *words[1:]]
            small[small.index("--steps") + 1] = "20"  # early is the first dozen, in which nothing is judged
            done = subprocess.run(
                small, capture_output=True, text=True, timeout=300, check=False,
                env={**variables(), "PYTHONPATH": f"{ROOT}:{folder}"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]
            continue
        measures = words[1] in ("analyze", "track") or (words[1] == "gate" and not words[2].endswith(".json"))
        shown = curv(*words[1:], *(FEW if measures else []))
        assert shown.returncode in ((0, 1, 3) if words[1] == "gate" else (0,)), (words, shown.stderr)
        assert shown.stdout or "-o" in words
    for log in folder.rglob("curvature.jsonl"):
        records = [json.loads(line) for line in log.read_text().splitlines()]
        # At a learning rate of 0, where the Trainer's schedule ends, there is nothing to measure.
        assert [record["message"] for record in records if record["status"] == "failed" and record["lr"] > 0] == []
        assert records


def test_the_workflow_is_one_of_the_action() -> None:
    (job,) = yaml.safe_load((EXAMPLES / "github_action" / "curvature.yml").read_text())["jobs"].values()
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    (used,) = [step for step in job["steps"] if step.get("id") == "curv"]
    assert used["with"].keys() <= action["inputs"].keys()
    outputs = re.findall(r"steps\.curv\.outputs\.([\w-]+)", json.dumps(job))
    assert outputs
    assert set(outputs) <= action["outputs"].keys()


def test_what_gitlab_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = yaml.safe_load((EXAMPLES / "gitlab" / ".gitlab-ci.yml").read_text())["curvature"]
    (tmp_path / "reports").mkdir()
    for name in ("last", "last-good"):
        shutil.copy(ASSETS / "hot-60.json", tmp_path / "reports" / f"{name}.json")
    monkeypatch.chdir(tmp_path)
    (line,) = [line for line in said["script"] if line.startswith("curv ")]
    assert curv(*shlex.split(line)[1:]).returncode == 1, "the sample is past its edge"
    assert (tmp_path / said["artifacts"]["reports"]["junit"]).read_text().startswith("<?xml")
    assert (tmp_path / said["artifacts"]["paths"][0]).exists()


def shim(place: Path, name: str, text: str) -> None:
    (place / name).write_text(f"#!/bin/bash\n{text}\n")
    (place / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """What stands for SLURM: srun runs its words, scontrol keeps them, curv is this one."""
    tools = tmp_path / "tools"
    tools.mkdir()
    shim(tools, "srun", 'exec "$@"')
    shim(tools, "scontrol", f'echo "$@" >> {tmp_path}/scontrol')
    shim(tools, "curv", f'exec {CURV[0]} -c "{CURV[2]}" "$@"')
    shim(tools, "python", f'exec {sys.executable} "$@"')
    return {**variables(), "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHONPATH": str(ROOT)}


def until(condition: object, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_that_is_pre_empted_goes_on(home: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    run = tmp_path / "run"
    environment = {
        **cluster, "RUN": str(run), "MAX_RHO": "1000",
        "TRAIN": f"python {home}/nanogpt_loop/train.py --out {run} --steps 100000 --save-every 100000",
        "CURV_OPTIONS": shlex.join(FEW),
    }  # fmt: skip
    script = ["bash", str(home / "slurm" / "train.sbatch")]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(script, env=environment, stdout=log, stderr=log)
        try:
            until(lambda: "step 20:" in (tmp_path / "log").read_text())
            job.send_signal(signal.SIGUSR1)
            assert job.wait(timeout=120) == 0
        finally:
            job.kill()
    said = (tmp_path / "log").read_text()
    saved = int(re.search(r"saved at step (\d+)", said)[1])
    assert saved > 20
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    environment["TRAIN"] = f"python {home}/nanogpt_loop/train.py --out {run} --steps {saved + 2}"
    again = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {saved}" in again.stdout
    assert json.loads((run / "gate.json").read_text())["subject"]["step"] == saved
    environment["MAX_RHO"] = "0.0001"
    environment["CURV_OPTIONS"] = shlex.join(["--unresolved", "fail", *FEW])
    stopped = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (stopped.returncode, "not resumed" in stopped.stdout) == (1, True), stopped.stdout + stopped.stderr


def test_the_slurm_script_is_bash() -> None:
    script = EXAMPLES / "slurm" / "train.sbatch"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0  # noqa: S607
