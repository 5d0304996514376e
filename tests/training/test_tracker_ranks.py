"""The tracker on gloo ranks: DistributedDataParallel, fully_shard and what is refused, the probe split over the ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from warmup_job import batch, build

from curvcli.curvature.precision import whole
from curvcli.training import CurvatureTracker, together
from curvcli.training.locks import local

pytestmark = pytest.mark.slow

PROBE = [batch(99, 3), batch(98, 1)]  # as many predictions in a row, unequal batches
WEIGHTS = [3.0, 1.0]
STEPS = 5


def causal(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def trained(model: nn.Module, tracked: bool, loss: Any = causal, **settings: Any) -> tuple[list[Any], list[Tensor]]:
    """Records of a tracker, if any, and this rank's parameters after some steps on its part of the batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tracker = None
    if tracked:
        tracker = CurvatureTracker(
            model, optimizer, loss, probe=PROBE, weights=WEIGHTS, tolerance=1e-5, max_hvps=60, attention=True,
            gradient_quotient=True, **settings,
        )  # fmt: skip
    records = []
    world = dist.get_world_size() if dist.is_initialized() else 1
    for step in range(STEPS):
        part = batch(step).chunk(world)[dist.get_rank()] if world > 1 else batch(step)
        causal(model, part).backward()
        optimizer.step()
        optimizer.zero_grad()
        if tracker is not None:
            records.append(tracker.step(step))
    return records, [local(p).detach().clone() for p in model.parameters()]


def plain(records: list[Any]) -> list[dict[str, Any]]:
    return [record.model_dump(exclude={"seconds", "overhead"}) for record in records]


def _wrapped(how: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build()
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if how == "hsdp" else None
    for layer in model.model.layers:  # as torchtitan does: each block, then the root
        fully_shard(layer, mesh=mesh, reshard_after_forward=how != "kept")
    fully_shard(model, mesh=mesh, reshard_after_forward=how != "kept")
    return model


def _works(rank: int, path: Path) -> None:
    hows = ["hsdp"] if dist.get_world_size() == 4 else ["ddp", "resharded", "kept"]
    for how in hows:
        _, without = trained(_wrapped(how), tracked=False)
        records, within = trained(_wrapped(how), tracked=True, split=True)
        assert all(torch.equal(one, other) for one, other in zip(without, within, strict=True)), how
        torch.save(plain(records), path / f"{how}-{rank}.pt")


@pytest.mark.parametrize("world", [2, 4])
def test_records_are_those_of_one_process_and_training_is_bit_equal(world: int, tmp_path: Path) -> None:
    launch(_works, tmp_path, world=world)
    single = plain(trained(build(), tracked=True)[0])
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == (4 if world == 4 else 6)
    for file in files:
        found = torch.load(file, weights_only=True)
        assert found == torch.load(file.with_name(f"{file.stem[:-1]}0.pt"), weights_only=True)  # to the bit on all ranks
        for one, other in zip(single, found, strict=True):
            assert (one["status"], other["status"]) == ("converged", "converged")
            for name in ("eigenvalue", "rho", "gradient_norm", "gradient_quotient", "attention_logit", "update_rms"):
                # The runs differ by the rounding of their gradients, which Adam's first steps make much of.
                assert other[name] == pytest.approx(one[name], rel=2e-2), (file.stem, name)


def _budgeted(rank: int, path: Path) -> None:
    model = _wrapped("resharded")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tracker = CurvatureTracker(model, optimizer, causal, probe=PROBE, weights=WEIGHTS, split=True, max_overhead=1.0)
    records = []
    for step in range(12):
        causal(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 1:
            time.sleep(0.02)  # by its own clock it would have earned more
        records.append(tracker.step(step))
    torch.save([plain([record]) if record else None for record in records], path / f"{rank}.pt")


def test_within_a_budget_all_ranks_measure_at_the_steps_of_the_first(tmp_path: Path) -> None:
    launch(_budgeted, tmp_path, world=2)
    first, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == other
    assert first[0][0]["status"] in ("converged", "unconverged")
    assert [record is None for record in first].count(True) > 0


def _exact(rank: int, path: Path) -> None:
    model = _wrapped("resharded")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    single = build()
    alone = torch.optim.AdamW(single.parameters(), lr=1e-2)
    settings: Any = {"probe": PROBE, "weights": WEIGHTS, "tolerance": 1e-6, "max_hvps": 100}
    for step in range(3):
        causal(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(single.parameters(), model.parameters(), strict=True):
        one.data.copy_(whole(other.detach()))
        alone.state[one] = {key: whole(value).clone() for key, value in optimizer.state[other].items()}
    found = CurvatureTracker(model, optimizer, causal, split=True, **settings).step(3)
    truth = CurvatureTracker(single, alone, causal, **settings).step(3)
    assert found is not None
    assert truth is not None
    for name in ("eigenvalue", "rho", "gradient_norm", "update_rms"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-5)


def test_sharded_weights_have_the_eigenvalue_of_the_whole_ones(tmp_path: Path) -> None:
    launch(_exact, tmp_path)


def _refused(rank: int, path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def said(model: nn.Module, **settings: Any) -> str:
        records, _ = trained(model, tracked=True, **settings)
        assert {record.status for record in records} == {"failed"}
        return records[-1].message or ""

    assert "split=True" in said(_wrapped("resharded"))
    assert "FSDP1" in said(
        FullyShardedDataParallel(build(), use_orig_params=True, device_id=torch.device("cpu")), split=True
    )
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = build()
    for layer in model.model.layers:
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        parallelize_module(layer.mlp, mesh, plan)
    assert "tensor parallelism" in said(model, split=True)

    sharded: Any = _wrapped("resharded")
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-2)
    causal(sharded, batch(0)).backward()
    optimizer.step()
    tracker = CurvatureTracker(sharded, optimizer, causal, probe=PROBE, weights=WEIGHTS, split=True)
    sharded.unshard()
    record = tracker.step(0)
    assert record is not None
    assert "parameters are gathered" in (record.message or "")
    sharded.reshard()
    with patch.object(together, "VECTORS", 10**12):
        record = tracker.step(1)
    assert record is not None
    assert "each rank gathers the whole model" in (record.message or "")
    record = tracker.step(2)
    assert record is not None
    assert record.status in ("converged", "unconverged")


def test_what_is_refused_says_why_and_the_job_goes_on(tmp_path: Path) -> None:
    launch(_refused, tmp_path)


def _failing(rank: int, path: Path) -> None:
    calls = [0]

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        calls[0] += 1
        if rank == 1 and calls[0] == 15:
            raise ValueError("a bug of this rank")
        return causal(model, ids)

    _, without = trained(_wrapped("resharded"), tracked=False)
    records, within = trained(_wrapped("resharded"), tracked=True, loss=loss, split=True)
    assert all(torch.equal(one, other) for one, other in zip(without, within, strict=True))
    failed = [record for record in records if record.status == "failed"]
    assert len(failed) == 1
    assert "a bug of this rank" in (failed[0].message or "")
    assert rank == 1 or "rank 1 of 2" in (failed[0].message or "")
    assert records[-1].status == "converged"


def test_a_failure_on_one_rank_is_a_record_on_all_and_the_next_step_is_measured(tmp_path: Path) -> None:
    launch(_failing, tmp_path)


def _apart(rank: int, path: Path) -> None:
    model = _wrapped("ddp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tracker = CurvatureTracker(model, optimizer, causal, probe=PROBE, weights=WEIGHTS, split=True)
    for step in range(3):
        causal(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        record = tracker.step(step + (rank if step == 1 else 0))
        assert record is not None
        assert (record.status == "failed") == (step == 1), record.message
        assert step != 1 or "different steps" in (record.message or "")


def _probes(rank: int, path: Path) -> None:
    model = _wrapped("ddp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    causal(model, batch(0)).backward()
    optimizer.step()
    other = CurvatureTracker(model, optimizer, causal, probe=[batch(50 + rank)], split=True).step(0)
    none = CurvatureTracker(model, optimizer, causal, split=True).step(0, batch=batch(rank))
    assert other is not None
    assert none is not None
    assert "rank 1 of 2 has other batches" in (other.message or "")
    assert "needs a probe" in (none.message or "")


def test_a_probe_of_each_ranks_own_is_refused(tmp_path: Path) -> None:
    launch(_probes, tmp_path)


def test_ranks_at_different_steps_fail_and_do_not_hang(tmp_path: Path) -> None:
    launch(_apart, tmp_path)
