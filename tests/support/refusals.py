"""What must be refused in one line, and that line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from real import curv


class Evil:
    """In a pickle: a call that leaves a file behind where it is carried out."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return (os.system, (f"touch {self.target}",))


def truncate(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def one_line(arguments: list[str]) -> str:
    """What `curv analyze` says of input that is wrong."""
    done = curv("analyze", "--quiet", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "internal error" not in lines[0]
    assert ";" in lines[0], "no remedy"
    return lines[0]
