"""Following a log through whatever happens to it."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from logs import record, steps, write

from curvcli.documents import Follower, Log, Record, find_log, load_records, log
from curvcli.errors import InputError
from curvcli.render.watch import header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "curvature.jsonl"


def test_waits_for_the_file_and_reads_what_is_appended(path: Path) -> None:
    follower = Follower(path)
    assert not follower.poll().exists
    write(path, record(0), record(10))
    assert steps(follower.poll()) == [0, 10]
    write(path, record(20, 0.7))
    log = follower.poll()
    assert steps(log) == [0, 10, 20]
    assert log.records[-1] == record(20, 0.7)
    assert (log.damaged, log.superseded, log.replaced, log.half) == (0, 0, 0, False)


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_a_half_written_line_is_read_when_it_is_whole(path: Path, cut: int) -> None:
    line = record(10).to_line()
    write(path, record(0), line[:cut])
    follower = Follower(path)
    first = follower.poll()
    assert (steps(first), first.half, first.damaged) == ([0], True, 0)
    write(path, line[cut:])
    second = follower.poll()
    assert (steps(second), second.half, second.damaged) == ([0, 10], False, 0)


def test_a_log_larger_than_any_jobs_is_refused_unread(path: Path) -> None:
    """A sparse file takes no room on the disk; its one line would be looked at for minutes."""
    write(path, record(0))
    os.truncate(path, 2**28 + 1)
    with pytest.raises(InputError, match=r"curvature\.jsonl is larger than 256 MiB; .*tail -n"):
        load_records(path)


def test_a_file_that_says_it_is_empty_is_bounded_as_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_MOST", 10)
    with pytest.raises(InputError, match="larger than"):
        load_records(Path("/proc/self/maps"))


@pytest.mark.parametrize(("limit", "said"), [("_RECORDS", "more than 3 records"), ("_MOST", "larger than")])
def test_a_log_that_outgrows_the_limits_while_it_is_watched(
    path: Path, limit: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, *(record(step) for step in range(3)))
    monkeypatch.setattr(log, limit, 3 if limit == "_RECORDS" else path.stat().st_size)
    follower = Follower(path)
    assert steps(follower.poll()) == [0, 1, 2]
    write(path, record(2))  # of a resumed job, in the place of one that is there
    if limit == "_RECORDS":
        assert steps(follower.poll()) == [0, 1, 2]
    write(path, record(3))
    with pytest.raises(InputError, match=said):
        follower.poll()


def test_a_whole_line_without_its_newline_counts_once(path: Path) -> None:
    write(path, record(0), record(10).to_line().rstrip())
    follower = Follower(path)
    assert steps(follower.poll()) == [0, 10]
    write(path, "\n", record(20), "broken\n")
    log = follower.poll()
    assert steps(log) == [0, 10, 20]
    assert log.damage is not None
    assert log.damage.startswith("line 4: ")
    assert log.superseded == 0


def test_a_resumed_job_supersedes_what_came_after_its_checkpoint(path: Path) -> None:
    write(path, *(record(step) for step in (10, 20, 30, 40, 50)))
    follower = Follower(path)
    follower.poll()
    write(path, record(30, 0.9))
    log = follower.poll()
    assert (steps(log), log.superseded, log.records[-1].rho) == ([10, 20, 30], 3, 0.9)
    write(path, record(30, 0.8), record(35))
    log = follower.poll()
    assert (steps(log), log.superseded, log.records[-2].rho) == ([10, 20, 30, 35], 4, 0.8)


def test_truncated_replaced_and_gone(path: Path) -> None:
    write(path, *(record(step) for step in (10, 20, 30)))
    follower = Follower(path)
    follower.poll()
    write(path, record(5), mode="w")
    assert (steps(log := follower.poll()), log.replaced) == ([5], 1)
    # Rewritten in place to the same length, and to a greater one: neither inode nor size tells.
    write(path, record(7), mode="w")
    assert (steps(log := follower.poll()), log.replaced) == ([7], 2)
    write(path, record(8), record(9), mode="w")
    assert (steps(log := follower.poll()), log.replaced) == ([8, 9], 3)
    other = path.with_name("other")
    write(other, record(8), record(9), record(11))
    other.replace(path)
    assert (steps(log := follower.poll()), log.replaced) == ([8, 9, 11], 4)
    path.unlink()
    log = follower.poll()
    assert (steps(log), log.exists, log.age) == ([8, 9, 11], False, None)


def test_damaged_and_foreign_lines_are_counted_and_shown(path: Path) -> None:
    foreign = record(3).to_line().replace("curv.curvature/1", "curv.other/9")
    infinite = record(3).to_line().replace("0.5", "Infinity", 1)
    assert "Infinity" in infinite
    write(path, record(0), "\n", "{}\n", foreign, infinite, "\x00\x1b[2J\n", "[" * 100_000 + "\n", record(10))
    log = Follower(path).poll()
    assert (steps(log), log.damaged) == ([0, 10], 5)
    assert log.damage is not None
    assert log.damage.startswith("line 7: ")


def test_a_line_without_end_takes_no_memory(path: Path) -> None:
    write(path, record(0))
    with path.open("ab") as stream:
        stream.truncate(path.stat().st_size + (5 << 20))
        stream.seek(0, os.SEEK_END)
    follower = Follower(path)
    assert (steps(log := follower.poll()), log.half, log.damaged) == ([0], True, 0)
    write(path, "\n", record(10))
    assert (steps(log := follower.poll()), log.half, log.damaged) == ([0, 10], False, 1)
    assert log.damage == "line 2: longer than 1 MiB"


def test_age_gap_and_stall(path: Path) -> None:
    now = 1000.0
    follower = Follower(path, clock=lambda: now)

    def at(when: float, *records: Record) -> Log:
        nonlocal now
        write(path, *records)
        os.utime(path, (when, when))
        now = when + 1
        return follower.poll()

    log = at(1000, *(record(step) for step in range(50)))
    assert (log.age, log.gap, log.stalled) == (1, None, False)
    for number in range(5):
        log = at(1010 + 10 * number, record(60 + number))
    assert log.gap == 10
    now = 1050 + 39
    assert not follower.poll().stalled
    now = 1050 + 41
    assert follower.poll().stalled
    assert "looks stalled" in header(follower.poll()).plain
    # Two records in one look, after 20 s: 10 s each.
    assert at(1070, record(70), record(71)).gap == 10


def test_what_a_directory_means(tmp_path: Path) -> None:
    assert find_log(tmp_path) is None
    assert find_log(tmp_path / "nowhere") is None
    for name, when in (("a", 200), ("b", 100)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "curvature.jsonl", record(0))
        os.utime(tmp_path / name / "curvature.jsonl", (when, when))
    assert find_log(tmp_path) == tmp_path / "a" / "curvature.jsonl"
    write(tmp_path / "curvature.jsonl", record(0))
    os.utime(tmp_path / "curvature.jsonl", (1, 1))
    assert find_log(tmp_path) == tmp_path / "curvature.jsonl"


def test_what_cannot_be_read(tmp_path: Path, samples: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        load_records(tmp_path / "pipe")
    with pytest.raises(InputError, match="does not exist"):
        load_records(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no curv.curvature/1 log: line 32: Invalid JSON"):
        load_records(samples / "calm" / "checkpoint-10" / "config.json")


@pytest.mark.slow
def test_a_writer_at_full_speed_loses_nothing(path: Path) -> None:
    """Readers see any cut of the bytes: at the end all records are there, in order, none damaged."""
    lines = "".join(record(step).to_line() for step in range(2000)).encode()

    def job() -> None:
        with path.open("ab", buffering=0) as stream:
            for start in range(0, len(lines), 777):
                stream.write(lines[start : start + 777])
                time.sleep(0.0005)  # so that the reader gets its turns on any machine

    writer = threading.Thread(target=job)
    follower = Follower(path)
    writer.start()
    looks = 0
    while writer.is_alive():
        log = follower.poll()
        looks += 1
        assert log.damaged == 0
    writer.join()
    assert steps(follower.poll()) == list(range(2000))
    assert looks > 2
    assert json.loads(lines.splitlines()[0])["schema"] == "curv.curvature/1"
