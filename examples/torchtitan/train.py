"""A small Llama under fully_shard on several ranks, saved as torchtitan saves: outputs/checkpoint/step-N and config.json."""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from nets import llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from curvcli.training import CurvatureTracker

TEXT = Path(__file__).resolve().parents[2] / "sample_checkpoints" / "data" / "moby_dick.txt"
WINDOW = 64


def loss_of(model, window):
    return functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def save(place, model, optimizer, scheduler, step):
    """What torchtitan's CheckpointManager saves: weights at the top, the rest under names of their own."""
    groups = [(dict(zip(g["param_names"], g["params"], strict=True)), g) for g in optimizer.param_groups]
    kept = {f"state.{n}.{k}": v for named, _ in groups for n, p in named.items() for k, v in optimizer.state[p].items()}
    options = {
        f"param_groups.{n}.{k}": v for named, g in groups for n in named for k, v in g.items() if not k.startswith("param")
    }
    state = {
        **model.state_dict(),
        "optimizer": {**kept, **options},
        "lr_scheduler": {"last_epoch": scheduler.last_epoch},
        "train_state": {"step": step, "ntokens_seen": step * 16 * WINDOW},
    }
    dcp.save(state, checkpoint_id=place / f"step-{step}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world, outputs = dist.get_rank(), dist.get_world_size(), Path("outputs")

    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8)
    if rank == 0:
        outputs.mkdir(exist_ok=True)
        text[:65_000].short().numpy().astype("<u2").tofile("shard.bin")
        job = {"training": {"seq_len": WINDOW, "steps": given.steps}, "optimizer": {"lr": given.lr}}
        (outputs / "config.json").write_text(json.dumps(job, indent=2))  # debug.save_config_file
    stream = text.long()

    def batch(step, rows=16):
        starts = torch.randint(len(stream) - WINDOW - 1, (rows,), generator=torch.Generator().manual_seed(step))
        return torch.stack([stream[i : i + WINDOW + 1] for i in starts])

    torch.manual_seed(0)  # the same weights on every rank
    model = llama()
    for block in (*model.layers.values(), model):
        fully_shard(block)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=given.lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    log = outputs / "curvature.jsonl" if rank == 0 else None
    tracker = CurvatureTracker(model, optimizer, loss_of, probe=[batch(-1, 4), batch(-2, 4)], every=20, split=True, log=log)
    for step in range(1, given.steps + 1):
        loss = loss_of(model, batch(step)[rank::world])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        tracker.step(step, loss=mean.item() / world)
        if step % max(1, given.steps // 2) == 0:
            save(outputs / "checkpoint", model, optimizer, scheduler, step)
            if rank == 0:
                print(f"step {step}: loss {mean.item() / world:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
