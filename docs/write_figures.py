"""Measures what the figures of docs/explanation/rho.md show, and draws them (a few minutes on one core).

`python docs/write_figures.py` measures and draws; with `--draw` it draws the numbers of docs/images/figures.json again.

- edge: full-batch training of a small network, where rho rises and stays at 1 whatever the learning rate.
- filter: what the momentum of an optimizer makes of one direction of a quadratic, 3 % under and over its threshold.
- tokens: rho of a late checkpoint on growing parts of a shard, and the bracket that the whole of it gives for the data's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import curvcli

IMAGES = Path(__file__).resolve().with_name("images")
SAMPLES = IMAGES.parents[1] / "sample_checkpoints"
NUMBERS = IMAGES / "figures.json"
Optimizers = dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]]

TRAINED: Optimizers = {
    "SGD, lr 0.5": lambda p: torch.optim.SGD(p, lr=0.5),
    "SGD, lr 1": lambda p: torch.optim.SGD(p, lr=1.0),
    "SGD, lr 2": lambda p: torch.optim.SGD(p, lr=2.0),
    "Adam, lr 0.001": lambda p: torch.optim.Adam(p, lr=1e-3),
    "Adam, lr 0.003": lambda p: torch.optim.Adam(p, lr=3e-3),
}
# On the quadratic lambda x^2 / 2 with lambda 1: thresholds 2/lr, (2 + 2b)/lr.
FILTERED: Optimizers = {
    "SGD, rho 0.97": lambda p: torch.optim.SGD(p, lr=0.97 * 2),
    "SGD, rho 1.03": lambda p: torch.optim.SGD(p, lr=1.03 * 2),
    "momentum 0.9, rho 0.97": lambda p: torch.optim.SGD(p, lr=0.97 * 3.8, momentum=0.9),
    "momentum 0.9, rho 1.03": lambda p: torch.optim.SGD(p, lr=1.03 * 3.8, momentum=0.9),
}


def edge(steps: int = 3000, every: int = 50) -> dict[str, list[tuple[int, float, float]]]:
    """Step, rho and loss of each full-batch run; only values that converged."""
    found = {}
    for name, make in TRAINED.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        batch = torch.randn(256, 32), torch.eye(10)[torch.randint(10, (256,))]
        optimizer = make(model.parameters())
        points = []
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            value = _squares(model, batch)
            value.backward()
            optimizer.step()
            if step % every == 0:
                full = curvcli.analyze(model, _squares, [batch], optimizer, depths=False).full
                if full.status == "converged" and full.rho is not None:
                    points.append((step, full.rho, value.item()))
        found[name] = points
    return found


def _squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def filtered(steps: int = 60) -> dict[str, list[float]]:
    """Distance from the minimum of a quadratic after each step."""
    found = {}
    for name, make in FILTERED.items():
        x = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = make([x])
        distances = [1.0]
        for _ in range(steps):
            optimizer.zero_grad()
            (x**2 / 2).sum().backward()
            optimizer.step()
            distances.append(abs(x.item()))
        found[name] = distances
    return found


def tokens() -> dict[str, Any]:
    """rho on parts of the shard, and the bracket of the whole, of both samples at step 600."""
    found = {}
    for run in ("calm", "hot"):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [sys.executable, "-m", "curvcli", "analyze", str(SAMPLES / run / "checkpoint-600")]
            subprocess.run([*command, "--no-depths", "-q", "-o", str(report)], check=True, stdout=subprocess.DEVNULL)  # noqa: S603
            read = json.loads(report.read_text(encoding="utf-8"))
        found[run] = {
            "tokens": [point["tokens"] for point in read["tokens"]],
            "rho": [point["rho"] for point in read["tokens"]],
            "bracket": [read["generalisation"][end] for end in ("rho_low", "rho_high")],
        }
    return found


def draw(numbers: dict[str, Any]) -> None:
    """The figures as SVG, without a date, so that the same numbers give the same files."""
    matplotlib.rcParams.update({"svg.hashsalt": "curv", "svg.fonttype": "path", "font.size": 10})

    figure, axes = _axes("step", "rho")
    for (name, points), colour in zip(numbers["edge"].items(), _colours(), strict=False):
        axes.plot([p[0] for p in points], [p[1] for p in points], label=name, color=colour, linewidth=1.4)
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.set_ylim(0, 2)
    axes.legend(frameon=False, ncols=2, loc="upper right")
    _save(figure, "edge")

    figure, axes = _axes("step", "distance from the minimum")
    for (name, distances), colour in zip(numbers["filter"].items(), _colours(), strict=False):
        axes.semilogy(distances, label=name, color=colour, linestyle="-" if "0.97" in name else "--", linewidth=1.4)
    axes.legend(frameon=False)
    _save(figure, "filter")

    figure, axes = _axes("tokens", "rho")
    for index, ((run, part), colour) in enumerate(zip(numbers["tokens"].items(), _colours(), strict=False)):
        axes.plot(part["tokens"], part["rho"], marker="o", color=colour, label=f"{run}, step 600: on the tokens themselves")
        (low, high), rho, place = part["bracket"], part["rho"][-1], part["tokens"][-1] * 1.06 * 1.04**index
        reach = [[rho - low], [high - rho]]
        axes.errorbar(place, rho, reach, capsize=4, color=colour, label=f"{run}, step 600: bracket of the data, 90 %")
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers["tokens"]["hot"]["tokens"], [f"{n:,}" for n in numbers["tokens"]["hot"]["tokens"]])
    axes.set_ylim(0, None)
    axes.legend(frameon=False)
    _save(figure, "tokens")


def _colours() -> list[str]:
    return ["#1f4e9c", "#c2641a", "#3a7d44", "#7a3e9d", "#b3261e"]


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    if "--draw" not in sys.argv:
        numbers = {"edge": edge(), "filter": filtered(), "tokens": tokens()}
        NUMBERS.write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    draw(json.loads(NUMBERS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
