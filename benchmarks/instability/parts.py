"""What the zoo's runs were not asked: the bracket of rho on eight batches, and rho of parts of the network.

`python benchmarks/instability/parts.py` trains runs of the zoo again, up to step 100, and measures them at steps 32 and 100
with the shard in eight batches; results/zoo_parts.jsonl holds what it found, and it can be stopped at any moment. Held-out
seed first, in an order that has nothing to do with how a run ends. `--report` scores what is there, beside rho at the same
points of the same runs, and writes results/zoo_parts.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import HERE
from families import Task
from labels import label
from score import auc, interval, of_histories
from signals import Signal
from torch import Tensor
from zoo import SEEDS, Run, measured, play, stored, wanted

from curvcli.analysis.api import prepared
from curvcli.analysis.solve import Measurement
from curvcli.curvature.lanczos import Lanczos
from curvcli.errors import CurvError

STORE = HERE / "results" / "zoo_parts.jsonl"
BATCHES, STEPS = 8, (32, 100)
PARTS = ("blocks", "attention", "mlp", "embedding", "head")
# What the zoo's networks call their parts. Of a plain stack the first layer stands for the embedding, the last for the head.
_WORDS = {
    "attention": {"self_attn", "attn", "attention"},
    "mlp": {"feed", "mlp"},
    "embedding": {"embed", "embed_tokens", "place", "wte", "wpe"},
    "head": {"head", "lm_head"},
}


def parts_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Names of a network's parameters by part. Attention and MLP are in the blocks too, tied weights in the embedding."""
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    numbers = sorted({int(name.split(".")[0]) for name in names if name.split(".")[0].isdigit()})
    for name in names:
        path = set(name.split("."))
        first = name.split(".")[0]
        if first.isdigit():  # a plain stack
            where = "embedding" if int(first) == numbers[0] else "head" if int(first) == numbers[-1] else "blocks"
            found[where].append(name)
            continue
        inside = bool(path & {"layers", "h"})
        for part, words in _WORDS.items():
            if path & words:
                found[part].append(name)
        if inside:
            found["blocks"].append(name)
    return found


def cut(batch: Any) -> list[Any]:
    """A batch in eight, by rows."""
    if isinstance(batch, Tensor):
        return list(batch.tensor_split(BATCHES))
    return list(zip(*(part.tensor_split(BATCHES) for part in batch), strict=True))


def look(task: Task, shard: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The bracket, and rho of each part that the network has."""

    def solve(work: Measurement, notes: dict[str, str]) -> dict[str, Any]:
        hvp = work.build(work.problem)
        threshold, found = work.preconditioner.threshold, {}
        for part, names in parts_of(work.names).items():
            extremes = work.solve(hvp, names, work.coarse).extremes
            if extremes is not None and extremes.top is not None and extremes.status == "converged" and threshold:
                found[part] = extremes.top.value / threshold
        return found

    whole = measured(task, cut(shard), optimizer)
    try:
        solver = Lanczos(max_products=60)
        whole |= prepared(task.model, task.loss, [shard], optimizer, solve, solver=solver, depths=False, truncated=False)
    except CurvError as error:
        whole["parts"] = type(error).__name__
    return whole


def chosen() -> list[Run]:
    """Steady runs, the held-out seed first, else by a hash of what they are."""
    steady = [run for run in wanted() if run.protocol in ("constant", "warmup", "cosine")]
    return sorted(steady, key=lambda run: (run.seed != SEEDS[-1], sha256(repr(run).encode()).hexdigest()))


def kept() -> list[dict[str, Any]]:
    """What was measured by now."""
    return [json.loads(line) for line in STORE.read_text().splitlines()] if STORE.exists() else []


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["family"], row["protocol"], row["lr"], row["seed"]


def _within(point: Any) -> float | None:
    """Lower end of the bracket."""
    return point.get("rho_low") if point.get("status") == "converged" else None


def _upper(point: Any) -> float | None:
    return point.get("rho_high") if point.get("status") == "converged" else None


def _part(name: str) -> Signal:
    return lambda point: point.get(name)


SIGNALS: dict[str, Signal] = {
    "rho, lower end": _within,
    "rho, upper end": _upper,
    **{f"rho of {part}": _part(part) for part in PARTS},
}


def report() -> dict[str, Any]:
    """Scores of what is there: each signal beside rho at the same points of the same runs."""
    rows = stored()
    mine = {key(row): row for row in kept()}
    labels = label(rows)
    pairs = [
        ({**row, "probes": mine[key(row)]["probes"]}, said)
        for row, said in zip(rows, labels, strict=True)
        if key(row) in mine
    ]
    found: dict[str, Any] = {"runs": len(pairs), "end badly": sum(bool(said["badly"]) for _, said in pairs), "signals": {}}

    def rho(point: Any) -> float | None:
        return point.get("rho") if point.get("status") == "converged" else None

    for name, signal in SIGNALS.items():
        has = [(r, s) for r, s in pairs if any(signal(p) is not None for p in r["probes"])]
        runs, base = [r for r, _ in has], [s for _, s in has]
        scored, beside = of_histories(runs, base, signal), of_histories(runs, base, rho)
        both = [(a[1], b[1], a[2]) for a, b in zip(scored, beside, strict=False)]
        found["signals"][name] = {
            "runs": len(scored),
            "AUC": _round(auc([(v, y) for _, v, y in scored])),
            "interval": interval(scored, lambda items: auc([(v, y) for _, v, y in items])),
            "rho there": _round(auc([(v, y) for _, v, y in beside])),
            "difference, interval": interval(both, _difference) if len(scored) == len(beside) else None,
        }
    found["verdicts"] = {
        name: _verdicts(pairs, which) for name, which in (("with the bracket", True), ("rho as its own bracket", False))
    }
    return found


def _difference(items: Sequence[tuple[float, float, bool]]) -> float | None:
    one, other = auc([(a, y) for a, _, y in items]), auc([(b, y) for _, b, y in items])
    return None if one is None or other is None else one - other


def _verdicts(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], bracketed: bool) -> dict[str, Any]:
    """Runs by what was said of their points before anything broke, each point with its share of the run."""
    from score import verdict

    all_of, bad = Counter[str](), Counter[str]()
    for row, said in pairs:
        points = [p for p in row["probes"] if said["break"] is None or p["step"] <= said["break"]]
        for point in points:
            if bracketed and point.get("verdict") is None:
                continue
            name = str(point["verdict"]) if bracketed else verdict(point, row)
            all_of[name] += 1 / len(points)
            bad[name] += bool(said["badly"]) / len(points)
    return {name: {"runs": round(n, 1), "end badly": round(bad[name] / n, 3)} for name, n in all_of.items()}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="score what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {key(row) for row in kept()}
    left = [] if options.report else [r for r in chosen() if (r.family, r.protocol, r.lr, r.seed) not in done]
    for k, run in enumerate(left):
        row = play(run, look, STEPS, STEPS[-1])
        few = {name: row[name] for name in ("family", "protocol", "lr", "seed", "probes", "seconds")}
        with STORE.open("a") as stream:
            stream.write(json.dumps(few, separators=(",", ":")) + "\n")
        print(
            f"{k + 1}/{len(left)} {run.family} {run.protocol} lr {run.lr:g} seed {run.seed}: {row['seconds']} s", flush=True
        )
    if options.report:
        text = json.dumps(report(), indent=1) + "\n"
        (HERE / "results" / "zoo_parts.json").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
