"""`curv watch` by its command: piped, and in a real terminal."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from logs import record, write
from real import curv
from terminal import Terminal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "curvature.jsonl"


def test_one_frame_when_piped(path: Path) -> None:
    write(path, *(record(step, 0.9) for step in range(0, 300, 10)), "junk\n")
    picture = path.with_suffix(".png")
    for extra in ([], ["--once", "--tail", "3"], ["--plot", str(picture)]):
        done = curv("watch", path, *extra)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert " EDGE   rho 0.900" in done.stdout
        assert "1 damaged line, the last: line 31: " in done.stdout
        assert done.stdout.count("converged") == (3 if extra[:1] == ["--once"] else 12)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_usage(tmp_path: Path, path: Path) -> None:
    for arguments, said in (
        ([str(tmp_path / "nowhere"), "--once"], "nowhere does not exist;"),
        ([str(tmp_path), "--once"], " holds no curvature.jsonl; a tracker in the job writes one, and curv track measures"),
        ([str(tmp_path), "--plot", "picture.bmp"], ".png"),
    ):
        done = curv("watch", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    path.touch()
    done = curv("watch", path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "no record yet")
    help_text = curv("watch", "--help").stdout
    assert "curv watch run/curvature.jsonl" in help_text


@pytest.mark.slow
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


@pytest.mark.parametrize("columns", [pytest.param(n, marks=pytest.mark.slow) for n in (60, 80, 140)])
def test_a_running_job_in_a_real_terminal(tmp_path: Path, columns: int) -> None:
    path = tmp_path / "curvature.jsonl"
    terminal = Terminal(columns, 30, "watch", str(tmp_path), "--interval", "0.2")
    terminal.until("waiting for it")
    job = (
        "import sys, time\nfor line in sys.stdin:\n"
        f"    with open({str(path)!r}, 'a') as log:\n"
        "        log.write(line[:50]); log.flush(); time.sleep(0.03); log.write(line[50:])\n"
    )
    lines = [record(s, 0.02 * s, active_depth=2 if s < 25 else 4).to_line() for s in range(45)]
    with subprocess.Popen([sys.executable, "-c", job], stdin=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        # The job goes on when it was seen running, however slow this machine is: no clock decides what there is to see.
        writer.stdin.writelines(lines[:20])
        writer.stdin.flush()
        terminal.until("step 19, 20 records, last written")
        writer.stdin.writelines(lines[20:])
        writer.stdin.close()
        terminal.until("step 44, 45 records", "1├", "1 unlock, to depth 4 at 25", "rho 0.880", "EDGE")
    terminal.resize(50, 20)
    # Drawn anew for the size: a row of fewer columns, whole on its line.
    terminal.until("44 3.200 0.00100 33,440 0.880     4 converged")
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


def test_a_log_is_none_of_what_other_verbs_take(path: Path) -> None:
    write(path, record(0), record(1))
    for words, said in (
        (["gate", path, "--max-rho", "1"], "is lines of JSON, and no document; curv watch and curv report show a job's log"),
        (["compare", path, path], "is lines of JSON, and no document; curv watch and curv report show a job's log"),
        (["analyze", path], "is in no known checkpoint format; it is a job's log, which curv watch and curv report show"),
        (
            ["track", path],
            "it is a job's log, which curv watch and curv report show: give a checkpoint or the run's directory",
        ),
    ):
        done = curv(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
