"""What curv takes on a GPU, at the shapes of models that people train: `python benchmarks/gpu.py`.

For each shape, random weights in float32 and three AdamW steps on tokens of Zipf's law, in a process of its own: seconds and
peak of a training step; what a tracker's measurement of five products takes beside it; seconds until the verdict, until the
layers are known and until the depths are, and the peak of that, with the optimizer's state read from main memory, as from a
file. Parts that the budget did not reach are counted as skipped. Results go to results/gpu.json by device and shape.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from common import HERE
from shapes import GIB, network, zipf
from torch import Tensor, nn

from curvcli import analyze
from curvcli.curvature import resources
from curvcli.curvature.precision import inner
from curvcli.data.tasks import causal_loss
from curvcli.documents import Report
from curvcli.optimizers.base import OptimizerView
from curvcli.optimizers.preconditioner import live
from curvcli.training import CurvatureTracker

# rows and tokens of each, by shape: a half and a fourth of what an analysis takes by itself
SHARDS = {"gpt2": (8, 512), "llama-1b": (4, 512), "llama-3b": (4, 512), "tiny": (4, 32)}
PRODUCTS = 5
STEPS = 5


def timed(work: Callable[[], object], device: torch.device) -> float:
    resources.synchronize(device)
    started = time.perf_counter()
    work()
    resources.synchronize(device)
    return time.perf_counter() - started


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    causal_loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def tracked(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, device: torch.device) -> dict[str, Any]:
    """A measurement of five products on as much as a training step takes, and on a fourth of it."""
    found: dict[str, Any] = {}
    for name, rows in (("whole", len(batch)), ("fourth", max(len(batch) // 4, 1))):
        tracker = CurvatureTracker(
            model, optimizer, causal_loss, probe=[batch[:rows]], max_hvps=PRODUCTS,
            tolerance=1e-9, update_ratio=False, every=1,
        )  # fmt: skip
        seconds = []
        for at in range(2):
            seconds.append(timed(partial(tracker.step, at), device))
            trained(model, optimizer, batch)
        record = tracker.last
        assert record is not None
        said = {"status": record.status, "hvps": record.hvps, "message": record.message}
        found[name] = {"rows": rows, "seconds": round(seconds[1], 3), "first_seconds": round(seconds[0], 3), **said}
        del tracker
        resources.release(device)
    return found


def rounding(size: int, device: torch.device) -> float:
    """Relative error of a float32 inner product of so many entries, all alike in sign, where an accumulator would show."""
    vector = torch.rand(size, device=device)
    exact = sum(float(part.double().square().sum()) for part in vector.split(2**24))
    return abs(float(inner(vector[None], vector)[0]) / exact - 1)


def elsewhere(view: OptimizerView) -> OptimizerView:
    """The optimizer's state in main memory, where that of a checkpoint lies."""
    state = {n: {k: t.cpu() if isinstance(t, Tensor) else t for k, t in of.items()} for n, of in view.state.items()}
    return replace(view, state=state)


def measure(shape: str, device: torch.device, budget: float) -> None:
    rows, length = SHARDS[shape]
    with device:
        model = network(shape)
    batch = zipf(model.config.vocab_size, rows, length + 1).to(device)
    size = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model.train()
    resources.reset_peak(device)
    steps = [timed(partial(trained, model, optimizer, batch), device) for _ in range(STEPS)]
    training = resources.peak_bytes(device)
    found: dict[str, Any] = {
        "shape": shape,
        "parameters": size,
        "rows": rows,
        "length": length,
        "training_step": {"seconds": round(median(steps[1:]), 3), "peak_GiB": round(training / GIB, 2)},
        "inner_product_error": rounding(size, device),
    }
    say(found)
    resources.reset_peak(device)
    found["tracker"] = tracked(model, optimizer, batch, device)
    found["tracker"]["peak_GiB"] = round(resources.peak_bytes(device) / GIB, 2)
    say(found)
    view = elsewhere(live(optimizer, dict(model.named_parameters())))
    del optimizer
    model.zero_grad(set_to_none=True)
    gc.collect()
    resources.release(device)
    passed: dict[str, float] = {}
    say(found | {"analysis": analyzed(model, batch, view, device, budget, passed, lambda: say(found | {"stages": passed}))})


def say(found: dict[str, Any]) -> None:
    """All that is known by now, as a line: whoever is stopped leaves the last one."""
    print(json.dumps(found), flush=True)


def analyzed(
    model: nn.Module,
    batch: Tensor,
    view: OptimizerView,
    device: torch.device,
    budget: float,
    passed: dict[str, float],
    told: Callable[[], None],
) -> dict[str, Any]:
    started = time.monotonic()
    early: list[Report] = []

    def progress(stage: str, done: float) -> None:
        resources.synchronize(device)
        if stage not in passed:
            passed[stage] = round(time.monotonic() - started, 2)
            told()

    def verdict(report: Report) -> None:
        early.append(report)
        passed["verdict"] = round(time.monotonic() - started, 2)

    batches = list(batch.split(max(len(batch) // 4, 1)))
    try:
        report = analyze(
            model, causal_loss, batches, view, progress=progress, on_verdict=verdict, deadline=started + budget,
            truncated=False,
        )  # fmt: skip
    except Exception as error:  # of one shape, which the others are measured after
        return {"error": f"{type(error).__name__}: {str(error)[:300]}", "stages": passed}
    parts = [e.status for e in [*([report.ends] if report.ends else []), *report.layers, *report.cumulative.restricted]]
    first_depth = next((s for stage, s in passed.items() if stage.startswith("restricted")), None)
    return {
        "seconds_to_verdict": passed.get("verdict"),
        "seconds_to_layers": first_depth,
        "seconds": round(time.monotonic() - started, 2),
        "peak_GiB": round(resources.peak_bytes(device) / GIB, 2),
        "verdict": report.verdict,
        "mode": report.cost.mode,
        "hvps": report.cost.hvps,
        "hvps_to_verdict": early[0].cost.hvps if early else None,
        "full": {"status": report.full.status, "rho": report.full.rho, "residual": report.full.residual},
        "parts_converged": f"{parts.count('converged')} of {len(parts)}, {parts.count('skipped')} skipped",
        "stages": passed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", choices=SHARDS, default=["gpt2", "llama-1b", "llama-3b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=100.0, help="seconds after which nothing more is started, by shape")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.one:
        measure(options.shapes[0], device, options.budget)
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    file = HERE / "results" / "gpu.json"
    known = json.loads(file.read_text()) if file.exists() else []
    for shape in options.shapes:
        command = [sys.executable, __file__, shape, "--one", "--device", options.device, "--budget", str(options.budget)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            assert process.stdout is not None
            for line in process.stdout:
                said = {"device": name, "torch": torch.__version__, **json.loads(line)}
                print(json.dumps(said["analysis"] if "analysis" in said else said.get("stages", said)), flush=True)
                if shape != "tiny":  # at once: what comes later may not be reached
                    known = [k for k in known if (k["device"], k["shape"], k["rows"]) != (name, shape, said["rows"])]
                    file.write_text(json.dumps([*known, said], indent=2) + "\n")
            known = json.loads(file.read_text()) if file.exists() else []


if __name__ == "__main__":
    main()
