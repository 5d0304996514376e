"""`curv schedule` and `curv schedule verify` as a real command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from places import ASSETS
from real import curv
from tiny import run_of

from curvcli.documents import Finding, load_schedule
from curvcli.schedules import grow
from curvcli.training.verify import phase_problems

INIT, HOT = ASSETS / "init.json", ASSETS / "hot-60.json"
COSINE = ("--lr-schedule", "cosine", "--warmup-steps", 100, "--total-steps", 600)


def planned(*arguments: object) -> dict:
    done = curv("schedule", *arguments, "--format", "json", "-q")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_depth_alone_imports_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['curv', 'schedule', '--depth', '48', '--lr', '0.001']\n"
        "from curvcli.cli import main\n"
        "try: main()\nexcept SystemExit as stop: print(stop.code)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["0", "[]"]


def test_the_default_on_the_screen() -> None:
    done = curv("schedule", "--depth", 48)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["0", "24/48", "0-23", "-"] in rows
    assert ["3,500", "48/48", "0-47", "42-47"] in rows
    assert "nothing was measured" in done.stdout
    done = curv("schedule", "--depth", 48, "--order", "interleaved", "--lr", 0.001)
    assert ["0", "24/48", "0-46/2", "-", "0"] in [line.split() for line in done.stdout.splitlines()]
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_every_policy_keeps_to_the_schema_and_file_and_screen_agree(tmp_path: Path) -> None:
    schema = json.loads(curv("schema", "schedule").stdout)
    for arguments in (("--depth", 12), ("--from", INIT, "--lr", 0.01, *COSINE), ("--resume", HOT)):
        file, picture = tmp_path / "s.json", tmp_path / "s.png"
        shown = planned(*arguments, "-o", file, "--plot", picture)
        jsonschema.validate(shown, schema)
        assert json.loads(file.read_text()) == shown
        assert load_schedule(file).depth == len(shown["phases"][-1]["active"])
        assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**shown, "mode": "thaw"}, schema)


def test_where_the_peak_comes_from() -> None:
    plan = planned("--from", INIT, "--warmup-steps", 9)
    assert (plan["lr_schedule"]["peak"], plan["findings"][-1]["code"]) == (0.003, "lr-from-report")
    # hot was at 60 of 100 warm-up steps with lr 0.03: its peak was 0.05.
    plan = planned("--resume", HOT, *COSINE)
    assert plan["lr_schedule"]["peak"] == pytest.approx(0.05)
    assert [p["step"] for p in plan["phases"]] == [60, 405, 407, 408, 409]
    assert "lr-from-report" not in {f["code"] for f in planned("--resume", HOT, "--lr", 0.03)["findings"]}


def test_resuming_from_a_checkpoint_measures_it(tmp_path: Path) -> None:
    plan = planned("--resume", run_of(tmp_path, 3, 9) / "checkpoint-9", "--tokens", 64, "--lr", 0.003)
    assert (plan["mode"], plan["depth"], plan["phases"][0]["step"]) == ("freeze", 2, 9)
    assert plan["blocks"] == ["model.layers.0", "model.layers.1"]
    assert plan["provenance"]["report"] is None
    assert plan["provenance"]["checkpoint"].endswith("checkpoint-9")
    assert plan["phases"][0]["predicted_rho"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "pass --depth N, --from report.json or --resume CHECKPOINT"),
        (("--depth", 1), "0 of 1 blocks"),
        (("--depth", 8, "--margin", 0.5), "takes no --margin"),
        (("--depth", 8, "--hold", 5), "takes no --hold"),
        (("--depth", 8, "--min-lr-ratio", 0.1), "takes no --min-lr-ratio"),
        (("--depth", 8, "--lr-schedule", "cosine"), "pass the peak with --lr"),
        (("--depth", 8, "--lr", 0.1, "--lr-schedule", "cosine"), "needs its total steps"),
        (("--depth", 8, "--total-steps", 3000), "the run ends at 3000"),
        (("--depth", 8, "--plot", "s.bmp"), ".png"),
        (("--depth", 8, "-o", "/nonexistent/s.json"), "cannot write"),
        (("--from", INIT, "--resume", HOT), "takes no --from"),
        (("--from", INIT, "--start", 3), "takes no --start"),
        (("--from", INIT, "--order", "interleaved"), "--order interleaved cannot be predicted"),
        (("--depth", 8, "--order", "first"), "made training worse at every learning rate tried; pass last or interleaved"),
        (("--depth", 8, "--order", "up"), "--order up is not planned; pass last or interleaved"),
        (("--from", INIT, "--depth", 9), "the model measured has 8 blocks"),
        (("--from", INIT, "--margin", "nan"), "--margin nan"),
        (("--from", INIT, "--margin", "0"), "--margin 0"),
        (("--from", "/nowhere.json"), "/nowhere.json does not exist; write one with"),
        (("--from", INIT, "--lr", 0.01), "it would have to fall to 0.00801"),
        (("--resume", HOT, "--data", "x.bin"), "takes no --data"),
        (("--resume", HOT, "--order", "interleaved"), "cannot be predicted"),
        (("--resume", "/nowhere"), "does not exist"),
        (("--resume", "/nowhere", "--lr-schedule", "triangle"), "one of: constant"),
        (("--depth", 8, "verify", "a", "b"), "verify takes no --depth"),
    ],
)
def test_what_cannot_be_planned_is_two_and_one_line(arguments: tuple, said: str) -> None:
    done = curv("schedule", "-q", *arguments) if "verify" not in arguments else curv("schedule", *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert ";" in done.stderr, "no remedy"


def test_help_has_examples() -> None:
    assert "curv schedule --depth 48" in curv("schedule", "--help").stdout
    assert "curv schedule verify" in curv("schedule", "verify", "--help").stdout


# --- verify


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    file = tmp_path / "schedule.json"
    assert curv("schedule", "--from", INIT, "--lr", 0.01, *COSINE, "-o", file).returncode == 0
    return file


def test_a_schedule_fits_its_model(plan: Path, samples: Path) -> None:
    done = curv("schedule", "verify", plan, samples / "hot" / "checkpoint-60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 blocks, 5 phases" in done.stdout


def _changed(plan: Path, **values: object) -> None:
    plan.write_text(json.dumps({**json.loads(plan.read_text()), **values}))


def test_another_model_is_one_with_the_numbers(plan: Path, samples: Path) -> None:
    done = curv("schedule", "verify", plan, samples / "nanogpt" / "ckpt.pt")
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "for 8 blocks, and the model has 4 (transformer.h)" in done.stdout
    _changed(plan, blocks=[f"model.layers.{i}" for i in (1, 0, 2, 3, 4, 5, 6, 7)])
    done = curv("schedule", "verify", plan, samples / "hot" / "checkpoint-60")
    assert (done.returncode, done.stdout.count("other-block: ")) == (1, 2)


def test_phases_that_cannot_work_are_one(plan: Path, samples: Path) -> None:
    document = json.loads(plan.read_text())
    document["phases"].pop()
    document["lr_schedule"]["total_steps"] = 340
    plan.write_text(json.dumps(document))
    done = curv("schedule", "verify", plan, samples / "hot" / "checkpoint-60")
    assert done.returncode == 1
    assert "never-unlocked: no phase unlocks block 6, 7" in done.stdout
    assert "the phase at step 345 begins after the run's 340 steps" in done.stdout


def test_a_dead_block_is_one(plan: Path, samples: Path, tmp_path: Path) -> None:
    """All matrices of a block zero: the loss is fine and nothing shows it, but no gradient reaches them."""
    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "checkpoint-60"
    shutil.copytree(samples / "hot" / "checkpoint-60", damaged)
    weights = load_file(damaged / "model.safetensors")
    dead = {n: w.zero_() if ".layers.2." in n and w.dim() == 2 else w for n, w in weights.items()}
    save_file(dead, damaged / "model.safetensors", metadata={"format": "pt"})
    done = curv("schedule", "verify", plan, damaged)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "dead-block: block 2 trains at step 60 and no gradient reaches it" in done.stdout


def test_what_cannot_be_verified_is_two(plan: Path, samples: Path, tmp_path: Path) -> None:
    for schedule, checkpoint in ((HOT, samples / "hot"), (plan, tmp_path / "none"), (tmp_path / "none", samples / "hot")):
        done = curv("schedule", "verify", schedule, checkpoint)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_default_plan_has_no_problem_of_its_own() -> None:
    found: list[Finding] = phase_problems(grow(48))
    assert found == []
