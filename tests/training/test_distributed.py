"""Architecture warm-up and the tracker on two gloo ranks: DistributedDataParallel and fully_shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import WORLD, launch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from warmup_job import DEPTH, GROW, TOTAL, Job, batch, block_of, build

from curvcli.training import ArchitectureWarmup, CurvatureTracker
from curvcli.training.locks import local

pytestmark = pytest.mark.slow


class Ranked(Job):
    """The job with half of each batch on each rank."""

    def run(self, steps, micro_batches=1):  # type: ignore[no-untyped-def]
        for step in steps:
            self.warmup.step(step)
            ids = batch(step).chunk(WORLD)[dist.get_rank()]
            self.model(input_ids=ids, labels=ids).loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self


def _data_parallel(rank: int, path: Path) -> None:
    job = Ranked(model=DistributedDataParallel(build()))
    tracker = CurvatureTracker(
        job.model, job.optimizer, lambda m, ids: m(input_ids=ids, labels=ids).loss, probe=[batch(99)], warmup=job.warmup
    )
    records = []
    for step in range(TOTAL):
        job.run([step])
        record = tracker.step(step)
        assert record is not None
        records.append((record.rho, record.status, record.message))
        if step == 3:
            assert job.warmup.locks[2].moved() == []
            moved = [block_of(n) for n, p in job.model.module.named_parameters() if job.optimizer.state[p]]
            assert set(moved) == {None, 0, 1}
    torch.save({"model": job.model.module.state_dict(), "norms": job.norms, "records": records}, path / f"{rank}.pt")


def test_data_parallel_is_the_single_process_run(tmp_path: Path) -> None:
    launch(_data_parallel, tmp_path)
    single = Job().run(range(TOTAL))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for name, value in single.model.state_dict().items():
        assert torch.equal(found[0]["model"][name], found[1]["model"][name])
        torch.testing.assert_close(found[0]["model"][name], value, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(torch.tensor(found[0]["norms"]), torch.tensor(single.norms), rtol=1e-3, atol=1e-4)
    assert found[0]["records"] == found[1]["records"]
    assert {status for _, status, _ in found[0]["records"]} <= {"converged", "unconverged"}


def _sharded(rank: int, path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = build()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    job = Ranked(model=model)
    tracker = CurvatureTracker(job.model, job.optimizer, lambda m, ids: m(input_ids=ids, labels=ids).loss, probe=[batch(99)])
    job.run(range(4))
    assert job.warmup.locks[2].moved() == job.warmup.locks[3].moved() == []
    assert {block_of(n) for n, p in model.named_parameters() if job.optimizer.state[p]} == {None, 0, 1}
    record = tracker.step(3)
    assert record is not None
    assert record.status == "failed"
    assert "fully_shard" in (record.message or "")
    job.run(range(4, TOTAL))
    assert job.warmup.active_depth == DEPTH
    whole = {n: p.full_tensor() for n, p in model.state_dict().items()}
    torch.save({"model": whole, "norms": job.norms}, path / f"{rank}.pt")


def test_fully_sharded_is_the_single_process_run(tmp_path: Path) -> None:
    launch(_sharded, tmp_path)
    single = Job().run(range(TOTAL))
    found = torch.load(tmp_path / "0.pt", weights_only=True)
    torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(single.norms), rtol=1e-3, atol=1e-4)
    for name, value in single.model.state_dict().items():
        torch.testing.assert_close(found["model"][name], value, rtol=1e-2, atol=2e-3)


def _by_closure(rank: int, path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    def wrapped(how: str) -> Any:
        model = build()
        if how == "fully_shard":
            for layer in model.model.layers:
                fully_shard(layer)
            return fully_shard(model)
        return DistributedDataParallel(model, gradient_as_bucket_view=how == "views")

    for how in ("buckets", "views", "fully_shard"):
        plain, closed = (Ranked(model=wrapped(how)) for _ in range(2))
        for step in range(6):  # across an unlock
            ids = batch(step).chunk(WORLD)[rank]
            for job in (plain, closed):
                job.warmup.step(step)

                def closure(job: Ranked = job, ids: torch.Tensor = ids) -> torch.Tensor:
                    job.optimizer.zero_grad()
                    loss = job.model(input_ids=ids, labels=ids).loss
                    loss.backward()
                    return loss

                if job is closed:
                    job.optimizer.step(closure)
                else:
                    closure()
                    job.optimizer.step()
            assert closed.warmup.locks[3].moved() == []
            locked = {id(p) for i in closed.warmup.locked for p in closed.warmup.locks[i].parameters.values()}
            pairs = list(zip(plain.model.parameters(), closed.model.parameters(), strict=True))
            assert sum(not closed.optimizer.state[p] for p in closed.model.parameters()) == len(locked) > 0
            for one, other in pairs:
                assert torch.equal(local(one), local(other)), (how, step)
                for key, value in plain.optimizer.state[one].items():
                    assert torch.equal(local(value), local(closed.optimizer.state[other][key])), (how, step, key)


def test_closures_step_as_without_them(tmp_path: Path) -> None:
    launch(_by_closure, tmp_path)


def _dead(rank: int, path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    from curvcli.training import DeadBlockError

    model = build()
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            if "norm" not in name:
                parameter.zero_()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    job = Ranked(model=model)
    assert isinstance(job.warmup, ArchitectureWarmup)
    job.warmup.patience = 2
    with pytest.raises(DeadBlockError, match="block 2"):
        job.run(range(TOTAL))


def test_a_dead_block_is_seen_when_sharded(tmp_path: Path) -> None:
    launch(_dead, tmp_path)


def test_the_schedule_of_these_tests_locks_and_unlocks() -> None:
    assert GROW.locked_at(3) == {2, 3}
    assert GROW.locked_at(TOTAL) == frozenset()
