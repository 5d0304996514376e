"""Where the machine fails: no permission, a full disk, a file still being written, a process killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats import CHECKPOINTS
from places import ASSETS
from real import CURV, curv

import curvcli.files.safe as safe
from curvcli.analysis.inspection import inspect_checkpoint
from curvcli.checkpoints import open_checkpoint
from curvcli.documents import write_whole
from curvcli.errors import CurvError, InputError
from curvcli.files.tensors import stored

NOBODY = 65534


@pytest.fixture
def powerless() -> Iterator[Path]:
    """A directory that a user who is not root can reach; root is that user until the end of the test."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        yield home
        if os.geteuid() == NOBODY:
            os.seteuid(0)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "optimizer.pt", "trainer_state.json", ""])
def test_permission_denied(file: str, powerless: Path) -> None:
    path = CHECKPOINTS["transformers Trainer"](powerless / "run")
    path.chmod(0o755)
    (path / file).chmod(0)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)

    def read() -> None:
        inspect_checkpoint(path)
        checkpoint = open_checkpoint(path)
        checkpoint.model()

    with pytest.raises(CurvError) as caught:
        read()
    assert "\n" not in str(caught.value)


FULL = """
import resource, sys
from pathlib import Path
from curvcli.errors import InputError
from curvcli.documents import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(Path(sys.argv[1]), b"x" * 100_000)
except InputError as error:
    print(error)
"""


def test_disk_full_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL, str(target)], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout, done.stderr
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


WRITER = """
import sys
from pathlib import Path
from curvcli.documents import write_whole
print("ready", flush=True)
while True:
    for letter in b"ab":
        write_whole(Path(sys.argv[1]), bytes([letter]) * 3_000_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    target, luck = tmp_path / "report.json", random.Random(0)  # noqa: S311
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(luck.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if target.exists():
            content = target.read_bytes()
            assert len(content) == 3_000_000
            assert content in (b"a" * 3_000_000, b"b" * 3_000_000)
    # What a kill may leave is a hidden file beside it, which nothing reads; the next write works.
    assert all(p == target or p.name.startswith(".report.json.") for p in tmp_path.iterdir())
    write_whole(target, b"next")
    assert target.read_bytes() == b"next"


def test_weights_cut_short_after_the_header_was_read(tmp_path: Path) -> None:
    path = CHECKPOINTS["transformers Trainer"](tmp_path / "run")
    checkpoint = open_checkpoint(path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(InputError):
        checkpoint.model()


def test_state_cut_short_while_it_is_used(tmp_path: Path) -> None:
    """A job that overwrites its ckpt.pt cuts it short first; a map of it would kill the reader with SIGBUS."""
    file = tmp_path / "optimizer.pt"
    torch.save({"moment": torch.ones(2**18)}, file)
    document = safe.load_pickle(file)
    os.truncate(file, 100)
    assert float(document["moment"].sum()) == 2**18


@pytest.mark.parametrize("raises", [False, True])
def test_a_file_that_changes_while_it_is_read_is_told(raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "optimizer.pt"
    torch.save({"moment": torch.ones(8)}, file)
    load = torch.load

    def written_meanwhile(*arguments: Any, **options: Any) -> Any:
        found = load(*arguments, **options)
        torch.save({"moment": torch.ones(4096)}, file)
        if raises:
            raise RuntimeError("PytorchStreamReader failed")
        return found

    monkeypatch.setattr(torch, "load", written_meanwhile)
    with pytest.raises(InputError, match="changed while it was read"):
        safe.load_pickle(file)


@pytest.mark.slow
def test_kill_an_analysis_at_any_moment(tmp_path: Path) -> None:
    path = CHECKPOINTS["transformers Trainer"](tmp_path / "run")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, 4000))
    out = tmp_path / "out"
    out.mkdir()
    arguments = [
        "analyze",
        str(path),
        "--data",
        str(tmp_path / "ids.npy"),
        "--sequence-length",
        "16",
        "--tokens",
        "256",
        "-q",
    ]
    command = [*CURV, *arguments, "-o", str(out / "report.json")]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    whole, luck = time.perf_counter() - start, random.Random(1)  # noqa: S311
    first = json.loads((out / "report.json").read_text())
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(luck.uniform(0.2, 1.05) * whole)
        process.kill()
        process.wait()
        assert json.loads((out / "report.json").read_text())["full"] == first["full"]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((out / "report.json").read_text())["full"] == first["full"]


CUT_SHORT = """
import sys
from pathlib import Path
from curvcli.errors import InputError
from curvcli.files.tensors import stored
path = Path(sys.argv[1])
tensors = stored({"model.norm.weight": path, "model.embed_tokens.weight": path})
first = tensors["model.embed_tokens.weight"]
with path.open("r+b") as stream:
    stream.truncate(4096)  # what writing the next checkpoint over this one begins with
assert float(first.abs().sum()) > 0
try:
    tensors["model.norm.weight"]
except InputError as error:
    print(error)
"""


@pytest.mark.slow
def test_weights_that_are_written_over_while_they_are_read(run: Path) -> None:
    """Mapped, the tensor read first would kill the process as soon as it is touched."""
    done = subprocess.run([sys.executable, "-c", CUT_SHORT, str(run / "model.safetensors")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors changed while it was read" in done.stdout


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{pipe}"),
        ("analyze", "{pipe}"),
        ("track", "{pipe}"),
        ("compare", "{pipe}", "{pipe}"),
        ("gate", "{pipe}", "--max-rho", "1"),
        ("gate", "{report}", "--max-regression", "1", "--baseline", "{pipe}"),
        ("report", "{pipe}", "-o", "{pipe}.html"),
        ("schedule", "--from", "{pipe}"),
    ],
    ids=" ".join,
)
def test_a_pipe_is_refused_and_not_waited_for(arguments: tuple[str, ...], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    report = ASSETS / "calm-60.gate.report.json"
    given = [argument.format(pipe=tmp_path / "pipe", report=report) for argument in arguments]
    done = curv(*given)
    assert done.returncode == 2
    assert "is no regular file" in done.stderr


def test_weights_that_have_gone_are_one_line(tmp_path: Path) -> None:
    """Between the listing of a checkpoint and the reading of its weights."""
    held = stored({"a": tmp_path / "a.safetensors"})
    for read in (lambda: held["a"], lambda: held.shape("a"), lambda: held.entries("a", 0, 1)):
        with pytest.raises(InputError, match=r"cannot read .*a\.safetensors: No such file"):
            read()
