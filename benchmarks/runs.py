"""Small training runs for the benchmarks of the method: one function that trains, one model, one text.

A Llama (byte tokens) on Moby-Dick with AdamW, linear warm-up and cosine decay to a tenth, gradients clipped
at 1. One thread and seeded throughout: a run is repeated to the last bit on the same machine and torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from common import SAMPLES
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from curvcli import __version__
from curvcli.documents import Order, Phase, Schedule, ScheduleProvenance, Versions
from curvcli.training import ArchitectureWarmup, CurvatureTracker

SEQUENCE, BATCH = 64, 8


@dataclass(frozen=True)
class Run:
    """One training run: everything that its result depends on."""

    method: str = "plain"  # plain, last, first, interleaved, qk-norm, softcap
    lr: float = 3e-3
    seed: int = 0
    layers: int = 12
    width: int = 48
    steps: int = 400
    warmup: int = 50  # of the learning rate; 0 is none
    unlock_from: int = 50
    interval: int = 25


def text() -> tuple[Tensor, Tensor]:
    """Training and validation bytes; the validation text is the book's last eighth."""
    ids = torch.from_numpy(np.frombuffer((SAMPLES / "data" / "moby_dick.txt").read_bytes(), dtype=np.uint8).copy()).long()
    cut = len(ids) * 7 // 8
    return ids[:cut], ids[cut:]


def windows(ids: Tensor, starts: Tensor) -> Tensor:
    return torch.stack([ids[i : i + SEQUENCE + 1] for i in starts.tolist()])


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def build(run: Run) -> nn.Module:
    torch.manual_seed(run.seed)
    shape: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": run.width,
        "intermediate_size": 2 * run.width,
        "num_hidden_layers": run.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": SEQUENCE,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    if run.method == "qk-norm":  # Qwen3 is a Llama with RMSNorm on queries and keys
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=run.width // 4, attention_bias=False))
    model = LlamaForCausalLM(LlamaConfig(**shape))
    if run.method == "softcap":
        model.lm_head.register_forward_hook(lambda module, args, logits: 15 * torch.tanh(logits / 15))
    return model


def lr_at(run: Run, step: int) -> float:
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    done = (step - run.warmup) / max(run.steps - run.warmup, 1)
    return run.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def schedule(run: Run, order: Order) -> Schedule:
    """Half the depth, then four groups, in the given order."""
    half = run.layers // 2
    every = list(range(run.layers))
    start = {"last": every[:half], "first": every[half:], "interleaved": every[::2]}[order]
    waiting = [i for i in every if i not in start]
    if order == "first":
        waiting.reverse()
    cuts = [round(len(waiting) * k / 4) for k in range(5)]
    phases = [Phase(step=0, latest=0, active=sorted(start), unlock=[], lr=None, predicted_rho=None)]
    for k in range(4):
        group = waiting[cuts[k] : cuts[k + 1]]
        if group:
            start = start + group
            at = run.unlock_from + k * run.interval
            phases.append(
                Phase(
                    step=at,
                    latest=at + run.interval,
                    active=sorted(start),
                    unlock=sorted(group),
                    lr=None,
                    predicted_rho=None,
                )
            )
    versions = Versions(curvcli=__version__, torch=torch.__version__, transformers=None, python="3")
    return Schedule(
        mode="grow",
        depth=run.layers,
        order=order,
        blocks=None,
        lock="zero-output",
        margin=None,
        lr_schedule=None,
        phases=phases,
        findings=[],
        provenance=ScheduleProvenance(report=None, report_sha256=None, checkpoint=None, versions=versions),
    )


def train(run: Run, *, track_every: int = 0, max_hvps: int = 10, observe: Any = None) -> dict[str, Any]:
    """Train to the end. Returns the run, its final validation loss (null where it diverged), and rho where tracked."""
    torch.set_num_threads(1)
    ids, held = text()
    model = build(run)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.99))
    warmup = None
    if run.method in ("last", "first", "interleaved"):
        warmup = ArchitectureWarmup(model, optimizer, schedule(run, run.method))
    generator = torch.Generator().manual_seed(1000 + run.seed)
    probe = windows(ids, torch.randint(len(ids) - SEQUENCE - 1, (16,), generator=torch.Generator().manual_seed(7)))
    tracker = None
    if track_every:
        tracker = CurvatureTracker(
            model, optimizer, loss, probe=[probe], every=track_every, max_hvps=max_hvps, update_ratio=False, warmup=warmup
        )
    curve, losses = [], []
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(run, step)
        if warmup:
            warmup.step(step)
        value = loss(model, windows(ids, torch.randint(len(ids) - SEQUENCE - 1, (BATCH,), generator=generator)))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))
        if tracker and (record := tracker.step(step, loss=losses[-1])):
            curve.append((step, record.rho, record.status, record.active_depth))
        if observe:
            observe(step, model, optimizer, probe)
        if not math.isfinite(losses[-1]):
            break
    with torch.no_grad():
        starts = torch.arange(0, 512) * ((len(held) - SEQUENCE - 1) // 512)
        final = float(loss(model, windows(held, starts)))
    return {
        "run": asdict(run),
        "validation_loss": final if math.isfinite(final) else None,
        "worst_loss_after_warmup": max((v for v in losses[100:] if math.isfinite(v)), default=None),
        "loss": [round(v, 4) if math.isfinite(v) else None for v in losses[::10]],
        "rho": curve,
    }
