"""Every verb in a process of its own: it does what the same words do from the entry point in a test's process.

The other tests of the command run it there (support/real.py), which holds only as long as this does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import real
from places import ASSETS
from tiny import run_of
from typer.main import get_group

from curvcli.cli import app

LOG = (
    '{"schema":"curv.curvature/1","step":5,"loss":3.2,"lr":0.001,"eigenvalue":9000.0,"rho":1.5,"residual":12.0,'
    '"update_ratio":null,"active_depth":4,"hvps":12,"seconds":1.5,"status":"converged"}\n'
)
FEW = "--tokens 64 --max-hvps 3 --device cpu --mode kept"
# What is asked of each verb, and the exit code.
LINES = {
    f"analyze {{run}}/checkpoint-3 --no-depths {FEW} --format csv -q": 0,
    "inspect {samples}/calm --json": 0,
    "demo -o {assets}": 2,
    "doctor --data": 2,
    "init {assets}/none": 2,
    f"track {{run}} --last 1 {FEW} --format csv -q": 0,
    "compare {assets}/calm-60.gate.report.json {assets}/hot-60.gate.report.json": 0,
    "explain {assets}/none": 2,
    "report {assets}/hot-60.report.json": 0,
    "gate {assets}/hot-60.gate.report.json --max-rho 1": 1,
    "gate {assets}/hot-60.gate.report.json --max-rho 1.46": 3,
    "gate {assets}/hot-60.gate.report.json": 2,
    "schedule --depth 48 --lr 0.003": 0,
    "schedule verify {assets}/none.json {samples}/hot": 2,
    "schema report": 0,
    "watch {log} --once": 0,
    "--version": 0,
    "analyse": 2,
}


# A verb that imports torch takes seconds to begin: of those that do, the first is enough for every day.
SLOW = [line for line in LINES if line.split()[0] in ("track", "explain", "init", "inspect")]


@pytest.mark.parametrize("line", [pytest.param(ln, marks=pytest.mark.slow) if ln in SLOW else ln for ln in LINES])
def test_a_process_does_what_the_entry_point_does_here(line: str, samples: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(LOG)
    os.utime(tmp_path / "log.jsonl", (1, 1))  # so long ago that the age is the same both times
    run = run_of(tmp_path, 3) if "{run}" in line else None
    words = [word.format(samples=samples, assets=ASSETS, log=tmp_path / "log.jsonl", run=run) for word in line.split()]
    here = real.curv(*words, XDG_CACHE_HOME=str(tmp_path / "here"))
    there = real.process(*words, XDG_CACHE_HOME=str(tmp_path / "there"))
    assert there.returncode == LINES[line], there.stderr
    assert (here.returncode, here.stdout) == (there.returncode, there.stdout)
    # A line of progress comes where importing torch takes long.
    said = [[part for part in done.stderr.splitlines() if "%" not in part] for done in (here, there)]
    assert said[0] == said[1]


def test_every_verb_has_a_line() -> None:
    asked = {word for line in LINES for word in line.split()[:2]}
    assert set(get_group(app).commands) <= asked


def test_the_entry_point_leaves_this_process_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = (
        dict(os.environ), list(sys.path), list(sys.argv), sys.stdout, sys.stderr, app.rich_markup_mode,
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
    )  # fmt: skip
    done = real.curv("schedule", "--help", COLUMNS="60", NO_COLOR="1")
    assert done.returncode == 0
    assert done.stdout.count("\n") > 20
    os.write(1, b"to the test's own stdout")
    assert before == (
        dict(os.environ), list(sys.path), list(sys.argv), sys.stdout, sys.stderr, app.rich_markup_mode,
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
    )  # fmt: skip
    assert capfd.readouterr() == ("to the test's own stdout", "")


def test_what_was_said_before_is_not_the_commands() -> None:
    library, handler = logging.getLogger("a library"), logging.StreamHandler()
    handler.flush = lambda: None  # type: ignore[method-assign]  # as that of transformers, which flushes another stream
    library.addHandler(handler)
    real.curv("--version")  # from here on the library's handler writes where the command does
    library.warning("said between two commands")
    assert real.curv("--version").stderr == ""
    library.removeHandler(handler)
