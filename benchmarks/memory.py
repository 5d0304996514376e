"""Memory and time of one product and one training step of GPT-2 (124 M, random weights): `python benchmarks/memory.py`.

Each case runs in a process of its own, on one thread. Memory is the process's peak over what it held with the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import process_time
from typing import Any

import torch
from common import save
from transformers import GPT2Config, GPT2LMHeadModel

from curvcli.curvature import resources
from curvcli.curvature.hvp import build
from curvcli.curvature.problem import Problem
from curvcli.data import tasks

# loss, rows a batch, what is done, whether free blocks go back to the system as in `curv analyze` of a large model
CASES = [
    ("plain", 4, "training step", False),
    ("plain", 1, "training step", False),
    ("plain", 1, "fresh", False),
    ("chunked", 1, "fresh", False),
    ("plain", 4, "fresh", False),
    ("chunked", 4, "fresh", False),
    ("plain", 4, "kept", False),
    ("chunked", 4, "kept", False),
    ("plain", 4, "training step", True),
    ("chunked", 1, "fresh", True),
    ("chunked", 4, "fresh", True),
    ("chunked", 4, "kept", True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--case", type=int, help="this one, in this process")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(options.rows, options.length, *CASES[options.case])))
        return
    rows = []
    for case in range(len(CASES)):
        command = [
            sys.executable,
            __file__,
            "--rows",
            str(options.rows),
            "--length",
            str(options.length),
            "--case",
            str(case),
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    said = {"model": "GPT-2, 124 M parameters, random weights", "rows": options.rows, "length": options.length, "threads": 1}
    save("memory", {**said, "torch": torch.__version__, "cases": rows})


def measure(rows: int, length: int, loss: str, batch: int, what: str, blocks: bool) -> dict[str, Any]:
    """Peak over the model in GiB, and CPU seconds of the second time: the first builds kept graphs and moments."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if blocks:
        resources.return_blocks()
    if loss == "plain":
        tasks.LOGITS = sys.maxsize
    model = GPT2LMHeadModel(GPT2Config())
    vocabulary = model.config.vocab_size
    batches = torch.randint(vocabulary, (rows, length + 1)).split(batch)
    problem = Problem.create(model, tasks.causal_loss, batches)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if what == "training step":
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

        def work() -> None:
            for i, weight in enumerate(problem.weights):
                (weight * problem.batch_loss(i)).backward()
            optimizer.step()
            optimizer.zero_grad()

        work()
    else:
        names = list(problem.parameters)
        vectors = [torch.randn_like(p) for p in problem.parameters.values()]
        engine = build(problem, "kept" if what == "kept" else "fresh")

        def work() -> None:
            engine.product(names, vectors)

        if what == "kept":
            work()
    start = process_time()
    work()
    seconds = process_time() - start
    peak = memory("VmHWM") - before
    return {
        "what": what,
        "loss": loss,
        "rows_a_batch": batch,
        "blocks_go_back": blocks,
        "GiB_over_the_model": round(peak / 2**30, 2),
        "cpu_seconds": round(seconds, 1),
    }


def memory(field: str) -> int:
    """Bytes of a field of the process's status (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
