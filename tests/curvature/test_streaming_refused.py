"""Weights that are gathered a block at a time, where something is wrong: what a network does to them, and what ranks say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from streamed import divided, problem_of
from threads import on_ranks
from torch import Tensor, nn

from curvcli import analyze
from curvcli.curvature.slicewise import sliced_gradient
from curvcli.errors import OutOfMemoryError, RankError, UnsupportedError
from curvcli.models.blocks import find_blocks, survey
from curvcli.models.head import plain_head


class _Clamped(models.Block):
    """A block that keeps a weight within bounds whenever it is used, past autograd."""

    def forward(self, x: Tensor) -> Tensor:
        self.up.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


def _clamped() -> nn.Module:
    model = models.Net()
    model.layers = nn.ModuleList(_Clamped(5).double() for _ in range(3))
    return model


def _renormed() -> nn.Module:
    model = models.Net()
    model.head.weight = model.embed.weight  # type: ignore[assignment]
    model.embed.max_norm = 0.5  # type: ignore[assignment]  # rows are scaled in place when they are looked up
    return model


@pytest.mark.parametrize("network", [_clamped, _renormed])
def test_a_network_that_writes_to_its_weights_is_refused(network: Callable[[], nn.Module]) -> None:
    """What it writes is gone when the block is gathered again: forward and backward would be of other weights."""

    def work(ranks: Any) -> Any:
        problem, _ = divided(network(), ranks)
        for use in (problem.mean_loss, lambda: sliced_gradient(problem, list(problem.parameters))):
            with pytest.raises(UnsupportedError, match=r"writes to its weight .*weight while it runs"):
                use()
        assert all(bool(p.isnan().all()) for p in problem.model.parameters())
        return True

    assert on_ranks(work, 2) == [True, True]


def test_weights_that_are_not_numbers_are_no_change() -> None:
    def work(ranks: Any) -> Any:
        model = models.Net()
        model.layers[1].up.weight.data[:, 0] = float("nan")  # type: ignore[index, union-attr]
        problem, _ = divided(model, ranks)
        with pytest.raises(UnsupportedError, match="gradient of the loss is not finite"):
            sliced_gradient(problem, list(problem.parameters))
        return True

    assert on_ranks(work, 2) == [True, True]


def test_a_block_that_comes_half_leaves_nothing_behind() -> None:
    """Numbers of one type have come, those of the other have not: memory ran out, and a leaner plan is next."""
    model = models.Net()
    model.layers[1].norm.float()  # type: ignore[operator]
    model.layers[1].norm.register_forward_pre_hook(lambda module, given: given[0].float())  # type: ignore[union-attr]
    model.layers[1].norm.register_forward_hook(lambda module, given, found: found.double())  # type: ignore[union-attr]

    def work(ranks: Any) -> Any:
        problem, weights = divided(model, ranks)
        gathered, said = ranks.gathered, []

        def gather(part: Tensor, at: int = 0) -> Tensor:
            said.append(at)
            if said.count(1) == 2:  # the second type of the second block
                raise OutOfMemoryError("no room")
            return gathered(part, at)

        ranks.gathered = gather
        with problem.gathered():
            with pytest.raises(OutOfMemoryError):
                problem.batch_loss(0)
            assert weights.streamed is not None
            assert not [n for n, p in problem.model.named_parameters() if p.untyped_storage().nbytes() > 8]
            assert not weights.streamed._stored  # where something else may lie soon, which is no weight
        return True

    assert on_ranks(work, 2) == [True, True]


def test_what_another_process_says_is_not_taken_for_the_networks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever went on would wait for one that has gone."""
    problem = problem_of(models.Net())

    def gone(*_: Any) -> Any:
        error = RankError("rank 1 of 2: a bug")
        error.said_by_ranks = True  # type: ignore[attr-defined]
        raise error

    blocks = find_blocks(problem.model)
    assert blocks is not None
    with pytest.raises(RankError, match="a bug"):
        survey(replace(problem, loss=lambda m, b: models.loss(m, b) if len(m.layers) else gone()), blocks)  # type: ignore[arg-type]
    with pytest.raises(RankError, match="a bug"):
        plain_head(problem.model, gone)
    monkeypatch.setattr("curvcli.analysis.companions.attention", gone)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    with pytest.raises(RankError, match="a bug"):
        analyze(problem.model, models.loss, problem.batches, optimizer, weights=problem.weights, depths=False)
