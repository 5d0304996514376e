"""Does the interval of the largest stable learning rate hold where rho has a bracket? On ramps that nothing was fitted on.

`python benchmarks/instability/brackets.py` trains ramps of the held-out seed again, measures them with the shard in eight
batches, which gives rho its bracket, and writes results/zoo_ramps.jsonl; it can be stopped at any moment. `--report` counts
how often the learning rate that broke a ramp lay within the interval, with the bracket counted in and without, and writes
results/zoo_ramps.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import HERE
from families import FAMILIES, Task
from labels import breaks
from parts import cut
from zoo import SEEDS, Run, measured, play, wanted

from curvcli.judge.calibration import Bracket, stable_lr

STORE = HERE / "results" / "zoo_ramps.jsonl"
NEAR, EARLY = 0.1, 16  # as in fit.py


def chosen() -> list[Run]:
    """Ramps of the held-out seed and of families that are not there for ramps alone, by a hash of what they are."""
    ramps = [r for r in wanted() if r.protocol == "ramp" and r.seed == SEEDS[-1] and FAMILIES[r.family].rows]
    steady = [run for run in ramps if not FAMILIES[run.family].ramps_only]
    return sorted(steady, key=lambda run: sha256(repr(run).encode()).hexdigest())


def look(task: Task, shard: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """rho with its bracket."""
    return measured(task, cut(shard), optimizer)


def points(row: dict[str, Any]) -> list[tuple[bool, bool]]:
    """Before the break, from rho 0.1 on: whether the interval held, with the bracket and without."""
    step = breaks(row["losses"], row["constant"])
    if step is None:
        return []
    broke = Run(row["family"], "ramp", row["lr"], row["seed"]).lr_at(step)
    found = []
    for p in row["probes"]:
        rho, low, high = p.get("rho"), p.get("rho_low"), p.get("rho_high")
        if not EARLY <= p["step"] < step or p.get("status") != "converged" or rho is None or rho < NEAR or low is None:
            continue
        held = []
        for bracket in (Bracket(min(low, rho), rho, max(high, rho)), Bracket(rho, rho, rho)):
            told = stable_lr(p["lr"], bracket, row["optimizer"])
            held.append(told is not None and told.low <= broke and (told.high is None or broke <= told.high))
        found.append((held[0], held[1]))
    return found


def report(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each ramp counts once, and within it each point."""
    each = {f"{r['family']}": points(r) for r in rows}
    known = {name: found for name, found in each.items() if found}
    shares = [[sum(p[k] for p in found) / len(found) for found in known.values()] for k in (0, 1)]
    return {
        "ramps": len(rows),
        "that broke after a point": len(known),
        "points": sum(map(len, known.values())),
        "held with the bracket": round(sum(shares[0]) / len(known), 3) if known else None,
        "held without": round(sum(shares[1]) / len(known), 3) if known else None,
        "families": {
            name: [len(found), sum(a for a, _ in found), sum(b for _, b in found)] for name, found in known.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="count what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in STORE.read_text().splitlines()] if STORE.exists() else []
    done = {row["family"] for row in rows}
    for run in [] if options.report else [r for r in chosen() if r.family not in done]:
        row = play(run, look)
        rows.append(row)
        with STORE.open("a") as stream:
            stream.write(json.dumps(row, separators=(",", ":")) + "\n")
        print(f"{run.family}: {row['seconds']} s", flush=True)
    text = json.dumps(report(rows), indent=1) + "\n"
    (HERE / "results" / "zoo_ramps.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
