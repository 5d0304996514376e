"""What a measurement must not leave behind or set off: buffers, attributes, hooks; and the log after a kill."""

from __future__ import annotations

import logging
import random
from collections import Counter, deque
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from ranks import launch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from typer.testing import CliRunner
from warmup_job import batch, build

from curvcli import analyze
from curvcli.cli import app
from curvcli.curvature.problem import Problem
from curvcli.curvature.untouched import hushed
from curvcli.documents import Record
from curvcli.documents.log import Follower, load_records
from curvcli.training import CurvatureTracker
from curvcli.training.log import jsonl


class Busy(nn.Module):
    """Writes into itself in every way that a forward pass may."""

    steps: Tensor
    rebound: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("rebound", torch.zeros(()))
        self.sum = torch.zeros(())
        self.calls = 0
        self.counts: Counter[str] = Counter()
        self.history: list[float] = []
        self.recent: deque[float] = deque(maxlen=2)
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.steps += 1
            self.rebound = self.rebound + 1
            self.sum.data += 1
        self.calls += 1
        self.counts["forward"] += 1
        self.history.append(float(x.mean()))
        self.recent.append(self.calls)
        self.seen.add(self.calls)
        if not hasattr(self, "cache"):
            self.cache = torch.ones(3)
        return x

    def state(self) -> dict[str, Any]:
        tensors = {n: getattr(self, n).clone().tolist() for n in ("running", "steps", "rebound", "sum")}
        members = {"counts": dict(self.counts), "history": list(self.history), "recent": list(self.recent)}
        return tensors | members | {"calls": self.calls, "seen": set(self.seen), "cache": hasattr(self, "cache")}


class Norm(nn.BatchNorm1d):
    """Running statistics in evaluation too, as detectors that are fine-tuned have them."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1)


def network() -> models.Net:
    net = models.Net()
    block = net.layers[1]
    assert isinstance(block, models.Block)
    block.norm = nn.Sequential(block.norm, Norm(5).double(), Busy())
    return net


def trained() -> tuple[models.Net, torch.optim.Optimizer, list[Any]]:
    net, batches = network(), models.data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    models.train(net, optimizer, batches, steps=2)
    return net, optimizer, batches


def tracker_of(net: nn.Module, optimizer: Any, batches: list[Any], **options: Any) -> CurvatureTracker:
    return CurvatureTracker(net, optimizer, models.loss, probe=batches, weights=models.weights(batches), **options)


def measured(record: Record | None) -> Record:
    assert record is not None
    assert record.status in ("converged", "unconverged"), record.message
    return record


def state(net: models.Net) -> tuple[dict[str, Tensor], dict[str, Any]]:
    busy = net.layers[1].norm[2]
    assert isinstance(busy, Busy)
    return {n: b.clone() for n, b in net.named_buffers()}, busy.state()


def unchanged(net: models.Net, before: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    buffers, attributes = state(net)
    assert buffers.keys() == before[0].keys()
    for name, value in buffers.items():
        assert torch.equal(value, before[0][name]), name
    assert attributes == before[1]


def test_buffers_and_attributes_are_restored() -> None:
    net, optimizer, batches = trained()
    before, objects = state(net), dict(net.named_buffers())
    assert before[1]["calls"] > 0
    measured(tracker_of(net, optimizer, batches).step(0))
    unchanged(net, before)
    assert all(objects[n] is b for n, b in net.named_buffers())
    assert net.training
    assert all(m.training for m in net.modules())

    def raises(model: nn.Module, rows: Any) -> Tensor:
        models.loss(model, rows)
        raise RuntimeError("after a forward pass")

    record = CurvatureTracker(net, optimizer, raises, probe=batches[:1]).step(1)
    assert record is not None
    assert record.status == "failed"
    unchanged(net, before)


def test_what_a_first_forward_pass_makes_is_made_in_training() -> None:
    net, optimizer, batches = trained()
    norm = net.layers[1].norm
    assert isinstance(norm, nn.Sequential)
    norm[2] = Busy()
    measured(tracker_of(net, optimizer, batches).step(0))
    assert not hasattr(norm[2], "cache")


def test_analyze_restores_them_too() -> None:
    net, optimizer, batches = trained()
    before = state(net)
    analyze(net, models.loss, batches, optimizer, weights=models.weights(batches), depths=False, max_hvps=5)
    unchanged(net, before)


def test_the_training_goes_on_to_the_bit() -> None:
    runs = []
    for watched in (False, True):
        net, optimizer, batches = trained()
        tracker = tracker_of(net, optimizer, batches)
        for step in range(3):
            models.train(net, optimizer, batches, steps=1)
            if watched:
                measured(tracker.step(step))
        runs.append(net)
    for (name, one), (_, other) in zip(*(net.state_dict().items() for net in runs), strict=True):
        assert torch.equal(one, other), name
    assert state(runs[0])[1] == state(runs[1])[1]


def test_modules_are_not_told_of_evaluation() -> None:
    """Some take eval() for the moment to merge an adapter into their weights, and train() for taking it out."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            if not mode:
                self.weight.data.add_(1)
            return super().train(mode)

    net, batches = models.Net(), models.data()
    net.head = Merging(5, 7).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    models.train(net, optimizer, batches, steps=2)
    before = net.head.weight.detach().clone()
    measured(tracker_of(net, optimizer, batches).step(0))
    assert torch.equal(net.head.weight, before)


# --- hooks ------------------------------------------------------------------------------------


def hook_everything(net: models.Net, fired: Counter[str]) -> list[Any]:
    def note(kind: str) -> Any:
        return lambda *_: fired.update([kind])

    block, weight = net.layers[0], net.layers[0].up.weight
    return [
        block.register_forward_hook(note("forward")),
        block.register_forward_hook(lambda m, a, k, out: fired.update(["forward with names"]), with_kwargs=True),
        block.register_forward_hook(note("always"), always_call=True),
        block.register_forward_pre_hook(note("forward pre")),
        block.register_full_backward_hook(note("backward")),
        block.register_full_backward_pre_hook(note("backward pre")),
        weight.register_hook(note("tensor")),
        weight.register_post_accumulate_grad_hook(note("accumulated")),
        everywhere.register_module_forward_hook(note("every forward")),
        everywhere.register_module_forward_pre_hook(note("every forward pre")),
        everywhere.register_module_full_backward_hook(note("every backward")),
    ]


def test_hooks_do_not_fire_in_measurements(caplog: pytest.LogCaptureFixture) -> None:
    net, optimizer, batches = trained()
    plain = measured(tracker_of(net, optimizer, batches).step(0))
    fired: Counter[str] = Counter()
    handles = hook_everything(net, fired)
    try:
        tracker = tracker_of(net, optimizer, batches)
        with caplog.at_level(logging.WARNING, logger="curvcli"):
            records = [measured(tracker.step(step)) for step in range(2)]
        assert fired == Counter()
        assert records[0].eigenvalue == plain.eigenvalue
        said = [r.getMessage() for r in caplog.records]
        assert said == ["forward hooks do not fire in measurements, nor do they count in them: all modules, layers.0"]
        models.train(net, optimizer, batches, steps=1)
        assert len(fired) == len(handles), "they fire in training as before"
    finally:
        for handle in handles:
            handle.remove()
    fired.clear()
    models.train(net, optimizer, batches, steps=1)
    assert not fired, "and can be removed"


def test_hooks_fire_in_the_order_that_they_had() -> None:
    class Head(nn.Linear):
        def note(self, *_: Any) -> None:
            order.append("own")

    order: list[str] = []
    net = models.Net()
    net.head = Head(5, 7).double()
    net.head.register_forward_hook(lambda *_: order.append("first"))
    net.head.register_forward_hook(net.head.note)
    net.head.register_forward_hook(lambda *_: order.append("last"))
    with hushed(net) as still:
        net(torch.tensor([1]))
    assert still == ["head"]
    assert order == ["own"]
    order.clear()
    net(torch.tensor([1]))
    assert order == ["first", "own", "last"]


def test_hooks_that_make_the_weights_are_part_of_the_model() -> None:
    """Pruning's mask is applied by a hook; without it the network would be another one."""
    from torch.nn.utils import prune

    net, batches = models.Net(), models.data()
    prune.random_unstructured(net.layers[0].up, "weight", amount=0.5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    models.train(net, optimizer, batches, steps=3)
    tracker = tracker_of(net, optimizer, batches, tolerance=1e-4, max_hvps=60)
    found = measured(tracker.step(0))
    mask = net.layers[0].up.weight_mask.clone()
    assert 0 < float(mask.mean()) < 1
    problem = Problem.create(net, models.loss, batches, models.weights(batches))
    net(batches[0][0])
    hessian = models.dense_hessian(net, batches, list(problem.parameters))
    roots = []
    for parameter in problem.parameters.values():
        entry = optimizer.state[parameter]
        root = ((1 - 0.9**3) * ((entry["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8)).rsqrt()
        roots.append(torch.where(entry["exp_avg_sq"] > 0, root, torch.zeros_like(root)).reshape(-1))
    scale = torch.cat(roots)
    assert found.eigenvalue == pytest.approx(models.top(scale[:, None] * hessian * scale[None, :]), rel=1e-3)


def test_a_hook_of_the_module_itself_is_part_of_it() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 7)
            self.fired = 0
            self.register_forward_hook(self.double_it)

        def double_it(self, module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
            return 2 * out

    def lam(head: nn.Module) -> float | None:
        net, batches = models.Net(), models.data()
        net.head = head.double()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        models.train(net, optimizer, batches, steps=1)
        return measured(tracker_of(net, optimizer, batches).step(0)).eigenvalue

    class Spelt(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(3)
    one = Own()
    other = Spelt(5, 7)
    other.load_state_dict(one.state_dict())
    assert lam(one) == lam(other)


# --- the log ----------------------------------------------------------------------------------


def record(step: int) -> Record:
    return Record(
        step=step, loss=1.0, lr=0.1, eigenvalue=2.0, rho=0.5, residual=0.1, update_ratio=None, active_depth=None, hvps=1,
        seconds=1.0, status="converged",
    )  # fmt: skip


@pytest.mark.parametrize("cut", [1, 40, -2, -1], ids=["a character", "half", "nearly all", "all but the newline"])
def test_the_record_after_a_torn_line_is_kept(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "curvature.jsonl"
    write = jsonl(path)
    write(record(1))
    with path.open("a") as stream:
        stream.write(record(2).to_line()[:cut])  # the job is killed here
    follower = Follower(path)
    whole = cut == -1
    assert [r.step for r in follower.poll().records] == ([1, 2] if whole else [1])
    write(record(3))
    write(record(4))
    steps = [1, 2, 3, 4] if whole else [1, 3, 4]
    for log in (follower.poll(), load_records(path)):
        assert [r.step for r in log.records] == steps
        assert (log.damaged, log.half, log.replaced) == (0 if whole else 1, False, 0)
    assert "\n\n" not in path.read_text()
    frame = CliRunner().invoke(app, ["watch", str(path), "--once"])
    assert frame.exit_code == 0
    assert f"{len(steps)} records" in frame.output


def test_what_could_be_written_in_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes half of a line; the next record, with room again, is whole."""
    import os

    real = os.write
    write = jsonl(tmp_path / "c.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: real(handle, data[: len(data) // 2]))
        with pytest.raises(OSError, match="only a part of the line"):
            write(record(1))
    write(record(2))
    assert [r.step for r in load_records(tmp_path / "c.jsonl").records] == [2]


# --- sharded models ---------------------------------------------------------------------------


def _sharded(rank: int, path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def causal(model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    for whole in (True, False):
        model = build()
        for layer in model.model.layers:
            fully_shard(layer, reshard_after_forward=False)
        if whole:
            fully_shard(model, reshard_after_forward=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        tracker = CurvatureTracker(model, optimizer, causal, probe=[batch(9)], log=path / f"{rank}.jsonl")
        causal(model, batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            causal(model, batch(0))  # an evaluation, after which the parameters are gathered
        assert not any(hasattr(p, "to_local") for p in model.parameters())
        tracker.step(0 if whole else 1)
    old = FullyShardedDataParallel(models.Net().float(), device_id=torch.device("cpu"), use_orig_params=True)
    CurvatureTracker(
        old, torch.optim.SGD(old.parameters(), lr=1e-2), models.loss, probe=models.data()[:1], log=path / f"{rank}.jsonl"
    ).step(2)


@pytest.mark.slow
def test_a_gathered_model_is_known_for_sharded(tmp_path: Path) -> None:
    """Differentiating it twice may end the process, or give the curvature of what is not sharded and call it all."""
    launch(_sharded, tmp_path)
    for rank in range(2):
        records = load_records(tmp_path / f"{rank}.jsonl").records
        assert [r.step for r in records] == [0, 1, 2]
        assert {found.status for found in records} == {"failed"}
        assert all("split=True" in (found.message or "") for found in records[:2])
        assert "FSDP1" in (records[2].message or "")


def test_random_numbers_stay() -> None:
    net, optimizer, batches = trained()
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(2), random.random()  # noqa: S311
    torch.manual_seed(1)
    random.seed(1)
    measured(tracker_of(net, optimizer, batches).step(0))
    assert torch.equal(torch.rand(2), expected[0])
    assert random.random() == expected[1]  # noqa: S311
