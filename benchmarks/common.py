"""One model, one batch, one truth for every benchmark: a sample checkpoint and the bare Hessian of its loss."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from curvcli.checkpoints import open_checkpoint
from curvcli.curvature.problem import Problem
from curvcli.data.shards import read_shard
from curvcli.data.tasks import causal_loss

HERE = Path(__file__).resolve().parent
SAMPLES = HERE.parent / "sample_checkpoints"


def arguments(description: str, *, profile: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, default=SAMPLES / "calm" / "checkpoint-60")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    if profile:
        parser.add_argument("--profile", action="store_true", help="of all parts of the model")
    return parser.parse_args()


def problem(options: argparse.Namespace) -> Problem:
    checkpoint = open_checkpoint(options.checkpoint)
    shard = read_shard(SAMPLES / "data" / "shard.bin", checkpoint, tokens=options.tokens, sequence_length=64)
    batches = [b.to(options.device) for b in shard.batches(options.batch_size)]
    return Problem.create(checkpoint.model().to(options.device), causal_loss, batches, [len(b) for b in batches])


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median wall time after one call that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return median(times)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "checkpoint": "/".join(options.checkpoint.parts[-2:]),
        "tokens": options.tokens,
    }


def save(name: str, document: dict[str, Any]) -> None:
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


def flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])
