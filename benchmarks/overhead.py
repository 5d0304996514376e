"""What a tracker under a budget really takes: its share of a training job's seconds, by a stopwatch of this script's own.

`python benchmarks/overhead.py`: two jobs (a GPT-2, and the sample checkpoints' Llama), each with two
budgets, on a probe of eight batches. Seconds are those of the processor, of one thread, so that other work on the machine
counts little; the tracker is given the same clock, where in a job it goes by the wall's.
"""

from __future__ import annotations

import json
from itertools import pairwise
from statistics import median
from time import process_time
from typing import Any

import runs
import torch
from common import HERE, SAMPLES
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from curvcli.checkpoints import open_checkpoint
from curvcli.training import CurvatureTracker

SHARES = (0.05, 0.02)
ROWS, PROBE, BATCHES = 16, 2, 8  # rows of a training batch, of a probe's batch, and batches of the probe


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": runs.SEQUENCE, "vocab_size": 256}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, **still, bos_token_id=None, eos_token_id=None))


def sample() -> nn.Module:
    return open_checkpoint(SAMPLES / "calm" / "checkpoint-10").model()


def play(build: Any, steps: int, share: float) -> dict[str, Any]:
    """One job. Its seconds without the tracker's, the tracker's, and what the log says of them."""
    ids, _ = runs.text()
    draw = torch.Generator().manual_seed(0)

    def batch(rows: int) -> Tensor:
        return runs.windows(ids, torch.randint(len(ids) - runs.SEQUENCE - 1, (rows,), generator=draw))

    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = [batch(PROBE) for _ in range(BATCHES)]
    tracker = CurvatureTracker(model, optimizer, runs.loss, probe=probe, max_overhead=share)
    tracker.ledger.clock = process_time
    trained = measured = 0.0
    records = []
    model.train()
    for step in range(steps):
        start = process_time()
        runs.loss(model, batch(ROWS)).backward()
        optimizer.step()
        optimizer.zero_grad()
        middle = process_time()
        if record := tracker.step(step):
            records.append(record)
        trained += middle - start
        measured += process_time() - middle
    gaps = [b.step - a.step for a, b in pairwise(records)]
    return {
        "share": share,
        "steps": steps,
        "train_seconds": trained,
        "tracker_seconds": measured,
        "measured_share": measured / trained,
        "logged_share": records[-1].overhead if records else None,
        "highest_logged_share_after_100": max((r.overhead or 0 for r in records if r.step >= 100), default=None),
        "records": len(records),
        "converged": sum(r.status == "converged" for r in records),
        "batches": records[-1].probe_batches if records else None,
        "second_record_at": records[1].step if len(records) > 1 else None,
        "interval": median(gaps[len(gaps) // 2 :]) if gaps else None,
        "products": median(r.hvps for r in records) if records else None,
    }


def main() -> None:
    torch.set_num_threads(1)
    found = {
        name: [play(build, steps, share) for share in SHARES]
        for name, build, steps in (("gpt2", gpt2, 800), ("sample", sample, 1000))
    }
    document = {"torch": torch.__version__, "rows": ROWS, "probe_rows": PROBE, "batches": BATCHES, "jobs": found}
    (HERE / "results" / "overhead.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
