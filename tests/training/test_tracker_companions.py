"""What the tracker logs beside rho: against formulas, dense Hessians and networks' own attention."""

from __future__ import annotations

import math
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from warmup_job import batch, build

from curvcli.models.attention import attention
from curvcli.training import CurvatureTracker
from curvcli.training.outliers import LEAST, WINDOW, LossWatch, OwnRange


def _tracked(**more: Any) -> tuple[models.Net, torch.optim.AdamW, list[Any], CurvatureTracker]:
    net, batches = models.Net(seed=3), models.data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    models.train(net, optimizer, batches, steps=3)
    tracker = CurvatureTracker(net, optimizer, models.loss, probe=batches, weights=models.weights(batches), **more)
    return net, optimizer, batches, tracker


def test_gradient_and_update() -> None:
    net, optimizer, batches, tracker = _tracked(gradient_quotient=True)
    record = tracker.step(0)
    assert record is not None
    ids, targets = (torch.cat(both) for both in zip(*batches, strict=True))
    parts = torch.autograd.grad(models.loss(net, (ids, targets)), list(net.parameters()))
    g = torch.cat([part.flatten() for part in parts])
    matrix = models.dense_hessian(net, batches, [n for n, _ in net.named_parameters()])
    assert record.gradient_norm == pytest.approx(float(g.norm()), rel=1e-9)
    assert record.gradient_quotient == pytest.approx(float(g @ matrix @ g / (g @ g)), rel=1e-5)
    states = [optimizer.state[p] for p in net.parameters()]
    m = torch.cat([s["exp_avg"].flatten() for s in states]) / (1 - 0.9**3)
    v = torch.cat([s["exp_avg_sq"].flatten() for s in states]) / (1 - 0.999**3)
    assert record.update_rms == pytest.approx(float((m / (v.sqrt() + 1e-8)).square().mean().sqrt()), rel=1e-6)
    assert (record.gradient_sigmas, record.gradient_outlier, record.attention_logit) == (None, None, None)


def test_what_is_not_asked_for_costs_nothing() -> None:
    plain, more = (_tracked(gradient_quotient=asked)[3].step(0) for asked in (False, True))
    assert plain is not None
    assert more is not None
    assert (more.hvps - plain.hvps, plain.gradient_quotient) == (1, None)
    least = _tracked(update_ratio=False)[3].step(0)
    assert least is not None
    assert least.hvps == plain.hvps - 1
    assert least.gradient_norm is None
    assert least.update_rms == plain.update_rms


def test_six_sigmas() -> None:
    """Against the mean and deviation by torch; neither the outlier nor what follows is judged by itself."""
    watch = OwnRange()
    norms = [1.0 + 0.1 * math.sin(3 * i) for i in range(LEAST)]
    assert [watch.sigmas(norm) for norm in norms] == [None] * LEAST
    logs = torch.tensor(norms, dtype=torch.float64).log()
    wanted = (math.log(2.0) - float(logs.mean())) / float(logs.std(correction=0))
    assert watch.sigmas(2.0) == pytest.approx(wanted)
    assert wanted > 6
    assert [watch.sigmas(odd) for odd in (0.0, math.inf, math.nan)] == [None] * 3
    assert len(watch.values) == LEAST + 1
    still = OwnRange([1.0] * 50)
    assert abs(still.sigmas(1.0 + 1e-9) or 1) < 1e-6, "rounding is no outlier"
    assert len(OwnRange([1.0] * 500).values) == WINDOW


def test_the_loss_of_steps_that_are_not_measured_counts() -> None:
    net, batches = models.Net(), models.data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    models.train(net, optimizer, batches, steps=2)
    tracker = CurvatureTracker(net, optimizer, models.loss, probe=batches[:1], every=20)
    records = []
    for step in range(61):
        loss = {30: 9.0, 50: math.nan}.get(step, 1.0 + 0.1 * math.sin(3 * step))
        records.append(tracker.step(step, loss=None if step > 55 else loss))
    first, second, third, last = (record for record in records if record is not None)
    assert (first.loss_sigmas, first.loss_finite) == (None, True)
    assert second.loss_sigmas is not None
    assert abs(second.loss_sigmas) < 3
    assert third.loss_sigmas is not None
    assert third.loss_sigmas > 6
    assert (third.loss_finite, last.loss_finite) == (True, False)
    watch = LossWatch(tracker.state_dict()["losses"])
    watch.see(9.5)
    assert watch.told()["loss_sigmas"] > 2
    assert watch.told() == {"loss_sigmas": None, "loss_finite": None}


def test_an_outlier_is_flagged_and_a_resumed_job_knows_the_range() -> None:
    net, _, _, tracker = _tracked()
    for step in range(LEAST + 1):
        record = tracker.step(step)
    assert record is not None
    assert record.gradient_outlier is False
    state = tracker.state_dict()
    net2, _, _, resumed = _tracked()
    resumed.load_state_dict({**state, "direction": {}})
    old = {name: value for name, value in state.items() if name != "gradients"}
    for model, one, flagged in ((net, tracker, True), (net2, resumed, True)):
        with torch.no_grad():
            model.head.weight.mul_(30)  # type: ignore[union-attr, operator]
        found = one.step(99)
        assert found is not None
        assert found.gradient_outlier is flagged
        assert found.gradient_sigmas is not None
        assert found.gradient_sigmas > 6
    resumed.load_state_dict(old)  # of an older version
    again = resumed.step(100)
    assert again is not None
    assert again.gradient_outlier is None


def test_attention_where_it_is_asked_for() -> None:
    model = build()
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = batch(0)

    def loss(net: nn.Module, rows: Tensor) -> Tensor:
        value: Tensor = net(input_ids=rows, labels=rows).loss
        return value

    loss(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    record = CurvatureTracker(model, optimizer, loss, probe=[ids], attention=True).step(0)
    assert record is not None
    assert record.message is None
    seen = attention(list(model.model.layers), lambda: model(input_ids=ids))
    assert record.attention_logit == pytest.approx(max(one.logit or 0 for one in seen), rel=1e-5)
    assert record.attention_entropy == pytest.approx(min(one.entropy or 9 for one in seen), rel=1e-5)
    assert record.spectral_norm is None
    weighed = CurvatureTracker(model, optimizer, loss, probe=[ids], spectral_norms=True).step(0)
    assert weighed is not None
    norms = [
        float(torch.linalg.matrix_norm(p.detach(), 2))
        for layer in model.model.layers
        for p in layer.parameters()
        if p.dim() == 2
    ]
    assert weighed.spectral_norm == pytest.approx(max(norms), rel=1e-5)
    bare = _tracked(attention=True)[3].step(0)
    assert bare is not None
    assert (bare.attention_logit, bare.attention_entropy) == (None, None), "it has none"
