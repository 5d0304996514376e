"""Commands on a GPU, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import gpu
import pytest
import torch
from gpu import DEVICE, agree, document, ended, say, started
from places import ROOT, SAMPLES

pytestmark = gpu.there
DEMO = ROOT / "curvcli" / "cli" / "demo"


def test_a_track_is_the_cpus(tmp_path: Path) -> None:
    options = ["--tokens", 1024, "--no-cache", "--quiet"]
    both = [
        started("track", SAMPLES / "hot", "--device", device, "-o", tmp_path / f"{name}.json", *options)
        for name, device in (("here", DEVICE), ("there", "cpu"))
    ]
    for process in both:
        ended(process)
    here, there = (document(tmp_path / f"{name}.json") for name in ("here", "there"))
    agree(here, there)


def test_a_gate_passes_and_fails_as_on_the_cpu(tmp_path: Path) -> None:
    runs = {
        (name, device): started(
            "gate", SAMPLES / name / "checkpoint-60", "--device", device, "--tokens", 1024, "--max-rho", 1.0, "--quiet"
        )
        for name in ("calm", "hot")
        for device in {str(DEVICE), "cpu"}
    }
    codes = {}
    for key, process in runs.items():
        ended(process, code=None)
        codes[key] = process.returncode
    for name in ("calm", "hot"):
        assert codes[name, str(DEVICE)] == codes[name, "cpu"], codes
    assert codes["hot", "cpu"] in (1, 3), codes
    say(f"gates: {codes}")


def test_auto_takes_the_gpu(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    process = started("analyze", DEMO / "checkpoint-60", "--no-depths", "-o", output, "--quiet")
    ended(process)
    assert document(output)["cost"]["device"].startswith(DEVICE.type)


def test_the_demo_and_the_estimate_and_the_doctor(tmp_path: Path) -> None:
    demo = started("demo", "-o", tmp_path / "demo.json", "--quiet")
    estimate = started("analyze", SAMPLES / "hot" / "checkpoint-60", "--estimate", "--device", DEVICE, "--quiet")
    doctor = started("doctor", SAMPLES / "hot" / "checkpoint-60")
    ended(demo)
    assert document(tmp_path / "demo.json")["cost"]["device"] == "cpu"  # the same for everybody
    assert DEVICE.type in ended(estimate)[0]
    out, _ = ended(doctor)
    assert f"{DEVICE.type}: " in out, out
    if gpu.REAL:
        assert torch.cuda.get_device_name() in " ".join(out.split()), out
    say("doctor: " + next((line.strip() for line in out.splitlines() if "attention" in line), "?"))


@pytest.mark.parametrize("name", ["cuda:77", "meta"])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    out, err = ended(started("analyze", SAMPLES / "hot" / "checkpoint-60", "--device", name, "--quiet"), code=2)
    assert name in err, err
    assert "Traceback" not in out + err
