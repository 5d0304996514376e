"""Tracker and architecture warm-up in training loops on a GPU."""

from __future__ import annotations

import time
from typing import Any

import gpu
import pytest
import torch
from gpu import DEVICE, copied, llama, moved, say, tokens
from schedules import schedule
from torch import Tensor, nn
from torch_settings import deterministic

from curvcli.data.tasks import causal_loss
from curvcli.documents import Record
from curvcli.training import ArchitectureWarmup, CurvatureTracker
from curvcli.training.gates import Gate

pytestmark = gpu.there
Snapshot = dict[str, Tensor]


def adam(model: nn.Module, **how: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, **how)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name} {k}": v.clone() for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
    return found


def changed(one: Snapshot, other: Snapshot) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def job(how: str, tracked: bool) -> tuple[Snapshot, list[Record]]:
    """Ten steps with dropout, so that one draw from the GPU's random numbers too many would show."""
    model = llama(attention_dropout=0.2, attn_implementation="eager").to(DEVICE).train()
    if how == "bfloat16":
        model = model.bfloat16()
    optimizer = adam(model, fused=how == "fused", capturable=how == "capturable" and gpu.REAL)
    batches = moved(tokens(batches=6))
    called: Any = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    tracker = CurvatureTracker(called, optimizer, causal_loss, probe=batches[:2], every=3) if tracked else None
    records = []
    torch.manual_seed(5)
    for step in range(10):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=how == "autocast"):
            loss = causal_loss(called, batches[step % 6])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if tracker is not None and (record := tracker.step(step)) is not None:
            records.append(record)
    assert model.training
    return snapshot(model, optimizer), records


@pytest.mark.parametrize("how", ["plain", "fused", "capturable", "autocast", "bfloat16", "compiled"])
def test_the_training_does_not_notice(how: str) -> None:
    with deterministic():
        (first, _), (second, _), (tracked, records) = job(how, False), job(how, False), job(how, True)
    assert not changed(first, second), f"not bit-equal without a tracker either: {changed(first, second)[:5]}"
    assert not changed(first, tracked), f"{len(changed(first, tracked))} tensors differ: {changed(first, tracked)[:5]}"
    assert len(records) == 4
    for record in records:
        assert record.status in ("converged", "unconverged"), record
        assert record.rho is not None, record
        assert 0 < record.rho < 1e6, record
        assert record.update_ratio is None or abs(record.update_ratio) < 1e6, record
        assert record.seconds > 0, record


@pytest.mark.parametrize("how", ["plain", "fused"])
def test_a_record_is_the_cpus(how: str) -> None:
    model = llama().to(DEVICE)
    optimizer = adam(model, fused=how == "fused")
    batches = tokens()
    gpu.trained(model, optimizer, moved(batches))
    options: dict[str, Any] = {
        "max_hvps": 60, "gradient_quotient": True, "attention": True, "spectral_norms": True, "tolerance": 1e-3,
    }  # fmt: skip
    here = CurvatureTracker(model, optimizer, causal_loss, probe=moved(batches), **options).step(20)
    other, state = copied(model, optimizer, adam)
    there = CurvatureTracker(other, state, causal_loss, probe=batches, **options).step(20)
    assert here is not None
    assert there is not None
    assert (here.status, there.status) == ("converged", "converged"), (here, there)
    wrong = {}
    for name, allowed in {
        "eigenvalue": 1e-3, "rho": 1e-3, "update_ratio": 1e-2, "update_rms": 1e-4, "gradient_norm": 1e-4,
        "gradient_quotient": 1e-3, "attention_logit": 1e-4, "attention_entropy": 1e-4, "spectral_norm": 1e-2,
    }.items():  # fmt: skip
        a, b = getattr(here, name), getattr(there, name)
        if a is None or b is None or abs(a - b) > allowed * abs(b):
            wrong[name] = (a, b)
    assert not wrong, wrong


@gpu.real
def test_a_measurement_waits_little_for_the_gpu() -> None:
    model = llama().to(DEVICE)
    optimizer, batches = adam(model, fused=True), moved(tokens())
    gpu.trained(model, optimizer, batches)
    tracker = CurvatureTracker(model, optimizer, causal_loss, probe=batches, max_hvps=10, tolerance=1e-9)
    tracker.step(0)
    with gpu.waits() as found:
        record = tracker.step(1)
    assert record is not None
    tensors = len(list(model.parameters()))
    say(f"waits in a measurement of {record.hvps} products, {tensors} tensors: {len(found)} ({gpu.counted(found)})")
    # Of a product with its batch losses some dozens, and some of each tensor of the state.
    assert len(found) <= 45 * record.hvps + 16 * tensors, f"{len(found)}: {gpu.counted(found)}"


def test_a_budget_is_kept() -> None:
    """Steps of 25 ms; after the first measurement, which is there to learn what one costs, each has to be earned."""
    model = llama().to(DEVICE).train()
    optimizer, batches = adam(model), moved(tokens(batches=6))
    tracker = CurvatureTracker(model, optimizer, causal_loss, probe=batches, max_overhead=0.25, max_hvps=5)
    began, step, records = time.monotonic(), 0, []
    while time.monotonic() - began < 12:
        causal_loss(model, batches[step % 6]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if gpu.REAL:
            torch.cuda.synchronize()
        time.sleep(0.02)
        if (record := tracker.step(step)) is not None:
            records.append(record)
        step += 1
    share = tracker.ledger.share
    say(f"budget 0.25: {share:.3f} of it, {len(records)} measurements in {step} steps, first {records[0].seconds:.1f} s")
    assert len(records) >= 3, records
    assert share <= 0.25 * 1.3, [(r.step, r.seconds, r.overhead) for r in records]


@gpu.real
def test_memory_that_runs_out_is_a_record_and_comes_back() -> None:
    model = llama(width=512, layers=4, vocabulary=4096, length=256).to(DEVICE).train()
    optimizer = adam(model)
    batches = moved(tokens(batches=2, rows=16, length=129, vocabulary=4096))
    gpu.trained(model, optimizer, batches, steps=3)
    tracker = CurvatureTracker(model, optimizer, causal_loss, probe=batches)
    torch.cuda.reset_peak_memory_stats()
    fine = tracker.step(0)
    needed, before = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    assert fine is not None
    assert fine.status in ("converged", "unconverged"), fine
    torch.cuda.empty_cache()
    other = CurvatureTracker(model, optimizer, causal_loss, probe=batches)
    try:
        torch.cuda.set_per_process_memory_fraction((before + 2**26) / torch.cuda.mem_get_info()[1])
        failed = other.step(0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    after = torch.cuda.memory_allocated()
    say(f"tracker: {before / 2**20:.0f} MiB before, {needed / 2**20:.0f} at its peak, {after / 2**20:.0f} after it failed")
    assert failed is not None
    assert failed.status == "failed", failed
    assert "out of memory" in (failed.message or ""), failed
    assert after <= before + 2**22, f"{after - before:,} bytes stay"
    gpu.trained(model, optimizer, batches, steps=1)
    again = other.step(1)
    assert again is not None
    assert again.status in ("converged", "unconverged"), again


@gpu.real
def test_a_short_measurement_takes_few_vectors() -> None:
    """An empty tensor takes its memory at once on a GPU: a basis of 24 and its images would be 48 vectors."""
    model = llama(width=512, layers=4, vocabulary=4096, length=256).to(DEVICE)
    optimizer, batches = adam(model), moved(tokens(batches=1, rows=2, length=33, vocabulary=4096))
    gpu.trained(model, optimizer, batches, steps=3)
    tracker = CurvatureTracker(model, optimizer, causal_loss, probe=batches, max_hvps=5)
    tracker.step(0)
    vector = sum(p.nbytes for p in model.parameters())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tracker.step(1)
    taken = (torch.cuda.max_memory_allocated() - before) / vector
    say(f"a measurement of 5 products takes {taken:.1f} vectors")
    assert taken < 30


@pytest.mark.parametrize("mode", ["grow", "freeze"])
def test_locked_blocks_hold_still_and_join(mode: str) -> None:
    model = llama(layers=3).to(DEVICE).train()
    optimizer, batches = adam(model, fused=True), moved(tokens(batches=6))
    warmup = ArchitectureWarmup(model, optimizer, schedule(3, (0, [0]), (4, [0, 1]), (8, range(3)), mode=mode))
    tracker = CurvatureTracker(model, optimizer, causal_loss, probe=batches[:2], warmup=warmup, every=4)
    depths = []
    for step in range(12):
        warmup.step(step)
        before = snapshot(model, optimizer)
        causal_loss(model, batches[step % 6]).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved_ = {
            int(n.split(".")[2]) for n in changed(before, snapshot(model, optimizer)) if ".layers." in n and " " not in n
        }
        active = set(range(1 + (step >= 4) + (step >= 8)))
        assert moved_ <= active, f"step {step}: blocks {moved_} moved, {active} train"
        assert moved_ == active or step in (4, 8), f"step {step}: blocks {moved_} moved, {active} train"
        if (record := tracker.step(step)) is not None:
            assert record.status in ("converged", "unconverged"), record
            depths.append(record.active_depth)
    assert depths == [1, 2, 3]
    if gpu.REAL:
        with gpu.waits() as found:
            warmup.step(12)
        say(f"waits in a step of a warm-up: {len(found)} ({gpu.counted(found)})")
        assert len(found) <= 2, gpu.counted(found)
    warmup.detach()


def test_gates_open_on_the_device() -> None:
    model = llama().to(DEVICE)
    stack: Any = model.model
    gate = Gate(1, stack.layers[1])
    ids = moved(tokens(batches=1))[0]
    whole = llama().to(DEVICE)
    gate.set(1.0)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    gate.set(0.0)
    whole.model.layers = whole.model.layers[:1]
    torch.testing.assert_close(model(ids).logits, whole(ids, use_cache=False).logits)
    gate.remove()


def test_state_that_was_saved_goes_on_on_the_device() -> None:
    model = llama().to(DEVICE)
    optimizer, batches = adam(model), moved(tokens())
    gpu.trained(model, optimizer, batches)
    tracker = CurvatureTracker(model, optimizer, causal_loss, probe=batches, update_ratio=False)
    tracker.step(0)
    state = dict(tracker.state_dict())
    state["direction"] = {n: t.cpu() for n, t in state["direction"].items()}
    other = CurvatureTracker(model, optimizer, causal_loss, probe=batches, update_ratio=False)
    other.load_state_dict(state)
    record, cold = other.step(1), CurvatureTracker(model, optimizer, causal_loss, probe=batches, update_ratio=False).step(1)
    assert record is not None
    assert cold is not None
    assert record.hvps < cold.hvps, (record, cold)
