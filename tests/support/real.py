"""The command as a user has it, by its entry point: in this process, or in a process of its own.

`curv` runs `main()` here, which saves the seconds that importing torch takes: same arguments, environment, file
descriptors, exit code and output as a process has. test_processes.py holds every verb to that against a real process.
What a test here cannot hold (signals, pipes, terminals, what is imported, how long starting takes) asks `process`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any
from unittest.mock import patch

from curvcli.cli import app, main

CURV = [sys.executable, "-c", "from curvcli.cli import main; main()"]
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
# What the terminal or the CI job around the tests would change.
_AROUND = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PY_COLORS")

# Never closed: what is imported while a command runs may keep them.
_STDOUT = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
_STDERR = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def variables(**given: str) -> dict[str, str]:
    """The environment that a command gets: this one without what is around the tests, 80 columns, and what is given."""
    kept = {name: value for name, value in os.environ.items() if name not in _AROUND and not name.startswith("GITHUB_")}
    return {**kept, "COLUMNS": "80", **given}


def process(*arguments: object, **environment: str) -> Done:
    """What the command says and its exit code, in a process of its own."""
    command = [*CURV, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=variables(**environment))


def curv(*arguments: object, **environment: str) -> Done:
    """What the command says and its exit code, from its entry point in this process."""
    words = ["curv", *map(str, arguments)]
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        with ExitStack() as undo:
            undo.enter_context(patch.dict(os.environ, variables(**environment), clear=True))
            undo.enter_context(patch.object(sys, "argv", words))
            undo.enter_context(patch.object(sys, "path", list(sys.path)))
            undo.enter_context(patch.object(app, "rich_markup_mode", app.rich_markup_mode))
            undo.enter_context(_handlers())
            undo.enter_context(_streams(out, err))
            code = _exit_code(main)
        said = [_text(stream) for stream in (out, err)]
    return subprocess.CompletedProcess(words, code, *said)


def _exit_code(run: Callable[[], object]) -> int:
    """As the interpreter makes one of how a program ends."""
    try:
        run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _streams(out: IO[str], err: IO[str]) -> Iterator[None]:
    """Descriptors 1 and 2 are the files, so that also what is written past Python gets there."""
    for stream in (sys.stdout, sys.stderr, _STDOUT, _STDERR):
        stream.flush()  # what was said before is not the command's
    for logger in list(logging.Logger.manager.loggerDict.values()):
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if type(handler) is logging.StreamHandler:  # a library's, pointed at the stderr that it was imported under
                handler.stream = _STDERR
    before = os.dup(1), os.dup(2)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    try:
        with patch.multiple(sys, stdout=_STDOUT, stderr=_STDERR):
            yield
    finally:
        _STDOUT.flush()
        _STDERR.flush()
        for number, kept in enumerate(before, 1):
            os.dup2(kept, number)
            os.close(kept)


@contextmanager
def _handlers() -> Iterator[None]:
    """Signals are handled as by a new process; afterwards as before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _text(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


def inspected(path: object, *arguments: object, run: Run = curv, **environment: str) -> Any:
    """What `curv inspect` finds."""
    done = run("inspect", path, *arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def analyzed(path: object, data: Path | str, *arguments: object, run: Run = curv, **environment: str) -> Any:
    """What `curv analyze` measures of it in a few products."""
    few = ("--max-hvps", "4", "--no-depths", "--mode", "kept", "--device", "cpu", "--quiet", "--format", "json")
    done = run("analyze", path, "--data", data, *few, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["full"]["eigenvalue"] > 0
    return report


def refusal(*arguments: object, run: Run = curv, **environment: str) -> str:
    """Its one line of an error."""
    done = run(*arguments, **environment)
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("curv: fetching")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("curv: error: ")
    assert ";" in lines[0], "no remedy"
    return lines[0]
