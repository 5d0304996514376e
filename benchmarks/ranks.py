"""An analysis on 1, 2 and 4 ranks: time, work and memory of each, and how far its numbers are apart.

`python benchmarks/ranks.py`. One thread a rank. Wall time says little where there are fewer cores than ranks; a rank's CPU
seconds are its work, whatever the others do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import SAMPLES, save

from curvcli.analysis.checkpoint import analyze_checkpoint
from curvcli.analysis.launch import joined, leave
from curvcli.analysis.options import Options
from curvcli.curvature import resources

WORLDS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=SAMPLES / "hot" / "checkpoint-60")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--into", type=Path, help="be a rank, and write what it took into this directory")
    options = parser.parse_args()
    if options.into is not None:
        be_a_rank(options.checkpoint, options.tokens, options.into)
        return
    rows = [measured(options, world) for world in WORLDS]
    one = rows[0].pop("numbers")
    for row in rows:
        numbers = row.pop("numbers", one)
        row["largest_difference"] = max(abs(a - b) / abs(b) for a, b in zip(numbers, one, strict=True))
    said = {"checkpoint": "/".join(options.checkpoint.parts[-2:]), "tokens": options.tokens, "cores": os.cpu_count()}
    save("ranks", {**said, "torch": torch.__version__, "mode": "fresh, no depths", "ranks": rows})


def measured(options: argparse.Namespace, world: int) -> dict[str, Any]:
    """What all ranks took. CPU seconds and products are of the measurement; memory is of the process."""
    given = ["--checkpoint", str(options.checkpoint), "--tokens", str(options.tokens)]
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__]
        subprocess.run([*command, *given, "--into", place], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S603
        each = [json.loads((Path(place) / f"{rank}.json").read_text()) for rank in range(world)]
    return {
        "ranks": world,
        "wall_seconds": each[0]["wall"],
        "cpu_seconds_of_each": [rank["cpu"] for rank in each],
        "cpu_seconds_of_the_busiest": max(rank["cpu"] for rank in each),
        "peak_GiB_of_each": [rank["peak"] for rank in each],
        "products": each[0]["hvps"],
        "numbers": each[0]["numbers"],
    }


def be_a_rank(checkpoint: Path, tokens: int, into: Path) -> None:
    with joined():
        wall, cpu = time.perf_counter(), time.process_time()
        report = analyze_checkpoint(checkpoint, Options(tokens=tokens, mode="fresh", depths=False))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        spread = report.generalisation
        numbers = [part.eigenvalue for part in (report.full, *report.layers)] + [spread.rho_low, spread.rho_high]
        found = {
            "wall": round(wall, 1),
            "cpu": round(cpu, 1),
            "peak": round(resources.peak_bytes(torch.device("cpu")) / 2**30, 2),
            "hvps": report.cost.hvps,
            "numbers": numbers,
        }
        (into / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
