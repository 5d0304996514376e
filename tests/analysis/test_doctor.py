"""`curv doctor`: each thing that can be missing is named with a remedy, and nothing else is called wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from places import SAMPLES
from real import curv
from torch.nn.attention import SDPBackend

from curvcli.analysis import doctor
from curvcli.analysis.doctor import Check, examine


def found(checks: object, what: str) -> Check:
    (check,) = [c for c in checks if c.what == what]  # type: ignore[attr-defined]
    return check


def test_a_sample_can_be_measured() -> None:
    done = examine(SAMPLES / "hot")
    assert done.able
    assert {c.what: c.status for c in done.checkpoint} == {
        "checkpoint": "ok", "network": "ok", "optimizer": "ok", "learning rate": "ok", "data": "ok", "memory": "ok"
    }  # fmt: skip
    assert found(done.checkpoint, "optimizer").found.startswith("AdamW")
    assert done.commands == [f"curv analyze {SAMPLES / 'hot'} --estimate", f"curv analyze {SAMPLES / 'hot'}"]
    # 123,424 values of 4 bytes: weights, three entries of state, 16 vectors.
    assert f"{4 * 123_424 * 20 / 2**20:.3g} MiB" in found(done.checkpoint, "memory").found


def test_what_is_missing_is_named_with_a_remedy(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "calm" / "checkpoint-10", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "optimizer.pt").unlink()
    done = examine(tmp_path)
    assert not done.able
    for what, status in {"optimizer": "warning", "learning rate": "warning", "data": "error"}.items():
        check = found(done.checkpoint, what)
        assert check.status == status, what
        assert check.remedy, what
    assert done.commands[0] == f"curv init {tmp_path}"
    named = examine(tmp_path, model=str(tmp_path / "checkpoint-10"))
    assert named.commands[0] == f"curv init {tmp_path} --model {tmp_path / 'checkpoint-10'}"


def test_a_configuration_that_cannot_be_read_is_not_to_be_written_anew(tmp_path: Path) -> None:
    """curv init and curv analyze --data read it too: neither would run."""
    shutil.copytree(SAMPLES / "calm" / "checkpoint-10", tmp_path / "checkpoint-10")
    (tmp_path / "curv.toml").write_text("data = [1,\n")
    done = examine(tmp_path)
    assert "mend or remove" in str(found(done.checkpoint, "data").remedy)
    assert done.commands == [f"curv doctor {tmp_path}"]


def test_a_gap_in_the_files_is_an_answer_not_a_crash(tmp_path: Path) -> None:
    done = examine(tmp_path / "none")
    assert not done.able
    assert found(done.checkpoint, "checkpoint").status == "error"
    assert "does not exist" in found(done.checkpoint, "checkpoint").found


def test_a_model_larger_than_the_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda device: 1e6)
    done = examine(SAMPLES / "hot")
    assert found(done.checkpoint, "memory").status == "error"
    assert not done.able


def test_missing_packages_are_no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_EXTRAS", (("no-such-package", "nothing", "pip install it"),))
    (extra,) = examine().extras
    assert (extra.status, extra.remedy) == ("info", "pip install it")


def test_kernels_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert doctor._twice(device, SDPBackend.MATH)
    monkeypatch.setattr(doctor, "_twice", lambda device, backend: False)
    assert doctor._attention(device).status == "error"


def test_an_optimizer_that_is_refused_is_said_with_the_reason() -> None:
    summary = {"state entries": ["ax", "eta", "mu", "step"], "groups": 1, "lr": 1.0, "weight_decay": 0.0}
    checkpoint = type("C", (), {"optimizer": object(), "last_lr": None})()
    checks = list(doctor._optimizer(checkpoint, summary))  # type: ignore[arg-type]
    assert checks[0].status == "warning"
    assert "ASGD" in checks[0].found


def test_json_and_exit_codes(tmp_path: Path) -> None:
    done = curv("doctor", SAMPLES / "nanogpt", "--data", SAMPLES / "data" / "shard.bin", "--format", "json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["able"]) == (0, True)
    assert set(said) == {"able", "machine", "extras", "checkpoint", "commands"}
    assert curv("doctor", tmp_path / "none").returncode == 2


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_fits(width: int) -> None:
    done = curv("doctor", SAMPLES / "hot", COLUMNS=str(width))
    assert done.returncode == 0
    table = done.stdout.split("next:")[0]
    assert max(map(len, table.splitlines())) <= width
    assert "learning rate" in table
