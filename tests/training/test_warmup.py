"""Architecture warm-up in a plain PyTorch loop: what is locked stays still, what joins learns, a killed job repeats."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from warmup_job import DEPTH, FREEZE, GROW, TOTAL, Job, batch, block_of, build, same, weights

from curvcli.documents import Schedule
from curvcli.errors import InputError, UnsupportedError, UsageError
from curvcli.training import ArchitectureWarmup, DeadBlockError


@pytest.mark.parametrize("plan", [GROW, FREEZE], ids=["grow", "freeze"])
def test_what_is_locked_has_no_part_in_the_update(plan: Schedule) -> None:
    job = Job(plan)
    job.warmup.step(0)
    before = weights(job.model)
    job.run(range(4))
    names = {id(p): n for n, p in job.model.named_parameters()}
    with_state = {names[id(p)] for p in job.optimizer.state}
    for name, value in before.items():
        locked = block_of(name) in (2, 3)
        moved = not torch.equal(value, job.model.get_parameter(name))
        assert moved is not locked, name  # neither gradient nor weight decay
        assert (name in with_state) is not locked, name
    assert len(job.optimizer.param_groups) == 1
    assert len(job.optimizer.param_groups[0]["params"]) == len(before)


@pytest.mark.parametrize("plan", [GROW, FREEZE], ids=["grow", "freeze"])
def test_locked_blocks_have_no_share_in_clipping(plan: Schedule) -> None:
    job = Job(plan)
    job.warmup.step(0)
    ids = batch(0)
    job.model(input_ids=ids, labels=ids).loss.backward()
    active = [p.grad for n, p in job.model.named_parameters() if block_of(n) not in (2, 3)]
    locked = [p.grad for n, p in job.model.named_parameters() if block_of(n) in (2, 3)]
    assert all(g is not None for g in locked)  # DistributedDataParallel counts on them
    norm = nn.utils.clip_grad_norm_(job.model.parameters(), float("inf"))
    assert torch.equal(norm, torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in active])))
    job.warmup.detach()
    job.model.zero_grad()
    job.model(input_ids=ids, labels=ids).loss.backward()
    assert nn.utils.clip_grad_norm_(job.model.parameters(), float("inf")) > norm  # they do have gradients


def test_grow_gives_the_shallow_models_output() -> None:
    job = Job()
    job.warmup.step(0)
    shallow = build()
    shallow.model.layers = shallow.model.layers[:2]
    with torch.no_grad():
        assert torch.equal(job.model(input_ids=batch(0)).logits, shallow(input_ids=batch(0)).logits)


def test_everything_learns_after_the_last_unlock() -> None:
    job = Job()
    job.run(range(8))
    before = weights(job.model)
    job.run(range(8, TOTAL))
    assert all(not torch.equal(before[n], p) for n, p in job.model.named_parameters())
    assert job.warmup.active_depth == DEPTH


@cache
def whole_job(**options: Any) -> Job:
    return Job(**options).run(range(TOTAL))


@pytest.mark.parametrize(
    ("kill", "options"),
    [*((kill, {}) for kill in (3, 4, 5, 8, 10)), (4, {"fused": True}), (4, {"foreach": True})],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_a_killed_job_repeats_to_the_bit(tmp_path: Path, kill: int, options: dict[str, Any]) -> None:
    whole = whole_job(**options)
    Job(**options).run(range(kill)).save(tmp_path / "job.pt")
    # Another seed: whatever is not restored shows.
    resumed = Job(model=build(seed=1), **options).load(tmp_path / "job.pt").run(range(kill, TOTAL))
    assert same(whole.model, resumed.model)
    assert whole.norms[kill:] == resumed.norms


def test_a_killed_job_repeats_in_freeze(tmp_path: Path) -> None:
    whole = Job(FREEZE).run(range(TOTAL))
    Job(FREEZE).run(range(5)).save(tmp_path / "job.pt")
    assert same(whole.model, Job(FREEZE, model=build(seed=1)).load(tmp_path / "job.pt").run(range(5, TOTAL)).model)


def test_gradient_accumulation() -> None:
    """Micro-batches of equal size sum to the batch; the locks hold over each of them."""
    one, three = Job().run(range(6)), Job().run(range(6), micro_batches=1)
    assert same(one.model, three.model)
    accumulated = Job().run(range(6), micro_batches=2)
    assert all(not accumulated.optimizer.state[p] for n, p in accumulated.model.named_parameters() if block_of(n) == 3)
    assert accumulated.warmup.locks[3].moved() == []


def test_mixed_precision_with_a_gradient_scaler() -> None:
    job = Job()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        job.warmup.step(step)
        ids = batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = job.model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(job.optimizer)
        nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
        scaler.step(job.optimizer)
        scaler.update()
        job.optimizer.zero_grad()
    assert job.warmup.locks[3].moved() == []
    assert job.warmup.locks[2].moved() != []


def test_an_overflow_in_a_locked_block_stays_there() -> None:
    model = build()
    # Registered before the job's own, as an overflow in the backward pass comes before every hook.
    model.model.layers[3].mlp.down_proj.weight.register_hook(lambda g: g * float("nan"))
    job = Job(FREEZE, model=model).run(range(2))
    assert all(bool(torch.isfinite(p).all()) for p in job.model.parameters())


@pytest.mark.slow
def test_compiled_models_do_not_compile_again_at_an_unlock() -> None:
    torch._dynamo.reset()
    model = build(attn_implementation="eager")
    compiled = torch.compile(model, backend="aot_eager")
    job = Job(model=compiled)  # type: ignore[arg-type]
    job.run(range(3))
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    job.run(range(3, TOTAL))
    assert counters["stats"]["unique_graphs"] == before
    assert job.warmup.active_depth == DEPTH
    plain = Job(model=build(attn_implementation="eager")).run(range(TOTAL))
    for a, b in zip(plain.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_dead_block_is_an_error() -> None:
    """All matrices zero, the saddle of curvature.md 9: the gradient of each of them is exactly zero."""
    job = Job()
    with torch.no_grad():
        for name, parameter in job.model.model.layers[2].named_parameters():
            if "norm" not in name:
                parameter.zero_()
    job.warmup.patience = 3
    job.run(range(6))
    with pytest.raises(DeadBlockError, match=r"block 2 joined 3 updates before step 6: its .* has not moved"):
        job.run([6])


def test_a_block_without_gradient_behind_its_outputs_is_an_error() -> None:
    job = Job()
    job.warmup.patience = 3
    for parameter in [p for n, p in job.model.model.layers[2].named_parameters() if "o_proj" not in n and "down" not in n]:
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(DeadBlockError, match="no gradient has come through"):
        job.run(range(TOTAL))


def test_no_update_is_no_death() -> None:
    """With a learning rate of 0 nothing moves, and that is nobody's fault."""
    job = Job()
    job.warmup.patience = 2
    job.scheduler.lr_lambdas[0] = lambda s: 0.0
    job.run(range(TOTAL))


def test_misuse_is_refused(tmp_path: Path) -> None:
    small = build()
    small.model.layers = small.model.layers[:2]
    with pytest.raises(UsageError, match="schedule is for depth 4, the model has 2 blocks"):
        Job(model=small)
    job = Job()
    job.model(input_ids=batch(0), labels=batch(0)).loss.backward()
    with pytest.raises(UsageError, match="the optimizer steps before the schedule was told"):
        job.optimizer.step()
    Job().run(range(6)).save(tmp_path / "job.pt")
    with pytest.raises(UsageError, match="optimizer has taken steps"):
        Job().load(tmp_path / "job.pt").run([0])
    with pytest.raises(UsageError, match=r"block 2 is locked at step 3 and its .* is not at rest"):
        Job().run([3])
    with pytest.raises(InputError, match=r"missing\.json does not exist"):
        Job(tmp_path / "missing.json")


def test_a_block_that_normalises_the_stream_is_refused_at_its_first_pass() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.fc2(torch.relu(self.fc1(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(PostNorm() for _ in range(DEPTH))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    net = Net()
    warmup = ArchitectureWarmup(net, torch.optim.SGD(net.parameters(), lr=0.1), GROW)
    warmup.step(0)
    with pytest.raises(UnsupportedError, match="block 2, a PostNorm, is no identity"):
        net(torch.randn(2, 4))


def test_unlocks_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="curvcli"):
        Job().run(range(9))
    assert [r.getMessage() for r in caplog.records] == [
        "step 4: blocks [2] join, 3 of 4 train",
        "step 8: blocks [3] join, 4 of 4 train",
    ]
