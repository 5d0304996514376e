"""Does Z tell, of Lion and Muon, what rho tells of the others? `python benchmarks/steepest.py`.

Trains the runs that results/steepest.jsonl does not hold yet, and can be stopped at any moment; `--report` only makes the
table of what is there. Two families of `instability/`, with Lion, and with torch.optim.Muon for the matrices of the blocks
beside an AdamW at 3e-3 that stays as it is. Ramps raise the learning rate (Muon's alone) tenfold every 80 steps until the
loss breaks; the others have a constant one. Labels are those of `instability/labels.py`, from the loss alone. Z is the
tracker's, on 16 rows, every tenth step of ramps and every twentieth of the others.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "instability"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import torch
from common import HERE, save
from families import FAMILIES, build
from labels import breaks, label
from normalised import Lion, split  # tests/support
from score import auc
from torch import nn
from zoo import QUIET, TENFOLD, over

from curvcli.training import CurvatureTracker

STORE = HERE / "results" / "steepest.jsonl"
STEPS, MOST, PRODUCTS = 200, 300, 12
BEGIN = {"lion": 3e-5, "muon": 1e-3}
LRS = {"lion": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "muon": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
EARLY, LATE = 20, 100  # steps between which the median Z of a run is taken


@dataclass(frozen=True)
class Run:
    """Everything that a run's result depends on."""

    network: str
    optimizer: str
    protocol: str  # ramp, constant
    lr: float
    seed: int

    def lr_at(self, step: int) -> float:
        return self.lr * (10 ** (max(step - QUIET, 0) / TENFOLD) if self.protocol == "ramp" else 1)


def wanted() -> list[Run]:
    kinds = list(product(("post-norm", "pre-norm-deep"), BEGIN))
    ramps = [Run(network, kind, "ramp", BEGIN[kind], seed) for seed in range(3) for network, kind in kinds]
    rest = [Run(network, kind, "constant", lr, seed) for seed in range(2) for network, kind in kinds for lr in LRS[kind]]
    return ramps + rest


def optimizers(run: Run, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The one whose learning rate is the run's, and what stands beside it."""
    if run.optimizer == "lion":
        return [Lion(model.parameters(), lr=run.lr)]
    inside, others = split(model)
    return [torch.optim.Muon(inside, lr=run.lr, weight_decay=0.0), torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0)]


def play(run: Run) -> dict[str, Any]:
    started = process_time()
    family = FAMILIES[run.network]
    task = build(family, run.seed)
    steps = optimizers(run, task.model)
    draw, shard = (torch.Generator().manual_seed(base + run.seed) for base in (1000, 2000))
    ramp = run.protocol == "ramp"
    tracker = CurvatureTracker(
        task.model, steps if len(steps) > 1 else steps[0], task.loss, probe=[task.draw(16, shard)],
        every=10 if ramp else 20, update_ratio=False, max_hvps=PRODUCTS,
    )  # fmt: skip
    losses: list[float] = []
    z: list[tuple[int, float]] = []
    for step in range(MOST if ramp else STEPS):
        for group in steps[0].param_groups:
            group["lr"] = run.lr_at(step)
        value = task.loss(task.model, task.draw(family.rows, draw))
        for one in steps:
            one.zero_grad(set_to_none=True)
        value.backward()
        norm = float(nn.utils.clip_grad_norm_(task.model.parameters(), 1.0))
        losses.append(float(value.detach()))
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            break
        for one in steps:
            one.step()
        if (found := tracker.step(step)) and found.z is not None:
            z.append((step, float(f"{found.z:.4g}")))
        if ramp and over(losses, task.constant):
            break
    return {
        **asdict(run),
        "family": f"{run.network}, {run.optimizer}",
        "constant": round(task.constant, 5),
        "losses": [float(f"{v:.5g}") if math.isfinite(v) else None for v in losses],
        "z": z,
        "seconds": round(process_time() - started, 1),
    }


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where Z is when ramps break, and what its median says of how runs at a constant rate end."""
    found: dict[str, Any] = {"torch": torch.__version__, "runs": len(rows), "families": {}}
    labels = label(rows)
    for family in sorted({row["family"] for row in rows}):
        mine = [(row, told) for row, told in zip(rows, labels, strict=True) if row["family"] == family]
        ramps = []
        for row, _ in mine:
            at = breaks(row["losses"], row["constant"]) if row["protocol"] == "ramp" else None
            if at is None:
                continue
            run = Run(**{name: row[name] for name in Run.__dataclass_fields__})
            crossed = next((step for step, z in row["z"] if z >= 1 and step >= QUIET), None)
            before = [z for step, z in row["z"] if at - 20 <= step < at]
            ramps.append(
                {
                    "breaking_lr": float(f"{run.lr_at(at):.3g}"),
                    "z_before": round(median(before), 2) if before else None,
                    "crossed_at": None if crossed is None else float(f"{run.lr_at(crossed) / run.lr_at(at):.3g}"),
                }
            )
        scored = []
        for row, told in mine:
            early = [z for step, z in row["z"] if EARLY <= step <= LATE]
            if row["protocol"] == "constant" and early:
                scored.append((median(early), row["lr"], bool(told["badly"])))
        found["families"][family] = {
            "ramps": ramps,
            "constant": [
                {"lr": lr, "median_z": round(z, 2), "ends_badly": badly}
                for z, lr, badly in sorted(scored, key=lambda s: s[1])
            ],
            "auc_z": auc([(z, badly) for z, _, badly in scored]),
            "auc_lr": auc([(lr, badly) for _, lr, badly in scored]),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in STORE.read_text().splitlines()] if STORE.exists() else []
    known = {Run(**{name: row[name] for name in Run.__dataclass_fields__}) for row in rows}
    for run in [] if options.report else [run for run in wanted() if run not in known]:
        rows.append(play(run))
        with STORE.open("a") as stream:
            stream.write(json.dumps(rows[-1]) + "\n")
        print(run, rows[-1]["seconds"], len(rows[-1]["losses"]), flush=True)
    save("steepest", report(rows))


if __name__ == "__main__":
    main()
