"""The command on the sample checkpoints: what it writes, how fast it starts, Ctrl-C and closed pipes."""

from __future__ import annotations

import csv
import io
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from pace import in_time
from places import ASSETS
from real import CURV, curv, process

from curvcli.documents import load_report
from curvcli.render import TEXT


@pytest.fixture(scope="module")
def hot(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    folder = tmp_path_factory.mktemp("hot")
    done = curv("analyze", samples / "hot", "-o", folder / "r.json", "--plot", folder / "p.png", "--mode", "kept")
    assert done.returncode == 0, done.stderr
    assert "curv:" in done.stderr, "no progress"
    return json.loads((folder / "r.json").read_text()), done.stdout, folder


@pytest.mark.slow
def test_newest_checkpoint_of_the_run(hot: tuple[dict, str, Path]) -> None:
    report, table, folder = hot
    assert report["checkpoint"]["path"].endswith("hot/checkpoint-600")
    assert report["checkpoint"]["step"] == report["optimizer"]["step"] == 600
    curves = report["cumulative"]
    assert (report["checkpoint"]["layers"], len(report["layers"]), len(curves["restricted"])) == (8, 8, 9)
    assert curves["truncated"] == [], "a trained network cut short says nothing"
    optimizer = report["optimizer"]
    assert (optimizer["name"], optimizer["preconditioner"], optimizer["lr_source"]) == ("AdamW", "checkpoint", "checkpoint")
    assert optimizer["threshold"] == pytest.approx((2 / optimizer["lr"] - 0.1) * 19)
    assert report["full"]["rho"] == pytest.approx(report["full"]["eigenvalue"] / optimizer["threshold"])
    assert report["data"]["tokens"] == 8192
    statuses = [e["status"] for e in [report["full"], *report["layers"], *report["cumulative"]["restricted"]]]
    assert set(statuses) == {"converged"}
    assert report["verdict"] in ("stable", "edge", "unstable"), "the sample must give a resolved verdict"
    assert report["verdict"].upper() in table
    assert max(len(line) for line in table.splitlines()) <= 80
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in folder.iterdir()) == ["p.png", "r.json"]


@pytest.mark.slow
def test_report_validates_against_its_schema(hot: tuple[dict, str, Path]) -> None:
    schema = json.loads(curv("schema", "report").stdout)
    jsonschema.validate(hot[0], schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**hot[0], "verdict": "fine"}, schema)


@pytest.mark.slow
def test_interlacing_holds_in_a_real_report(hot: tuple[dict, str, Path]) -> None:
    report = hot[0]
    curve = [e["eigenvalue"] for e in report["cumulative"]["restricted"]]
    assert curve == sorted(curve)
    assert max(layer["eigenvalue"] for layer in report["layers"]) <= curve[-1]
    assert report["full"]["eigenvalue"] == curve[-1] == report["tokens"][-1]["eigenvalue"]


@pytest.mark.slow
def test_same_seed_same_report(samples: Path) -> None:
    arguments = ("analyze", samples / "nanogpt" / "ckpt.pt", "--tokens", 512, "--mode", "kept", "-q", "--format", "json")
    one, two = (json.loads(curv(*arguments).stdout) for _ in range(2))
    assert one.pop("cost")["hvps"] == two.pop("cost")["hvps"]
    assert one == two
    assert one["checkpoint"]["format"] == "nanogpt"
    assert one["checkpoint"]["step"] == 300


def test_csv(samples: Path) -> None:
    few = ("--tokens", 64, "--max-hvps", 3, "--mode", "kept", "--truncated", "-q")
    done = curv("analyze", samples / "nanogpt" / "ckpt.pt", *few, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [r["part"] for r in rows] == ["full", "body", "ends"] + ["layer"] * 4 + ["restricted"] * 5 + ["truncated"] * 5
    assert all(float(r["eigenvalue"]) > 0 for r in rows)


def test_markdown() -> None:
    text = TEXT["markdown"](load_report(next(ASSETS.glob("*.report.json"))))
    assert text.startswith("## curv: ")
    assert "| full | full model |" in text


def test_inspect_reads_headers_only(samples: Path) -> None:
    found = json.loads(curv("inspect", samples / "calm", "--json").stdout)
    assert found["step"] == 600
    assert found["parameters"] == 123_424
    assert found["optimizer"]["state entries"] == ["exp_avg", "exp_avg_sq", "step"]
    shown = curv("inspect", samples / "calm").stdout
    assert "LlamaForCausalLM" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['curv', 'analyze', '--help']\n"
        "from curvcli.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    used = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor, not of a clock, which also counts what else the machine does.
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert in_time(min(used), 0.5, time.process_time)


def test_bad_usage_is_two() -> None:
    assert curv("analyse").returncode == 2
    assert curv("schema", "nonsense").returncode == 2
    failed = curv("analyze", "/nowhere")
    assert (failed.returncode, failed.stdout) == (2, "")
    # Where importing torch takes long, a line of progress comes before it.
    said = [line for line in failed.stderr.splitlines() if "%" not in line]
    assert len(said) == 1
    assert said[0].startswith("curv: error: ")


@pytest.mark.slow
def test_ctrl_c_is_130_and_leaves_nothing(samples: Path, tmp_path: Path) -> None:
    arguments = ["analyze", str(samples / "hot"), "--tokens", "32768", "-o", str(tmp_path / "r.json")]
    # A shell's background job ignores SIGINT and its children inherit that: a terminal's foreground does not.
    foreground = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen([*CURV, *arguments], stderr=subprocess.PIPE, text=True, preexec_fn=foreground) as job:
        assert job.stderr is not None
        job.stderr.readline()  # the first progress line: it is at work
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=60) == 130
        assert "Traceback" not in job.stderr.read()
    assert not list(tmp_path.iterdir())


def test_a_closed_pipe_is_quiet(samples: Path) -> None:
    command = f"{' '.join(CURV[:2])} '{CURV[2]}' schema report | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)  # noqa: S607
    assert done.stderr == ""
