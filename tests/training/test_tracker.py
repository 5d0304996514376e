"""The tracker: right against dense eigenvalues, and a callback that the training does not notice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from fused import FusedCrossEntropy
from torch import Tensor, nn
from warmup_job import Job, batch, build, same

from curvcli.documents import Record
from curvcli.training import ArchitectureWarmup, CurvatureTracker
from curvcli.training.log import tensorboard


def causal(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def dense(net: models.Net, optimizer: torch.optim.AdamW, batches: list[Any], names: list[str]) -> float:
    """lambda of the named parameters from a dense Hessian, P typed out from AdamW's documentation."""
    hessian = models.dense_hessian(net, batches, names)
    parameters = dict(net.named_parameters())
    roots = []
    for name in names:
        state = optimizer.state[parameters[name]]
        t = float(state["step"])
        p = (1 - 0.9**t) * ((state["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8)
        roots.append(p.rsqrt().reshape(-1))
    scale = torch.cat(roots)
    return models.top(scale[:, None] * hessian * scale[None, :])


def test_every_step_is_right() -> None:
    """Ten steps of training, lambda of each within 0.1 % of the dense one, most of them in a few products."""
    net, batches = models.Net(seed=3), models.data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    tracker = CurvatureTracker(
        net, optimizer, models.loss, probe=batches, weights=models.weights(batches), tolerance=1e-3, max_hvps=60
    )
    spent = []
    for step in range(10):
        models.train(net, optimizer, batches, steps=1)
        record = tracker.step(step)
        assert record is not None
        truth = dense(net, optimizer, batches, [n for n, _ in net.named_parameters()])
        assert record.status == "converged"
        assert record.eigenvalue == pytest.approx(truth, rel=1e-3)
        assert record.rho == pytest.approx(truth / ((2 / 1e-2 - 1e-2) * 19), rel=1e-3)
        spent.append(record.hvps)
    assert sum(spent[5:]) < sum(spent[:5])  # warm starts pay


def test_an_eigenvector_is_transported_between_preconditioners() -> None:
    """Measured again where nothing has moved, the start is the answer: its residual is known after one product."""
    net, batches = models.Net(seed=3), models.data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    models.train(net, optimizer, batches, steps=3)
    tracker = CurvatureTracker(
        net, optimizer, models.loss, probe=batches, weights=models.weights(batches), tolerance=1e-2, update_ratio=False
    )
    first, second = tracker.step(0), tracker.step(1)
    assert first is not None
    assert second is not None
    assert first.hvps > 3
    assert second.hvps == 1
    assert second.eigenvalue == pytest.approx(first.eigenvalue, rel=1e-6)


def test_only_what_trains_is_measured() -> None:
    net, batches = models.Net(seed=3), models.data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    from schedules import schedule

    warmup = ArchitectureWarmup(net, optimizer, schedule(3, (0, [0]), (9, range(3)), mode="freeze"))
    tracker = CurvatureTracker(
        net,
        optimizer,
        models.loss,
        probe=batches,
        weights=models.weights(batches),
        tolerance=1e-4,
        max_hvps=60,
        warmup=warmup,
    )
    warmup.step(0)
    models.train(net, optimizer, batches, steps=3)
    record = tracker.step(0)
    assert record is not None
    assert record.eigenvalue == pytest.approx(dense(net, optimizer, batches, models.depth_names(net, 1)), rel=1e-3)
    assert record.active_depth == 1


def test_the_training_does_not_notice() -> None:
    """Dropout on, so that one draw from the random numbers too many would show."""
    results = []
    for tracked in (False, True):
        job = Job(model=build(attention_dropout=0.2))
        tracker = (
            CurvatureTracker(job.model, job.optimizer, causal, probe=[batch(99)], warmup=job.warmup) if tracked else None
        )
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        for step in range(6):
            job.run([step])
            # Halfway through an accumulation, too: gradients that are there stay as they are.
            ids = batch(50 + step)
            job.model(input_ids=ids, labels=ids).loss.backward()
            before = [None if p.grad is None else p.grad.clone() for p in job.model.parameters()]
            if tracker:
                record = tracker.step(step)
                assert record is not None
                assert record.status in ("converged", "unconverged"), record.message
                for kept, p in zip(before, job.model.parameters(), strict=True):
                    assert (kept is None and p.grad is None) or torch.equal(kept, p.grad)
            assert job.model.training
        numbers = torch.rand(3), random.random(), np.random.rand()  # noqa: S311
        results.append((job, numbers))
    (alone, expected), (watched, found) = results
    assert same(alone.model, watched.model)
    assert alone.norms == watched.norms
    assert torch.equal(expected[0], found[0])
    assert expected[1:] == found[1:]
    for a, b in zip(alone.model.parameters(), watched.model.parameters(), strict=True):
        mine, other = alone.optimizer.state[a], watched.optimizer.state[b]
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[k], other[k]) for k in mine)


@pytest.mark.slow
def test_a_warm_start_survives_a_restart(tmp_path: Path) -> None:
    job = Job()
    tracker = CurvatureTracker(job.model, job.optimizer, causal, probe=[batch(99)], warmup=job.warmup)
    for step in range(5):
        job.run([step])
        tracker.step(step)
    torch.save(tracker.state_dict(), tmp_path / "tracker.pt")
    other = CurvatureTracker(job.model, job.optimizer, causal, probe=[batch(99)], warmup=job.warmup)
    other.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
    job.run([5])
    one, two = tracker.step(5), other.step(5)
    assert one is not None
    assert two is not None
    assert (one.eigenvalue, one.hvps, one.residual) == (two.eigenvalue, two.hvps, two.residual)


def _fused(model: nn.Module, ids: Tensor) -> Tensor:
    return FusedCrossEntropy.apply(model(input_ids=ids).logits.flatten(0, 1), ids.flatten())


def _raises(model: nn.Module, ids: Tensor) -> Tensor:
    raise RuntimeError("no such\nkernel")


def _infinite(model: nn.Module, ids: Tensor) -> Tensor:
    return causal(model, ids) * float("inf")


FAILURES = {
    "a loss that raises": (_raises, None, "failed", "RuntimeError: no such kernel"),
    "an infinite loss": (_infinite, None, "failed", "not finite"),
    "a fused loss": (_fused, None, "failed", "second derivatives of this loss are wrong"),
    "NaN weights": (causal, lambda job: job.model.lm_head.weight.data.fill_(float("nan")), "non-finite", "NaN"),
    "no state": (causal, lambda job: job.optimizer.state.clear(), "failed", ""),
    "learning rate 0": (causal, lambda job: job.optimizer.param_groups[0].update(lr=0.0), "failed", "learning rate"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_a_status_and_the_job_goes_on(name: str, tmp_path: Path) -> None:
    loss, damage, status, message = FAILURES[name]
    job = Job().run(range(3))
    if damage:
        damage(job)
    tracker = CurvatureTracker(job.model, job.optimizer, loss, probe=[batch(99)], log=tmp_path / "c.jsonl")
    record = tracker.step(3, loss=float("nan"))
    assert record is not None
    assert (record.eigenvalue, record.rho, record.loss) == (None, None, None)
    assert record.status == status
    assert message in (record.message or "")
    assert Record.model_validate_json((tmp_path / "c.jsonl").read_text()) == record


def test_nothing_to_measure_on_is_said() -> None:
    job = Job().run(range(2))
    tracker = CurvatureTracker(job.model, job.optimizer, causal)
    record = tracker.step(0)
    assert record is not None
    assert (record.status, record.message) == (
        "failed",
        "CurvError: there is nothing to measure on; give a probe, or tracker.step(step, batch=batch)",
    )
    current = tracker.step(1, batch=batch(1))
    assert current is not None
    assert current.rho is not None


def test_every_and_the_log(tmp_path: Path) -> None:
    job = Job()
    log = tmp_path / "deep" / "curvature.jsonl"
    scalars: list[tuple[str, float, int]] = []
    writer = type("Writer", (), {"add_scalar": lambda self, *call: scalars.append(call)})()

    def broken(record: Record) -> None:
        raise OSError("disk full")

    tracker = CurvatureTracker(
        job.model,
        job.optimizer,
        causal,
        probe=[batch(99)],
        every=3,
        log=log,
        sinks=[tensorboard(writer), broken],
        warmup=job.warmup,
    )
    for step in range(7):
        job.run([step])
        tracker.step(step, loss=1.5)
    records = [Record.model_validate_json(line) for line in log.read_text().splitlines()]
    assert [r.step for r in records] == [0, 3, 6]
    assert [r.active_depth for r in records] == [2, 2, 3]
    assert all(r.loss == 1.5 and r.hvps > 0 and r.seconds > 0 for r in records)
    assert ("curvature/rho", records[1].rho, 3) in scalars


def test_an_unconverged_estimate_says_so() -> None:
    job = Job().run(range(3))
    tracker = CurvatureTracker(job.model, job.optimizer, causal, probe=[batch(99)], max_hvps=2, tolerance=1e-6)
    record = tracker.step(0)
    assert record is not None
    assert record.status == "unconverged"
    assert record.eigenvalue is not None
    assert (record.residual or 0) > 1e-6 * record.eigenvalue
