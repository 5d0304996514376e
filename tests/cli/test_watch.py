"""`curv watch`: following a log through whatever happens to it, what is drawn, and the command in a real terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from terminal import CURV, Terminal
from typer.testing import CliRunner

from curvcli.cli import app
from curvcli.documents import Follower, Log, Record, find_log, load_records
from curvcli.errors import InputError
from curvcli.render.fit import fitting, thin
from curvcli.render.plot_log import plot_log, series
from curvcli.render.watch import LEAST_NEEDED, TITLES, curve, draw, header, screen


def record(step: int, rho: float | None = 0.5, **changes: object) -> Record:
    values = {
        "step": step, "loss": 3.2, "lr": 1e-3, "eigenvalue": None if rho is None else rho * 38_000, "rho": rho,
        "residual": None if rho is None else 12.0, "update_ratio": None, "active_depth": 4, "hvps": 12, "seconds": 1.5,
        "status": "converged" if rho is not None else "failed",
    }  # fmt: skip
    return Record.model_validate({**values, **changes})


def write(path: Path, *records: Record | str, mode: str = "a") -> None:
    with path.open(mode) as stream:
        stream.writelines(r if isinstance(r, str) else r.to_line() for r in records)


def steps(log: Log) -> list[int]:
    return [r.step for r in log.records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "curvature.jsonl"


# --- following -------------------------------------------------------------------------------------------------------


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


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_curve_breaks_where_nothing_is_known() -> None:
    records = (
        record(0, active_depth=2), record(10, 0.6, active_depth=2), record(20, None), record(30, 0.7),
        record(40, 9.0, status="unconverged", active_depth=None), record(50, 0.8, active_depth=6),
    )  # fmt: skip
    data = curve(records)
    assert data.runs == [[(0, 0.5), (10, 0.6)], [(30, 0.7)], [(50, 0.8)]]
    assert data.doubtful == [(40, 9.0)]
    assert data.missing == [20]
    assert data.unlocks == [(20, 4), (50, 6)]
    assert (data.logarithmic, data.below) == (True, 0)


def test_a_logarithmic_axis_says_what_it_leaves_out() -> None:
    data = curve((record(0, -0.1), record(10, 0.1), record(20, 50.0)))
    assert data.runs == [[(10, 0.1), (20, 50.0)]]
    assert data.below == 1
    assert curve((record(0, -0.1), record(10, 1.0))).below == 0
    text = draw((record(0, -0.1), record(10, 0.1), record(20, 50.0)), 80, 14).plain
    assert "1 not above 0, off the log axis" in text
    assert [line.split("┤")[0].strip() for line in text.splitlines() if "┤" in line and line.strip()[0] != "│"] != []


def test_thinning_keeps_a_spike() -> None:
    points = [(step, 0.5) for step in range(10_000)]
    points[6543] = (6543, 40.0)
    kept = thin(points, 80)
    assert len(kept) <= 320
    assert {points[0], points[6543], points[-1]} <= set(kept)
    assert thin(points[:10], 80) == points[:10]


def test_the_edge_and_unlocks_are_where_they_should_be() -> None:
    records = tuple(record(step, 0.1 + step / 500, active_depth=2 if step < 300 else 4) for step in range(0, 601, 10))
    lines = draw(records, 80, 16).plain.splitlines()
    assert len(lines) == 16
    assert max(map(len, lines)) <= 80
    edge = next(line for line in lines if line.strip().startswith("1├"))
    assert edge.count("─") > 60
    # Half way along the axis, in every line of the canvas that the curve does not cross there.
    column = round(4 + 0.5 * 74)
    crossings = [n for n, line in enumerate(lines[2:-2]) if line[column - 1 : column + 2].strip("⠀ ")]
    assert len(crossings) == len(lines[2:-2])
    assert draw(records, 80, 16, utf8=False).plain.isascii()


@pytest.mark.parametrize(("rho", "said"), [(0.5, "STABLE"), (1.0, "EDGE"), (1.3, "UNSTABLE")])
def test_status_against_the_limits(rho: float, said: str) -> None:
    log = Log(Path("x"), exists=True, records=(record(0, rho),), age=3.0)
    assert f" {said} " in header(log).plain


def test_a_failed_record_is_no_number() -> None:
    log = Log(Path("x"), exists=True, records=(record(0, 0.7), record(10, None, message="oom \x1b[2J\nx")), age=3.0)
    text = header(log).plain
    assert " UNRESOLVED   no rho, failed: oom ?[2J x" in text
    assert "the last one was 0.700 at step 0" in text
    doubtful = Log(Path("x"), exists=True, records=(record(0, 0.7, status="unconverged"),), age=3.0)
    assert " UNRESOLVED " in header(doubtful).plain
    assert "not to be relied on" in header(doubtful).plain


@pytest.mark.parametrize("width", [40, 60, 80, 140])
@pytest.mark.parametrize("height", [8, 16, 24, 50])
def test_a_frame_keeps_within_the_terminal(width: int, height: int) -> None:
    records = tuple(record(1000 + step * 10, 0.1 + step / 100, active_depth=step // 40) for step in range(120))
    log = Log(Path("run/curvature.jsonl"), exists=True, records=records, damaged=3, damage="line 7: no", age=4.0, gap=9.0)
    console = Console(width=width, height=height, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    lines = console.render_lines(screen(log, console, tail=12, height=height), pad=False)
    assert len(lines) < height or height == 8
    assert all(sum(s.cell_length for s in line) <= width for line in lines)
    shown = "\n".join("".join(s.text for s in line) for line in lines)
    assert ("status" in shown and "2,190" in shown) or height == 8


def test_a_narrow_table_loses_the_least_needed_columns() -> None:
    cells = [dict.fromkeys(("step", "loss", "lr", "lambda", "rho", "residual", "update", "depth"), "1234567")
             | dict.fromkeys(("HVPs", "seconds", "status"), "12345678")]  # fmt: skip
    assert len(fitting(cells, 140, TITLES, LEAST_NEEDED)) == 11
    assert "residual" not in fitting(cells, 80, TITLES, LEAST_NEEDED)
    assert fitting(cells, 5, TITLES, LEAST_NEEDED) == ["step", "rho", "status"]


def test_series_of_the_picture() -> None:
    records = (record(0, 0.5), record(10, None), record(20, 0.9, status="unconverged"), record(30, 0.0))
    data = series(records)
    assert repr(data["rho"]) == "([0, 10, 20, 30], [0.5, nan, nan, 0.0])"
    assert repr(data["rho, not converged"][1]) == "[nan, nan, 0.9, nan]"
    assert repr(data["threshold"][1]) == "[38000.0, nan, nan, nan]"
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        picture = plot_log(Log(Path("x"), exists=True, records=records), suffix)
        assert picture.startswith(start)
        assert picture == plot_log(Log(Path("x"), exists=True, records=records), suffix) or suffix == "svg"
    assert plot_log(Log(Path("x"), exists=True), "png").startswith(b"\x89PNG")


# --- the command -----------------------------------------------------------------------------------------------------


def test_one_frame_when_piped(path: Path) -> None:
    write(path, *(record(step, 0.9) for step in range(0, 300, 10)), "junk\n")
    picture = path.with_suffix(".png")
    for extra in ([], ["--once", "--tail", "3"], ["--plot", str(picture)]):
        environment = {**os.environ, "COLUMNS": "80"}
        done = subprocess.run(
            [*CURV, "watch", str(path), *extra], capture_output=True, text=True, env=environment, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert " EDGE   rho 0.900" in done.stdout
        assert "1 damaged line, the last: line 31: " in done.stdout
        assert done.stdout.count("converged") == (3 if extra[:1] == ["--once"] else 12)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_usage(tmp_path: Path, path: Path) -> None:
    for arguments, said in (
        ([str(tmp_path / "nowhere"), "--once"], "is no log and holds none"),
        ([str(tmp_path), "--once"], "is no log and holds none"),
        ([str(tmp_path), "--plot", "picture.bmp"], ".png"),
    ):
        result = CliRunner().invoke(app, ["watch", *arguments])
        assert (result.exit_code, result.stdout) == (2, "")
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
    path.touch()
    result = CliRunner().invoke(app, ["watch", str(path)])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "no record yet")
    help_text = CliRunner().invoke(app, ["watch", "--help"]).stdout
    assert "curv watch run/curvature.jsonl" in help_text


def test_imports_no_torch(path: Path) -> None:
    write(path, record(0))
    script = (
        f"import sys; sys.argv = ['curv', 'watch', {str(path)!r}, '--plot', {str(path.with_suffix('.svg'))!r}]\n"
        "from curvcli.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_a_running_job_in_a_real_terminal(tmp_path: Path, columns: int) -> None:
    path = tmp_path / "curvature.jsonl"
    terminal = Terminal(columns, 30, "watch", str(tmp_path), "--interval", "0.2")
    terminal.until("waiting for it")
    job = (
        "import sys, time\nlines = sys.stdin.readlines()\n"
        "for line in lines:\n"
        f"    with open({str(path)!r}, 'a') as log:\n"
        "        log.write(line[:50]); log.flush(); time.sleep(0.03); log.write(line[50:])\n"
    )
    lines = "".join(record(s, 0.02 * s, active_depth=2 if s < 25 else 4).to_line() for s in range(45))
    with subprocess.Popen([sys.executable, "-c", job], stdin=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        writer.stdin.write(lines)
        writer.stdin.close()
        terminal.until("records, last written")
        assert "step 44" not in "\n".join(terminal.screen.display), "the job is over: nothing was seen of it running"
        shown = terminal.until("step 44, 45 records")
    assert "1├" in shown
    assert "1 unlock, to depth 4 at 25" in shown
    assert "rho 0.880" in shown
    assert "EDGE" in shown
    terminal.resize(50, 20)
    terminal.until("step 44, 45 records")
    terminal.read(0.6)
    assert max(len(line.rstrip()) for line in terminal.screen.display) <= 50
    assert terminal.interrupt() == 130
    # The terminal has its own screen and cursor back, and the last frame stands on it.
    assert terminal.raw.count(b"\x1b[?1049h") == terminal.raw.count(b"\x1b[?1049l") == 1
    assert terminal.raw.rfind(b"\x1b[?25h") > terminal.raw.rfind(b"\x1b[?25l")
    last = terminal.raw[terminal.raw.rfind(b"\x1b[?1049l") :].decode()
    assert "step 44, 45 records" in last
    assert "curv: interrupted" in last
    assert "Traceback" not in last


def test_termination_gives_the_screen_back_and_no_color_is_obeyed(path: Path) -> None:
    write(path, *(record(step, 1.5) for step in range(30)))
    terminal = Terminal(80, 24, "watch", str(path), NO_COLOR="1")
    terminal.until("UNSTABLE")
    assert terminal.interrupt(signal.SIGTERM) == 143
    assert terminal.raw.rfind(b"\x1b[?1049l") > terminal.raw.rfind(b"\x1b[?1049h")
    assert b"\x1b[38;5" not in terminal.raw
    assert b"[31" not in terminal.raw


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
