"""The real command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_CURV = [sys.executable, "-c", "from curvcli.cli import main; main()"]


def curv(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Its exit code and what it said."""
    return subprocess.run(
        [*_CURV, *map(str, arguments)], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def inspected(path: object, *arguments: object, **environment: str) -> Any:
    """What `curv inspect` finds."""
    done = curv("inspect", path, *arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def analyzed(path: object, data: Path | str, *arguments: object, **environment: str) -> Any:
    """What `curv analyze` measures of it in a few products."""
    few = ("--max-hvps", "4", "--no-depths", "--device", "cpu", "--quiet", "--format", "json")
    done = curv("analyze", path, "--data", data, *few, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["full"]["eigenvalue"] > 0
    return report


def refusal(*arguments: object, **environment: str) -> str:
    """Its one line of an error."""
    done = curv(*arguments, **environment)
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("curv: fetching")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("curv: error: ")
    assert ";" in lines[0], "no remedy"
    return lines[0]
