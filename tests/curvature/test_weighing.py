"""Batches without weights weigh what they count in the user's loss, and so do the parts that batches are cut into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from curvcli import CurvatureTracker, analyze
from curvcli.curvature.memory import cut
from curvcli.curvature.problem import Problem
from curvcli.curvature.weighing import weighed
from curvcli.errors import OutOfMemoryError, UsageError

Loss = Callable[[nn.Module, Any], Tensor]
MOST = 6


def flat(model: nn.Module, ids: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), **options)


def labelled(model: nn.Module, batch: Any) -> Tensor:
    return flat(model, batch["input_ids"], batch["labels"])


def causal(model: nn.Module, batch: Any) -> Tensor:
    """As transformers models have it: labels are shifted inside, and nothing predicts the first."""
    return flat(model, batch["input_ids"][:, :-1], batch["labels"][:, 1:])


def by_row(model: nn.Module, batch: Any) -> Tensor:
    """Every row weighs the same, however many labels it has."""
    return torch.stack([flat(model, i[None], t[None]) for i, t in zip(*batch.values(), strict=True)]).mean()


def pair(model: nn.Module, batch: Any) -> Tensor:
    return flat(model, *batch)


def first(model: nn.Module, batch: Any) -> Tensor:
    """Of each row one target, some of them -100."""
    return nn.functional.cross_entropy(model(batch[0]).mean(1), batch[1][:, 0])


def rows(*kept: int, seed: int = 0) -> dict[str, Tensor]:
    """A row for each number, which is how many labels it has, from the first position on."""
    ids = torch.randint(7, (len(kept), MOST), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.arange(MOST) < torch.tensor(kept)[:, None], (ids * 3) % 7, -100)
    return {"input_ids": ids, "labels": labels}


BATCHES = [rows(6, 6, 6, 6), rows(1, 2, 1, 3, seed=1)]
# What each batch counts, and what is summed over all for the mean over both.
CASES: dict[str, tuple[Loss, Any, tuple[float, float]]] = {
    "labels": (labelled, BATCHES, (24, 7)),
    "shifted labels": (causal, BATCHES, (20, 3)),
    "rows": (by_row, BATCHES, (1, 1)),
    "a target": (pair, [tuple(batch.values()) for batch in BATCHES], (24, 7)),
    "a target a row": (
        first,
        [(b["input_ids"], torch.tensor([[1], [2], [keep], [keep]])) for b, keep in zip(BATCHES, (3, -100), strict=True)],
        (2, 1),
    ),
}


def dense(model: nn.Module, loss: Loss, batches: Any, weights: tuple[float, float]) -> float:
    """The top eigenvalue of the mean's Hessian, by central differences of float64 gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    at = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(point: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(point, parameters)
        one, other = (loss(model, batch) for batch in batches)
        value = (weights[0] * one + weights[1] * other) / sum(weights)
        return nn.utils.parameters_to_vector(torch.autograd.grad(value, parameters))

    steps = 1e-5 * torch.eye(len(at), dtype=at.dtype)
    matrix = torch.stack([(gradient(at + step) - gradient(at - step)) / 2e-5 for step in steps])
    nn.utils.vector_to_parameters(at.clone(), parameters)
    return models.top(matrix)


@pytest.mark.parametrize("case", CASES)
def test_batches_weigh_what_their_loss_counts(case: str) -> None:
    loss, batches, counts = CASES[case]
    model = models.Net(blocks=1)
    truth = dense(model, loss, batches, counts)
    found = analyze(model, loss, batches, tolerance=1e-6, max_hvps=300, parts=False).full
    assert found.status == "converged"
    assert found.eigenvalue == pytest.approx(truth, rel=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tracker = CurvatureTracker(model, optimizer, loss, probe=batches, tolerance=1e-6, max_hvps=300)
    record = tracker.step(0)
    assert record is not None
    assert record.eigenvalue == pytest.approx(truth, rel=1e-5), record.message
    even = dense(model, loss, batches, (1, 1))
    assert (abs(even / truth - 1) > 0.01) == (case != "rows"), "the batches do not tell"


def test_weights_that_are_given_stand() -> None:
    model = models.Net(blocks=1)
    found = analyze(model, labelled, BATCHES, weights=[1, 3], tolerance=1e-6, max_hvps=300, parts=False).full
    assert found.eigenvalue == pytest.approx(dense(model, labelled, BATCHES, (1, 3)), rel=1e-5)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    x = model(batch["input_ids"]).mean(1)
    return nn.functional.cross_entropy(x @ x.T, torch.arange(len(x)))


def classed(model: nn.Module, batch: Any) -> Tensor:
    """Rows of one class are alike; those of two weigh by them."""
    weight = torch.tensor([1.0, 3, 3, 3, 3, 3, 3], dtype=torch.float64)
    return nn.functional.cross_entropy(model(batch[0]).mean(1), batch[1], weight=weight)


def zero(model: nn.Module, batch: Any) -> Tensor:
    """As of a head that begins at zero: whatever counts, the mean is the same."""
    return 0 * labelled(model, batch) + 1


IDS = torch.arange(4 * MOST).reshape(4, MOST) % 7
CLASSES = [(IDS, torch.tensor(found)) for found in ([0, 0, 0, -100], [0, -100, -100, 2])]
IN_A_ROW = [(IDS, torch.full((4 * MOST,), 2).index_fill(0, torch.arange(missing), -100)) for missing in (1, 2)]


def fixed(model: nn.Module, batch: Any) -> Tensor:
    assert len(batch["labels"]) == 4, "four rows"
    return labelled(model, batch)


@pytest.mark.parametrize(
    ("loss", "batches", "match"),
    [
        (contrastive, BATCHES, "no mean over labels or rows"),
        (fixed, BATCHES, "does not run on some of their rows: four rows"),
        (classed, CLASSES, "no mean over labels or rows"),
        (zero, BATCHES, "does not tell which"),
        (pair, IN_A_ROW, "no first dimension in common"),
        (labelled, [rows(6, 6), rows(0, 0)], "batch 1 has no labels"),
        # T5's: as much is read, less is written.
        (labelled, [rows(6, 6), {**rows(6, 6), "labels": torch.ones(2, 4)}], "differ in size and no weights"),
    ],
)
def test_what_cannot_be_told_is_asked_for(loss: Loss, batches: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        analyze(models.Net(blocks=1), loss, batches)


def test_memory_that_runs_out_is_said_to_be_memory() -> None:
    def large(model: nn.Module, batch: Any) -> Tensor:
        raise MemoryError

    with pytest.raises(OutOfMemoryError, match=r"as rows of batches were tried.*pass weights="):
        analyze(models.Net(blocks=1), large, BATCHES)


def test_batches_that_count_alike_are_not_tried() -> None:
    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError

    images = [(torch.full((2, 3), pixel, dtype=torch.uint8), torch.zeros(2, 0, dtype=torch.int64)) for pixel in (0, 156)]
    shuffled = [(torch.ones(2, 3), torch.tensor(labels)) for labels in ([-100, 1], [1, -100])]
    for batches in (BATCHES[:1] * 2, [(torch.ones(2, 3), torch.zeros(2, 1))] * 2, images, shuffled):
        problem = Problem.create(models.Net(), never, batches)
        assert weighed(problem) is problem


@pytest.mark.parametrize("loss", [labelled, causal, by_row])
@pytest.mark.parametrize("kept", [(1, 6, 4), (6, 3, 5, 6), (4, 5, 4, 6)])
def test_rows_that_differ_are_found_in_any_batch(loss: Loss, kept: tuple[int, ...]) -> None:
    """The rows of the first batch are all alike: they do not tell what those of the second count."""
    batches = [rows(6, 6), rows(*kept, seed=1)]
    problem = Problem.create(models.Net(blocks=1), loss, batches, [2, 3])
    part = cut(problem, 1)
    assert all(len(batch["labels"]) == 1 for batch in part.batches)
    assert part.mean_loss() == pytest.approx(problem.mean_loss(), rel=1e-12)


def test_first_labels_alone_tell_how_they_count() -> None:
    """Where all rows have a first label, or none has, shifted or not comes to the same; here the middle row alone has."""
    batch = rows(6, 6, 6)
    batch["labels"][0, :1], batch["labels"][1, 2:4], batch["labels"][2, :4] = -100, -100, -100  # 5, 4 and 2; shifted 5, 3, 2
    for loss in (labelled, causal):
        problem = Problem.create(models.Net(blocks=1), loss, [batch])
        assert cut(problem, 1).mean_loss() == pytest.approx(problem.mean_loss(), rel=1e-12)


def test_a_row_without_labels_tells_nothing() -> None:
    """Beside it one row alone would count, and any way would do."""
    batches = [rows(5, 0), rows(2, 2, seed=1)]
    batches[0]["labels"][0, 0] = -100  # 4 and 4 labels; shifted 4 and 2
    for loss, share in ((labelled, 1 / 2), (causal, 2 / 3)):
        problem = Problem.create(models.Net(blocks=1), loss, batches)
        assert weighed(problem).weights[0] == pytest.approx(share)


def test_a_batch_whose_classes_weigh_is_not_cut() -> None:
    """Its first and its last row are of one class, and are the mean of their own losses."""
    problem = Problem.create(models.Net(blocks=1), classed, [(IDS, torch.tensor([0, 1, 2, 0]))])
    assert cut(problem, 1) is problem


def test_a_batch_of_which_one_half_counts_is_cut_on() -> None:
    problem = Problem.create(models.Net(blocks=1), labelled, [rows(6, 3, 0, 0)])
    assert [len(batch["labels"]) for batch in cut(problem, 1).batches] == [1, 1]
