"""A zoo of a few hundred small training runs, of which about half break, with what could have told so before.

`python benchmarks/instability/zoo.py` trains the runs that results/instability.jsonl does not hold yet, and can be stopped
at any moment; `--part 0/2` is every second of them, for two processes. `fit.py` labels them by their losses alone,
scores the signals and fits the coefficients of `curvcli/judge/calibration.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import HERE
from families import FAMILIES, Task, build, optimizer_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvcli.analysis.api import analyze
from curvcli.documents import Report
from curvcli.errors import CurvError

Look = Callable[[Task, Any, torch.optim.Optimizer], dict[str, Any]]
STORE = HERE / "results" / "instability.jsonl"
STEPS = 200
PROBES = {8, 16, 32, 64, 100, 150, 200}  # steps; of ramps every 20th
QUIET, TENFOLD, MOST = 30, 80, 300  # steps of a ramp: constant, for each further decade, and at most
EVENTS = ("outlier", "broken-shard", "lost-moments", "restart")
EVENT_AT, EVENT_STEPS = 100, 15
SEEDS = (0, 1, 2)
ROWS = 32  # of the shard that is measured, as one batch; pictures four times as many


@dataclass(frozen=True)
class Run:
    """Everything that a run's result depends on.

    Args:
        protocol: constant, warmup (over 20 steps), cosine (to a hundredth, after a warm-up over 10), ramp (tenfold every 80
            steps), or an event after step 100 of a warmed-up run: an outlier batch, a broken shard for 15 steps, moments
            that are lost, a learning rate that is restarted at three times its size.
    """

    family: str
    protocol: str
    lr: float
    seed: int

    def lr_at(self, step: int) -> float:
        if self.protocol == "ramp":
            return self.lr * 10 ** (max(step - QUIET, 0) / TENFOLD)
        if self.protocol == "constant":
            return self.lr
        if self.protocol == "cosine":
            shape = 0.01 + 0.99 * (1 + math.cos(math.pi * step / STEPS)) / 2
            return self.lr * min((step + 1) / 10, 1.0) * shape
        warmed = self.lr * min((step + 1) / 20, 1.0)
        return 3 * warmed if self.protocol == "restart" and step >= EVENT_AT else warmed

    @property
    def steps(self) -> int:
        return MOST if self.protocol == "ramp" else STEPS


@dataclass
class Course:
    """What is seen of a run: every step, and where it is measured."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)


def wanted() -> list[Run]:
    """All runs: seed 0 of everything first, then the ramps of the seed that is held out."""
    found = []
    for seed, family in product(SEEDS, FAMILIES.values()):
        found.append(Run(family.name, "ramp", family.rates[0], seed))
        if family.ramps_only:
            continue
        hot = family.rates[1:]
        protocols = ("warmup", "cosine") if family.rows else ("constant",)
        found += [
            Run(family.name, protocol, lr, seed)
            for (k, lr), protocol in product(enumerate(hot), protocols)
            if protocol != "cosine" or k % 2 == seed % 2
        ]
        if family.name in ("llama", "pre-norm-deep", "pre-norm-sgd"):
            found += [Run(family.name, event, family.rates[3], seed) for event in EVENTS]
        if family.name in ("post-norm", "pre-norm-deep", "llama"):
            found += [Run(family.name, "constant", lr, seed) for lr in hot[::2]]
    return sorted(found, key=lambda r: (r.seed > 0, r.seed == 1 or r.protocol != "ramp", r.seed))


class ToldError(Exception):
    """The verdict is known: layers are not wanted."""


def measured(task: Task, batches: list[Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The report's numbers on a frozen shard, up to the verdict."""
    kept: list[Report] = []

    def told(report: Report) -> None:
        kept.append(report)
        raise ToldError

    try:
        kept.append(analyze(task.model, task.loss, batches, optimizer, depths=False, on_verdict=told))
    except ToldError:
        gc.collect()  # what was raised through holds graphs in circles, and their bytes call no collector
    except CurvError as error:
        return {"status": type(error).__name__}
    report = kept[0]
    full, update, held = report.full, report.update, report.generalisation
    return {
        "status": report.judged.status,
        "rho": report.judged.rho,
        "rho_full": full.rho,
        "rho_low": held.rho_low,
        "rho_high": held.rho_high,
        "eigenvalue": report.judged.eigenvalue,
        "most_negative": full.most_negative,
        "update_ratio": update.ratio,
        "update": update.status,
        "participation": report.participation,
        "shard_loss": report.data.loss,
        "verdict": report.verdict,
    }


def companions(task: Task, batches: list[Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Cheaper numbers beside rho: quotient along the gradient, update, weights, attention."""
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        loss = task.loss(task.model, batches[0])
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None and g.requires_grad]
    frozen = [g.detach() for _, g in pairs]
    curved = torch.autograd.grad([g for _, g in pairs], [p for p, _ in pairs], frozen, allow_unused=True)
    square = sum(float(g.square().sum()) for g in frozen)
    along = sum(float((h * g).sum()) for h, g in zip(curved, frozen, strict=True) if h is not None)
    surprise = [_surprise(optimizer, p, g) for (p, _), g in zip(pairs, frozen, strict=True)]
    surprise = [s for s in surprise if s is not None]
    task.seen.clear()
    with torch.no_grad():
        task.loss(task.model, batches[0])
        matrices = [p for p in parameters if p.dim() == 2]
        spectral = max(float(torch.linalg.matrix_norm(p, 2)) for p in matrices)
    found = {
        "gradient_quotient": along / square if square else None,
        "gradient_norm": square**0.5,
        "update_rms": max(surprise) if surprise else None,
        "spectral_norm": spectral,
        "attention_logit": max((s[0] for s in task.seen), default=None),
        "attention_entropy": min((s[1] for s in task.seen), default=None),
    }
    return {k: v if v is not None and math.isfinite(v) else None for k, v in found.items()}


def _surprise(optimizer: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor) -> float | None:
    """Root mean square of g / sqrt(v) of a tensor: over 1 where the second moment is behind (arXiv 2304.13013)."""
    state = optimizer.state.get(parameter, {})
    second = state.get("exp_avg_sq", state.get("square_avg"))
    if second is None:
        return None
    group = optimizer.param_groups[0]
    beta = group["betas"][1] if "betas" in group else 0.0
    step = float(state.get("step", 1))
    corrected = second / (1 - beta**step) if beta else second
    return float((gradient.square() / corrected.clamp_min(group["eps"] ** 2)).mean().sqrt())


def corrupted(run: Run, step: int, batch: Any, draw: torch.Generator) -> Any:
    """The batch of a text run, spoilt where the protocol says so."""
    if run.protocol == "outlier" and step == EVENT_AT:
        return torch.full_like(batch, 255)
    if run.protocol == "broken-shard" and EVENT_AT <= step < EVENT_AT + EVENT_STEPS:
        return torch.randint(256, batch.shape, generator=draw)
    return batch


def look(task: Task, shard: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is measured where a run is looked at, its shard as one batch."""
    return measured(task, [shard], optimizer) | companions(task, [shard], optimizer)


def play(
    run: Run, look: Look = look, probes: Collection[int] = PROBES, most: int = MOST, clip: float | None = None
) -> dict[str, Any]:
    """Train one run to its end, or to where its loss is no number any more.

    Args:
        look: what is measured of the task, its shard and the optimizer.
        probes: steps at which it is, but for ramps.
        most: steps after which the run is left.
        clip: largest norm of a gradient; None for the family's own.
    """
    family, started = FAMILIES[run.family], process_time()
    if clip is None:
        clip = family.clip if family.rows else math.inf
    task = build(family, run.seed)
    optimizer = optimizer_of(family, task.model, run.lr)
    draw, shard_draw = torch.Generator().manual_seed(1000 + run.seed), torch.Generator().manual_seed(2000 + run.seed)
    rows = ROWS if family.rows != 16 else 4 * ROWS
    shard = task.draw(rows, shard_draw)
    course = Course()
    for step in range(min(run.steps, most)):
        for group in optimizer.param_groups:
            group["lr"] = run.lr_at(step)
        if run.protocol == "lost-moments" and step == EVENT_AT:
            optimizer.state.clear()
        batch = task.draw(family.rows, draw)
        value = task.loss(task.model, corrupted(run, step, batch, draw))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = float(nn.utils.clip_grad_norm_(task.model.parameters(), clip))
        course.losses.append(float(value.detach()))
        course.norms.append(norm)
        if not (math.isfinite(course.losses[-1]) and math.isfinite(norm)):
            break
        optimizer.step()
        if (step + 1) % 20 == 0 if run.protocol == "ramp" else step + 1 in probes:
            optimizer.zero_grad(set_to_none=True)
            course.probes.append(_rounded({"step": step + 1, "lr": run.lr_at(step)} | look(task, shard, optimizer)))
        if over(course.losses, task.constant) and run.protocol == "ramp":
            break
    return {
        **asdict(run),
        "group": family.group,
        "optimizer": family.optimizer,
        "held_out": family.held_out or run.seed == SEEDS[-1],
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "constant": round(task.constant, 5),
        "losses": [_digits(v, 5) for v in course.losses],
        "norms": [_digits(v, 4) for v in course.norms],
        "probes": course.probes,
        "seconds": round(process_time() - started, 1),
    }


def over(losses: list[float], constant: float) -> bool:
    """A ramp need not go on: for 40 steps the loss has been at what a constant reaches, or worse, after it was below."""
    return len(losses) > 80 and min(losses[:-40]) < 0.9 * constant and min(losses[-40:]) > 1.0 * constant


def _digits(value: float, digits: int) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _rounded(probe: dict[str, Any]) -> dict[str, Any]:
    return {k: _digits(v, 5) if isinstance(v, float) else v for k, v in probe.items()}


def stored() -> list[dict[str, Any]]:
    """The runs that are there, whichever process wrote them."""
    parts = sorted(STORE.parent.glob("instability*.jsonl"))
    return [json.loads(line) for path in parts for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1", help="K/N: every N-th run, from the K-th")
    parser.add_argument("--family", help="only this one")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    torch.set_num_threads(1)
    done = {(r["family"], r["protocol"], r["lr"], r["seed"]) for r in stored()}
    left = [r for r in wanted()[part::parts] if (r.family, r.protocol, r.lr, r.seed) not in done]
    left = [r for r in left if options.family in (None, r.family)]
    path = STORE if parts == 1 else STORE.with_suffix(f".{part}.jsonl")
    for k, run in enumerate(left):
        row = play(run)
        with path.open("a") as stream:
            stream.write(json.dumps(row, separators=(",", ":")) + "\n")
        last = row["losses"][-1]
        print(f"{k + 1}/{len(left)} {run.family} {run.protocol} lr {run.lr:g} seed {run.seed}: {len(row['losses'])} steps, "
              f"loss {last}, {row['seconds']} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
