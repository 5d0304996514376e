"""Moments that were not saved, estimated from gradients: as they are typed out here, and in slices as in one process."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import models
import torch
from threads import on_ranks

from curvcli.curvature.gathering import Weights
from curvcli.curvature.problem import Problem
from curvcli.curvature.ranks import Processes
from curvcli.curvature.shards import Shards
from curvcli.optimizers.estimated import estimate
from curvcli.optimizers.preconditioner import prepare

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def test_the_moments_are_the_mean_gradient_and_the_mean_of_its_squares() -> None:
    net, batches = models.Net(), models.data()
    problem = Problem.create(net, models.loss, batches, models.weights(batches))
    found = estimate(problem, OPTIONS).state["head.weight"]
    each = [torch.autograd.grad(models.loss(net, batch), [net.get_parameter("head.weight")])[0] for batch in batches]
    shares = [len(ids) / sum(models.weights(batches)) for ids, _ in batches]
    torch.testing.assert_close(found["exp_avg"], sum(w * g for w, g in zip(shares, each, strict=True)))
    torch.testing.assert_close(found["exp_avg_sq"], sum(w * g * g for w, g in zip(shares, each, strict=True)))


def test_in_slices_they_are_those_of_one_process_and_no_rank_keeps_more_than_its_share() -> None:
    net, batches = models.Net(), models.data()
    whole = estimate(Problem.create(net, models.loss, batches, models.weights(batches)), OPTIONS)
    sizes = {n: p.numel() for n, p in net.named_parameters()}

    def work(ranks: Processes) -> Any:
        model = deepcopy(net)
        problem = Problem.create(model, models.loss, batches, models.weights(batches)).shared(ranks)
        shards = Shards(ranks, {n: p.shape for n, p in model.named_parameters()})
        view = estimate(replace(problem, gathered=Weights(model, ranks).whole), OPTIONS, shards)
        held = sum(part.numel() for entry in view.state.values() for part in (entry._entry["exp_avg"],))  # type: ignore[attr-defined]
        made = prepare(view, problem.parameters, kind="estimated", shards=shards)
        entries = {n: shards.gather([n], [made.root[n].entries])[0] for n in sizes}  # type: ignore[attr-defined]
        return {n: dict(entry) for n, entry in view.state.items()}, held, entries, made.direction

    expected = prepare(whole, dict(net.named_parameters()), kind="estimated")
    for state, held, entries, direction in on_ranks(work, 3):
        assert held <= sum(-(-size // 3) for size in sizes.values())
        assert direction is None
        for name, entry in whole.state.items():
            torch.testing.assert_close(state[name], dict(entry), rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(entries[name], expected.root[name].entries, rtol=1e-9, atol=0)  # type: ignore[attr-defined]
