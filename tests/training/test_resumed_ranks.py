"""A job under fully_shard that is resumed from its DCP checkpoint on another number of ranks: bit-equal, warm-up and all.

Every rank takes the whole batch, so that a mean over 1, 2 or 4 of them is the same number to the bit; and no norm is
clipped, whose sum would be another's. What is left to differ is what the checkpoint does not carry over.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import launch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from warmup_job import DEPTH, GROW, TOTAL, batch, build, snapshot

from curvcli.checkpoints import open_checkpoint
from curvcli.curvature.precision import whole
from curvcli.models.base import Architecture
from curvcli.training import ArchitectureWarmup, CurvatureTracker

pytestmark = pytest.mark.slow

# A block joined two steps before and has few moments, another is locked; and that one is about to join, and has no moments.
SAVED = (6, 8)


class Sharded:
    """A job as it stands in docs/how-to/training.md."""

    def __init__(self) -> None:
        from torch.distributed.fsdp import fully_shard

        self.model = build()
        for block in (*self.model.model.layers, self.model):
            fully_shard(block)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.warmup = ArchitectureWarmup(self.model, self.optimizer, GROW)
        self.tracker = CurvatureTracker(
            self.model, self.optimizer, lambda model, ids: model(input_ids=ids, labels=ids).loss,
            probe=[batch(99), batch(98)], every=3, split=True, warmup=self.warmup,
        )  # fmt: skip
        self.records: list[Any] = []

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.warmup.step(step)
            ids = batch(step)
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if (record := self.tracker.step(step)) is not None:
                self.records.append(record)

    def save(self, folder: Path) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=folder)
        if dist.get_rank() == 0:
            torch.save({"warmup": self.warmup.state_dict(), "tracker": self.tracker.state_dict()}, folder / "curv.pt")
        dist.barrier()

    def load(self, folder: Path, step: int) -> None:
        self.warmup.resume_at(step)
        weights, state = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": weights, "optim": state}, checkpoint_id=folder)
        set_model_state_dict(self.model, weights)
        # Locked blocks have no state in the checkpoint, which is an error by default.
        set_optimizer_state_dict(self.model, self.optimizer, state, options=StateDictOptions(strict=False))
        kept = torch.load(folder / "curv.pt", weights_only=True)
        self.warmup.load_state_dict(kept["warmup"])
        self.tracker.load_state_dict(kept["tracker"])

    def everything(self) -> dict[str, Any]:
        now = {name: whole(value) for name, value in snapshot(self.model, self.optimizer).items()}
        return {"state": now, "records": [record.model_dump(exclude={"seconds", "overhead"}) for record in self.records]}


def _straight(rank: int, path: Path) -> None:
    job, first = Sharded(), 0
    for step in (*SAVED, TOTAL):
        job.run(first, step)
        job.save(path / f"step-{step}")
        first = step
    torch.save(job.everything(), path / f"straight-{rank}.pt")


def _resumed(rank: int, path: Path) -> None:
    for step in SAVED:
        job = Sharded()
        job.load(path / f"step-{step}", step)
        job.run(step, TOTAL)
        assert job.warmup.active_depth == DEPTH
        torch.save(job.everything(), path / f"resumed-{step}-{dist.get_world_size()}-{rank}.pt")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job")
    launch(_straight, path)
    return path


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bit_equal(world: int, job: Path) -> None:
    launch(_resumed, job, world=world)
    expected = torch.load(job / "straight-0.pt", weights_only=True)
    for step, rank in product(SAVED, range(world)):
        found = torch.load(job / f"resumed-{step}-{world}-{rank}.pt", weights_only=True)
        assert found["state"].keys() == expected["state"].keys()
        for name, value in expected["state"].items():
            assert torch.equal(found["state"][name], value), (step, name)
        records = [record for record in expected["records"] if record["step"] >= step]
        assert [record["step"] for record in found["records"]] == [record["step"] for record in records]
        for one, other in zip(found["records"], records, strict=True):
            assert one["status"] == other["status"] in ("converged", "unconverged"), one["message"]
            # The probe's share of a rank is another: sums go in another order.
            assert one["rho"] == (other["rho"] if world == 2 else pytest.approx(other["rho"], rel=1e-3))


def test_curv_reads_it(job: Path) -> None:
    checkpoint = open_checkpoint(job / "step-6", Architecture("ours", build))
    assert (checkpoint.step, checkpoint.findings) == (6, ())
    state = checkpoint.optimizer.view(checkpoint.model()).state
    assert {name for name in state if "layers.3" in name} == set()
    assert any("layers.2" in name for name in state)
