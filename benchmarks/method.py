"""Does architecture warm-up help? Final validation loss of plain and warmed-up runs over learning rates and seeds.

`python benchmarks/method.py` trains what benchmarks/results/method.jsonl does not hold yet (about a minute a run on one
core, some 70 runs), then writes results/method.json and the pictures. It can be stopped at any moment and goes on.
`--summary` only summarises.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import product
from statistics import mean, stdev
from typing import Any

import torch
from common import HERE
from matplotlib.figure import Figure
from runs import Run, train

METHODS = ("plain", "last", "first", "interleaved", "qk-norm", "softcap")
RATES = (4e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (0, 1, 2)
STORE = HERE / "results" / "method.jsonl"
COLOURS = dict(zip(METHODS, ("#444444", "#1f4e9c", "#c2641a", "#2e7d32", "#8e44ad", "#b3261e"), strict=True))


def wanted() -> list[Run]:
    """With lr warm-up every method; without it (warmup=0) plain against the paper's default. Seed 0 of all comes first."""
    with_warmup = [Run(method=m, lr=lr, seed=s) for s, lr, m in product(SEEDS, RATES, METHODS)]
    without = [Run(method=m, lr=lr, seed=s, warmup=0) for s, lr, m in product(SEEDS, RATES, ("plain", "last"))]
    return sorted(with_warmup + without, key=lambda run: run.seed)


def stored() -> list[dict[str, Any]]:
    return [json.loads(line) for line in STORE.read_text().splitlines()] if STORE.exists() else []


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of each method, lr and lr warm-up; paired differences to plain of the same seed."""
    found: dict[tuple[int, float, str], dict[int, float | None]] = {}
    for row in rows:
        run = row["run"]
        found.setdefault((run["warmup"], run["lr"], run["method"]), {})[run["seed"]] = row["validation_loss"]
    table = []
    for (warmup, lr, method), by_seed in sorted(
        found.items(), key=lambda item: (-item[0][0], item[0][1], METHODS.index(item[0][2]))
    ):
        plain = found.get((warmup, lr, "plain"), {})
        values = [v for v in by_seed.values() if v is not None]
        pairs = [v - plain[s] for s, v in by_seed.items() if v is not None and plain.get(s) is not None]
        table.append(
            {
                "lr_warmup_steps": warmup,
                "lr": lr,
                "method": method,
                "seeds": len(by_seed),
                "diverged": sum(v is None for v in by_seed.values()),
                "validation_loss": round(mean(values), 4) if values else None,
                "spread": round(stdev(values), 4) if len(values) > 1 else None,
                "minus_plain": round(mean(pairs), 4) if pairs else None,
                "minus_plain_spread": round(stdev(pairs), 4) if len(pairs) > 1 else None,
            }
        )
    return table


def losses_plot(table: list[dict[str, Any]], warmup: int, name: str, title: str) -> None:
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    methods = [m for m in METHODS if any(r["method"] == m and r["lr_warmup_steps"] == warmup for r in table)]
    for k, method in enumerate(methods):
        rows = [r for r in table if r["method"] == method and r["lr_warmup_steps"] == warmup and r["validation_loss"]]
        shift = 1 + 0.035 * (k - (len(methods) - 1) / 2)  # beside each other, not on top
        axes.errorbar(
            [r["lr"] * shift for r in rows],
            [r["validation_loss"] for r in rows],
            yerr=[r["spread"] or 0 for r in rows],
            marker="o", markersize=4, capsize=3, linewidth=1.2, color=COLOURS[method], label=method,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("final validation loss, nats per byte")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(HERE / "results" / name, metadata={"Software": None})


def rho_plot(rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(RATES), sharey=True)
    for axes, lr in zip(panels, RATES, strict=True):
        for method in ("plain", "last", "first", "interleaved"):
            curve = next(
                (
                    r["rho"]
                    for r in rows
                    if r["run"]["method"] == method and r["run"]["lr"] == lr and r["run"]["warmup"] and r["rho"]
                ),
                [],
            )
            points = [(s, rho) for s, rho, status, _ in curve if rho and rho > 0 and status == "converged"]
            if points:
                axes.plot(*zip(*points, strict=True), ".-", color=COLOURS[method], linewidth=1, markersize=4, label=method)
        run = Run()
        for k in range(4):
            axes.axvline(run.unlock_from + k * run.interval, color="#999999", linestyle=":", linewidth=0.8)
        axes.axhline(1, color="#b3261e", linestyle="--", linewidth=1)
        axes.set_yscale("log")
        axes.set_title(f"peak lr {lr:g}", loc="left", fontsize=10)
        axes.set_xlabel("step (unlocks dotted)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("rho (converged estimates)")
    # Beside the panels: within one it would lie on curves.
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(HERE / "results" / "method_rho.png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Plain training against architecture warm-up.")
    parser.add_argument("--summary", action="store_true", help="do not train")
    options = parser.parse_args()
    done = {json.dumps(row["run"], sort_keys=True) for row in stored()}
    for run in [] if options.summary else wanted():
        if json.dumps(asdict(run), sort_keys=True) in done:
            continue
        row = train(run, track_every=20 if run.seed == 0 else 0, max_hvps=6)
        with STORE.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(run.method, run.lr, run.seed, run.warmup, row["validation_loss"], flush=True)
    rows = stored()
    table = summary(rows)
    document = {
        "torch": torch.__version__,
        "steps": Run().steps,
        "layers": Run().layers,
        "width": Run().width,
        "rows": table,
    }
    (HERE / "results" / "method.json").write_text(json.dumps(document, indent=2) + "\n")
    losses_plot(table, Run().warmup, "method.png", "12 layers, 400 steps, mean and spread of three seeds")
    losses_plot(table, 0, "method_no_lr_warmup.png", "no lr warm-up: architecture warm-up alone")
    rho_plot(rows)
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
