"""curv as `torchrun -m curvcli` starts it, and what it told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from places import ROOT

COMMAND = [sys.executable, "-m", "torch.distributed.run"]


def started(
    place: Path, *arguments: str, ranks: int = 2, how: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    """curv under torchrun, with a cache of its own."""
    environment = {
        **os.environ,
        **variables,
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(place / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    how = how or ("--standalone",)
    return subprocess.Popen(
        [*COMMAND, *how, f"--nproc-per-node={ranks}", "-m", "curvcli", *arguments],
        cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(job: subprocess.Popen[str]) -> tuple[str, list[str], set[int]]:
    """What it printed, curv's own lines on stderr, and the exit codes of the ranks that torchrun tells of."""
    out, err = job.communicate(timeout=240)
    lines = [line for line in err.splitlines() if line.startswith("curv:")]
    codes = {int(code) for code in re.findall(r"exitcode *: (-?\d+)", err)}
    assert bool(codes) == bool(job.returncode), err
    return out, lines, codes
