"""Do architecture warm-up, residual gates and their rivals help where plain training breaks?

`python benchmarks/warmup.py` trains the runs that results/warmup.jsonl does not hold yet, and can be stopped at any moment;
with `--report` it only makes the tables and the figure of what is there. Two families of `instability/` that break:
Transformers with the norm behind the sum (4 blocks) and before it (6 blocks), without a warm-up of the learning rate. Ramps
raise the rate tenfold every 80 steps until the loss breaks, by the rule of `instability/labels.py`; the other runs have a
constant rate.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev
from time import process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "instability"))

import torch
from common import HERE
from families import FAMILIES, WIDTH, Attention, Task, build, optimizer_of
from labels import breaks, final
from matplotlib.figure import Figure
from torch import Tensor, nn
from zoo import QUIET, TENFOLD, over

from curvcli.documents import Phase, Schedule, ScheduleProvenance, Versions
from curvcli.training import ArchitectureWarmup, CurvatureTracker

STORE = HERE / "results" / "warmup.jsonl"
STEPS, MOST, WARMUP = 200, 300, 20
OPEN = 100  # step at which the last block is unlocked, or its gate open
UNLOCKS = (60, 80, OPEN)
EARLIEST, LATEST = (20, 30, 40), (140, 160, 180)  # between which curvature may trigger each
SEEDS, TUNING = range(5), (100, 101)
CLIPS = (0.03, 0.1, 0.3, 3.0)  # beside the 1 of all other runs
LRS = {"post-norm": (3e-3, 1e-2, 3e-2), "pre-norm-deep": (3e-2, 1e-1, 3e-1)}
ARMS = ("plain", "grow", "gates", "qk-norm", "clip", "warm-up", "trigger")
OUTPUTS = ["attention.out", "feed.2"]
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95 %, by the number of seeds


@dataclass(frozen=True)
class Run:
    """Everything that a run's result depends on. `lr` is where a ramp begins; `clip` the largest norm of a gradient."""

    family: str
    arm: str
    protocol: str  # ramp, constant
    lr: float
    seed: int
    clip: float = 1.0

    def lr_at(self, step: int) -> float:
        if self.protocol == "ramp":
            return self.lr * 10 ** (max(step - QUIET, 0) / TENFOLD)
        return self.lr * min((step + 1) / WARMUP, 1.0) if self.arm == "warm-up" else self.lr


class Normed(nn.Module):
    """Queries and keys through an RMSNorm over each head, with gains."""

    def __init__(self, qkv: nn.Linear, heads: int) -> None:
        super().__init__()
        self.qkv, self.heads = qkv, heads
        self.q, self.k = nn.RMSNorm(WIDTH // heads), nn.RMSNorm(WIDTH // heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return torch.stack([self.q(q), self.k(k), v], dim=-3).flatten(-3)


def schedule(depth: int, arm: str) -> Schedule:
    """Half the blocks, then one more at each unlock, fixed or triggered; or gates that open in proportion to the depth."""
    half, growing = depth // 2, arm != "gates"
    steps, latest = (EARLIEST, LATEST) if arm == "trigger" else (UNLOCKS, UNLOCKS)
    active = [list(range(half + k)) for k in range(depth - half + 1)] if growing else [list(range(depth))]
    phases = [
        Phase(step=step, latest=last, active=now, unlock=[now[-1]] if k else [], lr=None, predicted_rho=None)
        for k, (step, last, now) in enumerate(zip((0, *steps), (0, *latest), active, strict=False))
    ]
    return Schedule(
        mode="grow", depth=depth, order="last", blocks=None, lock="zero-output" if growing else "residual-gate",
        gates=None if growing else [OPEN * (k + 1) // depth for k in range(depth)], margin=None, lr_schedule=None,
        phases=phases, findings=[],
        provenance=ScheduleProvenance(report=None, report_sha256=None, checkpoint=None, versions=Versions.installed()),
    )  # fmt: skip


def made(run: Run) -> tuple[Task, torch.optim.Optimizer, ArchitectureWarmup | None, CurvatureTracker]:
    """What trains, and what looks on: by the tracker's rho with the next block the arm `trigger` unlocks it."""
    family = FAMILIES[run.family]
    task = build(family, run.seed)
    if run.arm == "qk-norm":
        for part in [m for m in task.model.modules() if isinstance(m, Attention)]:
            part.qkv = Normed(part.qkv, part.heads)
    optimizer = optimizer_of(family, task.model, run.lr)
    shard = torch.Generator().manual_seed(2000 + run.seed)
    tracker = CurvatureTracker(task.model, optimizer, task.loss, probe=[task.draw(16, shard)], every=10, update_ratio=False)
    if run.arm not in ("grow", "gates", "trigger"):
        return task, optimizer, None, tracker
    plan = schedule(len(task.model.layers), run.arm)
    tracker.warmup = ArchitectureWarmup(
        task.model, optimizer, plan, outputs=None if run.arm == "gates" else OUTPUTS,
        rho_source=tracker if run.arm == "trigger" else None,
    )  # fmt: skip
    return task, optimizer, tracker.warmup, tracker


def play(run: Run) -> dict[str, Any]:
    """Train one run to its end, or to where its loss is no number; ramps of seed 0 with rho every tenth step."""
    started = process_time()
    family = FAMILIES[run.family]
    task, optimizer, warmup, tracker = made(run)
    draw = torch.Generator().manual_seed(1000 + run.seed)
    watched = (run.protocol == "ramp" and run.seed == 0) or run.arm == "trigger"
    losses: list[float] = []
    rho: list[tuple[int, float, float]] = []
    for step in range(MOST if run.protocol == "ramp" else STEPS):
        for group in optimizer.param_groups:
            group["lr"] = run.lr_at(step)
        if warmup is not None:
            warmup.step(step)
        value = task.loss(task.model, task.draw(family.rows, draw))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = float(nn.utils.clip_grad_norm_(task.model.parameters(), run.clip))
        losses.append(float(value.detach()))
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            break
        optimizer.step()
        if watched and (found := tracker.step(step)) and found.status == "converged":
            rho += [] if found.rho is None else [(step, run.lr_at(step), float(f"{found.rho:.4g}"))]
        if run.protocol == "ramp" and over(losses, task.constant):
            break
    return {
        **asdict(run),
        "constant": round(task.constant, 5),
        "losses": [float(f"{v:.5g}") if math.isfinite(v) else None for v in losses],
        "rho": rho,
        **({"unlocked": warmup.started[1:]} if warmup is not None and run.arm == "trigger" else {}),
        "seconds": round(process_time() - started, 1),
    }


def arms(family: str, protocol: str) -> list[str]:
    """A norm behind the sum makes no identity of a block whose outputs are zero; a ramp is a warm-up."""
    left = {("post-norm", "grow"), ("post-norm", "trigger")}
    return [arm for arm in ARMS if (family, arm) not in left and not (protocol == "ramp" and arm == "warm-up")]


def tuning() -> list[Run]:
    """Clipping, each at the family's middle rate; on seeds of its own."""
    return [Run(f, "clip", "constant", LRS[f][1], seed, clip) for f, clip, seed in product(LRS, (*CLIPS, 1.0), TUNING)]


def wanted(clip: dict[str, float]) -> list[Run]:
    found = []
    for seed, family in product(SEEDS, LRS):
        for protocol, rates in (("ramp", (FAMILIES[family].rates[0],)), ("constant", LRS[family])):
            for arm, lr in product(arms(family, protocol), rates):
                if arm == "clip" and clip[family] == 1.0:
                    continue  # what all other runs have came out best: these would be the plain ones again
                found.append(Run(family, arm, protocol, lr, seed, clip[family] if arm == "clip" else 1.0))
    return sorted(found, key=lambda run: run.protocol != "ramp")  # which are the answer, of all seeds


# Whose rho and unlocks are in the figure.
TRIGGERED = {Run("pre-norm-deep", "trigger", "ramp", FAMILIES["pre-norm-deep"].rates[0], 0)}


def stored() -> list[dict[str, Any]]:
    return [json.loads(line) for line in STORE.read_text().splitlines()] if STORE.exists() else []


def key(row: dict[str, Any]) -> Run:
    return Run(**{name: row[name] for name in Run.__dataclass_fields__})


def tuned(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each family the clipping with the least mean final loss at the middle rate."""
    best = {}
    for family in LRS:
        ends = {
            clip: fmean(
                ended(r)
                for r in rows
                if key(r) in {Run(family, "clip", "constant", LRS[family][1], s, clip) for s in TUNING}
            )
            for clip in (*CLIPS, 1.0)
        }
        best[family] = min(ends, key=lambda clip: ends[clip])
    return best


def ended(row: dict[str, Any]) -> float:
    """Final loss; of a run that is worse than a constant, or no number, the constant's."""
    return min(final(row["losses"]), row["constant"])


def breaking(row: dict[str, Any]) -> tuple[float, bool]:
    """log10 of the learning rate at which a ramp broke, and whether it did: else of the highest that it reached."""
    at = breaks(row["losses"], row["constant"])
    return math.log10(key(row).lr_at(len(row["losses"]) - 1 if at is None else at)), at is not None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t."""
    return fmean(values), T95[len(values)] * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"tuned_clip": tuned(rows), "runs": len(rows), "ramps": [], "constant": []}
    runs = {key(r): r for r in rows if r["seed"] in SEEDS}
    for family, protocol in product(LRS, ("ramp", "constant")):
        rates = (FAMILIES[family].rates[0],) if protocol == "ramp" else LRS[family]
        for lr, arm in product(rates, arms(family, protocol)):
            of = {
                r.seed: row for r, row in runs.items() if (r.family, r.protocol, r.lr, r.arm) == (family, protocol, lr, arm)
            }
            base = {
                r.seed: row
                for r, row in runs.items()
                if (r.family, r.protocol, r.lr, r.arm) == (family, protocol, lr, "plain")
            }
            if len(of) < 2:
                continue
            value = (lambda row: breaking(row)[0]) if protocol == "ramp" else ended
            mean, half = interval([value(row) for row in of.values()])
            differences = [value(of[s]) - value(base[s]) for s in of if s in base]
            shift, spread = interval(differences)
            entry = {
                "family": family,
                "arm": arm,
                "seeds": len(of),
                "mean": mean,
                "half": half,
                "shift": shift,
                "shift_half": spread,
            }
            if protocol == "ramp":
                entry |= {"unbroken": sum(not breaking(row)[1] for row in of.values()), "lr": 10**mean}
            else:
                entry |= {"lr": lr, "no_better_than_a_constant": sum(ended(r) >= 0.98 * r["constant"] for r in of.values())}
            found["ramps" if protocol == "ramp" else "constant"].append(entry)
    return found


def plot(rows: Sequence[dict[str, Any]]) -> None:
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    colours = dict(zip(ARMS, ("#333333", "#1f4e9c", "#c2641a", "#2a8c4a", "#8c4a8c", "#999999", "#b8860b"), strict=True))
    for place, family in enumerate(LRS):
        axes = figure.add_subplot(1, 2, place + 1)
        for row in sorted(
            (r for r in rows if r["family"] == family and r["rho"] and r["protocol"] == "ramp" and not r["seed"]),
            key=lambda r: ARMS.index(r["arm"]),
        ):
            axes.plot(
                [s for s, _, _ in row["rho"]], [v for _, _, v in row["rho"]], color=colours[row["arm"]], label=row["arm"]
            )
            at = breaks(row["losses"], row["constant"])
            if at is not None:
                axes.axvline(at, color=colours[row["arm"]], linewidth=0.8, linestyle="--")
        if family == "pre-norm-deep":
            for step in UNLOCKS:
                axes.axvline(step, color=colours["grow"], linewidth=1.2, linestyle=":")
            for step in (step for row in rows if key(row) in TRIGGERED for step in row["unlocked"]):
                axes.axvline(step, color=colours["trigger"], linewidth=1.2, linestyle=":")
        axes.axvspan(0, OPEN, color=colours["gates"], alpha=0.06)
        axes.axhline(1, color="#c0392b", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xlabel("step; the learning rate rises tenfold every 80")
        axes.set_title(f"{family}, seed 0", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("rho")
    # Beside the panels, once for both: within one it would lie on curves and lines.
    arms = {arm: line for axes in figure.axes for line, arm in zip(*axes.get_legend_handles_labels(), strict=True)}
    arms = {arm: arms[arm] for arm in ARMS if arm in arms}
    figure.legend(arms.values(), arms.keys(), frameon=False, fontsize=8, loc="outside lower center", ncols=len(arms))
    figure.savefig(HERE / "results" / "warmup_rho.png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="tables and figure of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for number in (0, 1):
        rows = stored()
        done = {key(r) for r in rows}
        left = [r for r in (wanted(tuned(rows)) if number else tuning()) if r not in done and not options.report]
        for k, run in enumerate(left):
            row = play(run)
            with STORE.open("a") as stream:
                stream.write(json.dumps(row, separators=(",", ":")) + "\n")
            print(f"{k + 1}/{len(left)} {run.family} {run.arm} {run.protocol} lr {run.lr:g} seed {run.seed}: "
                  f"{len(row['losses'])} steps, final {median(v or 9 for v in row['losses'][-20:]):.3f}, {row['seconds']} s",
                  flush=True)  # fmt: skip
    rows = stored()
    text = json.dumps(summary(rows), indent=2) + "\n"
    (HERE / "results" / "warmup.json").write_text(text)
    plot(rows)
    print(text)


if __name__ == "__main__":
    main()
