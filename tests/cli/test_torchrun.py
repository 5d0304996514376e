"""`torchrun -m curvcli`: one report, one exit code, and whatever happens to one rank ends all with one reason."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from pace import in_time
from torchruns import ended, started

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    tiny.run_of(place, 3, 6)
    return place


def test_two_nodes_measure_what_one_process_does(run: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = ("--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-backend=c10d", "--rdzv-id=curv")
    command = ["analyze", "run/checkpoint-6", "--no-depths", "-o"]
    nodes = [started(run, *command, f"node{i}.json", ranks=2, how=(*common, f"--node-rank={i}")) for i in range(2)]
    told = [ended(job) for job in nodes]
    assert [codes for _, _, codes in told] == [set(), set()]
    assert sum("full model" in out for out, _, _ in told) == 1
    (written,) = run.glob("node*.json")
    found = json.loads(written.read_text())
    single = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "curvcli", *command, "one.json", "-q"], cwd=run, env=single, check=True, stdout=-3)
    one = json.loads((run / "one.json").read_text())
    assert found["cost"]["ranks"] == 4
    assert one["verdict"] == found["verdict"]
    for name in ("rho_low", "rho_high", "standard_error"):
        assert found["generalisation"][name] == pytest.approx(one["generalisation"][name], rel=1e-4, abs=1e-6)
    for left, right in zip([one["full"], *one["layers"]], [found["full"], *found["layers"]], strict=True):
        assert left["eigenvalue"] == pytest.approx(right["eigenvalue"], rel=1e-4)
        assert (left["status"], left["hvps"]) == (right["status"], right["hvps"])


@pytest.mark.parametrize("mode", ["fresh", "differences"])
def test_divided_tensors_give_the_report_of_one_process(mode: str, run: Path) -> None:
    command = ["analyze", "run/checkpoint-6", "--no-depths", "-q", "-o"]
    how = ["--mode", mode] if mode == "differences" else []  # the other is what --shard takes by itself
    _, lines, codes = ended(started(run, *command, "divided.json", "--shard", *how))
    assert (lines, codes) == ([], set())
    single = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "curvcli", *command, "alone.json"], cwd=run, env=single, check=True, stdout=-3)
    found, one = (json.loads((run / f"{name}.json").read_text()) for name in ("divided", "alone"))
    assert (found["cost"]["ranks"], found["cost"]["mode"]) == (2, mode)
    assert found["verdict"] == one["verdict"]
    assert found["participation"] == pytest.approx(one["participation"], rel=1e-2)
    assert any(f["code"] == "blocks-gathered" for f in found["findings"]) == (mode == "differences")
    for left, right in zip([one["full"], *one["layers"]], [found["full"], *found["layers"]], strict=True):
        assert left["eigenvalue"] == pytest.approx(right["eigenvalue"], rel=1e-4 if mode == "fresh" else 1e-2)
        assert left["status"] == right["status"]
        assert left["hvps"] == right["hvps"] or mode == "differences"


@pytest.mark.parametrize(
    ("fail", "said", "mode"),
    [
        ("raise,1,30", "rank 1 of 2: --loss failing_loss:loss failed: RuntimeError: a bug of this rank", "auto"),
        ("once,1,60", "", "auto"),
        ("raise,1,30", "rank 1 of 2: --loss failing_loss:loss failed: RuntimeError: a bug of this rank", "differences"),
        ("limit,1,30", "rank 1 of 2: RuntimeError: ", "auto"),
        ("limit,1,30", "rank 1 of 2: RuntimeError: ", "differences"),
    ],
)
def test_what_happens_to_one_rank_ends_all_that_hold_slices(fail: str, said: str, mode: str, run: Path) -> None:
    given = ["analyze", "run/checkpoint-6", "--no-depths", "--shard", "--mode", mode, "--loss", "failing_loss:loss", "-q"]
    began = time.monotonic()
    _, lines, found = ended(started(run, *given, "-o", f"{fail}-{mode}.json", FAIL=fail))
    assert in_time(time.monotonic() - began, 90) or not said  # start of the processes, work up to the failure, and 30 s
    assert found == ({2} if said else set())
    assert [said in line for line in lines] == [True] * bool(said)
    assert bool(list(run.glob(f"*{fail}-{mode}.json*"))) == (not said)


def test_a_gates_exit_code_is_every_ranks(run: Path) -> None:
    out, lines, codes = ended(started(run, "gate", "run/checkpoint-3", "--max-rho", "1e-9", "-q", "-o", "gate.json"))
    assert codes == {json.loads((run / "gate.json").read_text())["exit_code"]}
    assert out.count("run/checkpoint-3") == 1
    assert not lines


def test_ranks_that_something_else_starts_keep_their_exit_codes(run: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "curvcli", "gate", "run/checkpoint-6", "--max-rho", "1e-9", "-q"]
    jobs = [
        subprocess.Popen(
            command, cwd=run, env={**base, "RANK": str(i), "LOCAL_RANK": str(i)}, stdout=-1, stderr=-1, text=True
        )
        for i in range(2)
    ]
    told = [job.communicate(timeout=240) for job in jobs]
    assert [job.returncode for job in jobs] == [3, 3], told  # too early to tell
    assert "run/checkpoint-6" in told[0][0]
    assert told[1] == ("", "")


def test_a_track_is_kept_by_rank_0_for_all(run: Path) -> None:
    first = ended(started(run, "track", "run", "-q"))
    again = ended(started(run, "track", "run", "-q"))
    assert (first[2], again[2]) == (set(), set())
    assert "2 measured" in first[0]
    assert "2 cached" in again[0]
    assert len(list(run.glob("cache/curv/reports/*.json"))) == 2


def test_a_budget_that_is_too_short_ends_all_ranks_with_3(run: Path) -> None:
    _, lines, codes = ended(started(run, "analyze", "run/checkpoint-6", "--budget", "2", "-q", "-o", "late.json"))
    assert codes == {3}
    assert len(lines) == 1
    assert "the budget of 2 s ran out" in lines[0]
    assert not list(run.glob("*late.json*"))


@pytest.mark.parametrize(
    ("fail", "said", "codes"),
    [
        ("raise,1,3", "rank 1 of 2: --loss failing_loss:loss failed: RuntimeError: a bug of this rank", {2}),
        ("raise,0,30", "rank 0 of 2: --loss failing_loss:loss failed: RuntimeError: a bug of this rank", {2}),
        ("nan,1,10", "rank 1 of 2: the gradient of the loss is not finite", {2}),
        ("memory,1,30", "rank 1 of 2: RuntimeError: ", {2}),
        ("limit,1,30", "rank 1 of 2: RuntimeError: ", {2}),
        ("once,1,30", "", set()),
    ],
)
def test_what_happens_to_one_rank_ends_all(fail: str, said: str, codes: set[int], run: Path) -> None:
    given = ["analyze", "run/checkpoint-6", "--no-depths", "--mode", "fresh", "--loss", "failing_loss:loss", "-q"]
    began = time.monotonic()
    _, lines, found = ended(started(run, *given, "-o", f"{fail}.json", FAIL=fail))
    assert in_time(time.monotonic() - began, 90)  # start of the processes, work up to the failure, and 30 s
    assert found == codes
    assert len(lines) == bool(said)
    assert not said or said in lines[0]
    assert bool(list(run.glob(f"*{fail}.json*"))) == (not codes)


@pytest.mark.parametrize("full", ["1,0", "0,6"])
def test_a_disk_that_is_full_on_one_rank_ends_all_with_its_name(full: str, run: Path) -> None:
    given = ["analyze", "run/checkpoint-6", "--no-depths", "--memory", "9GiB", "--loss", "full_disk:loss", "-q"]
    _, lines, codes = ended(started(run, *given, "-o", f"full{full}.json", FULL=full))
    assert codes == {2}
    assert len(lines) == 1
    assert lines[0].startswith(f"curv: error: rank {full[0]} of 2: cannot keep ")
    assert lines[0].endswith("No space left on device; set TMPDIR to a folder on another disk, or give it more --memory")
    assert not list(run.glob("*full*.json"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all(rank: int, run: Path) -> None:
    given = ["analyze", "run/checkpoint-6", "--no-depths", "--mode", "fresh", "--loss", "failing_loss:loss", "-q"]
    job = started(run, *given, "-o", f"killed{rank}.json", FAIL=f"kill,{rank},30")
    began = time.monotonic()
    _, err = job.communicate(timeout=240)
    assert in_time(time.monotonic() - began, 90)
    assert job.returncode == 1
    assert "(SIGKILL)" in err  # torchrun's own summary, which names the rank
    lines = [line for line in err.splitlines() if line.startswith("curv:")]
    # torchrun may end the other one before it has said so.
    assert all("lost the connection to another" in line for line in lines)
    assert len(lines) <= 1
    assert not list(run.glob("*killed*"))
