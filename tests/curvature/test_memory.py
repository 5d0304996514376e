"""Out of memory is told from no second derivative, and answered by leaner plans that give the same number."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from curvcli import analyze
from curvcli.curvature.hvp import choose
from curvcli.curvature.memory import cut, leanest, sample
from curvcli.curvature.problem import Problem
from curvcli.errors import InputError, OutOfMemoryError, UnsupportedError, exhausted, memory_named, shortage
from curvcli.models.blocks import find_blocks, survey
from curvcli.models.user_code import blamed


def of_torch() -> None:
    torch.empty(2**60)


def of_python() -> None:
    bytearray(2**62)


def of_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")


def of_a_wrapper() -> None:
    try:
        of_torch()
    except RuntimeError as error:
        raise ValueError("the layer failed") from error


@pytest.mark.parametrize("asks", [of_torch, of_python, of_cuda, of_a_wrapper])
def test_allocators_errors_are_known(asks: Callable[[], None]) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011
        asks()
    assert exhausted(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented"),
        NotImplementedError("no kernel"),
        ValueError("out of memory of the last war"),
        RuntimeError(),
    ],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not exhausted(error)


def test_what_was_asked_for_is_said() -> None:
    with pytest.raises(RuntimeError) as raised:
        of_torch()
    assert shortage(raised.value) == "4611686018427387904 bytes more were asked for"
    with pytest.raises(RuntimeError) as raised:
        of_cuda()
    assert shortage(raised.value) == "2.00 GiB more were asked for"


def test_the_code_that_failed_is_not_blamed_for_memory() -> None:
    with pytest.raises(RuntimeError, match="allocate"), blamed("the loss"):
        of_torch()
    with pytest.raises(OutOfMemoryError, match=r"out of memory here: 2\.00 GiB"), memory_named("here"):
        of_cuda()
    with pytest.raises(InputError, match="damaged"), memory_named("here"):
        raise InputError("damaged")


def most_rows(rows: int) -> Callable[[Any], None]:
    """Memory that does for the second derivatives of so many rows, and of a batch of any size for the loss itself."""

    def check(batch: Any) -> None:
        if torch.is_grad_enabled() and len(batch[0]) > rows:
            of_torch()

    return check


class Short(torch.autograd.Function):
    """The identity, whose backward is out of memory where gradients are differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        of_torch()
        return g


def whole() -> tuple[nn.Module, list[Any]]:
    net, (a, b) = models.Net(), models.data()
    return net, [a, b]  # 16 and 32 rows


@pytest.mark.slow
def test_batches_are_cut_until_they_fit() -> None:
    net, batches = whole()
    fits = most_rows(9)

    def limited(model: nn.Module, batch: Any) -> Tensor:
        fits(batch)
        return models.loss(model, batch)

    truth = analyze(net, models.loss, batches, weights=models.weights(batches), tolerance=1e-4, depths=False)
    found = analyze(net, limited, batches, weights=models.weights(batches), tolerance=1e-4, depths=False)
    assert found.full.status == "converged"
    assert found.full.eigenvalue == pytest.approx(truth.full.eigenvalue, rel=1e-6)
    assert found.data.loss == pytest.approx(truth.data.loss, rel=1e-12)
    assert found.data.tokens == truth.data.tokens
    assert found.cost.mode == "fresh"
    (said,) = (f for f in found.findings if f.code == "cut-batches")
    assert "2 were cut into 8" in said.message
    assert "cut-batches" not in {f.code for f in truth.findings}


def seen(problem: Problem, mode: str, fits: Callable[[Problem], bool]) -> tuple[Problem, str, int]:
    tried = 0

    def measure(part: Problem, how: str) -> tuple[Problem, str, int]:
        nonlocal tried
        tried += 1
        if not fits(part) or how == "kept":
            of_torch()
        return part, how, tried

    return leanest(problem, mode, measure)


def problem_of(loss: Any, *batches: Any) -> Problem:
    return Problem.create(models.Net(), loss, list(batches), [1.0] * len(batches))


def test_fresh_graphs_come_before_smaller_batches() -> None:
    problem = problem_of(models.loss, *models.data())
    calls: list[str] = []

    def measure(part: Problem, how: str) -> Problem:
        calls.append(how)
        if how == "auto":
            of_torch()
        return part

    assert leanest(problem, "auto", measure) is problem
    assert calls == ["auto", "fresh"]


def labelled(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["input_ids"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def causal(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["input_ids"])[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def by_row(model: nn.Module, batch: Any) -> Tensor:
    """Every row weighs the same, however many labels it has."""
    rows = range(len(batch["labels"]))
    return torch.stack([labelled(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in rows]).mean()


def masked() -> dict[str, Tensor]:
    """Rows of 1 to 6 labels; that of the last is its first position, which a causal loss does not count."""
    ids = torch.randint(7, (6, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.stack([torch.where(torch.arange(6) <= 5 - i, row, -100) for i, row in enumerate(ids)])
    return {"input_ids": ids, "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize("loss", [labelled, causal, by_row])
def test_parts_weigh_what_the_loss_counts(loss: Any) -> None:
    problem = problem_of(loss, masked())
    part, how, tried = seen(problem, "auto", lambda part: all(len(b["labels"]) <= 1 for b in part.batches))
    assert how == "fresh"
    assert tried == 5  # as asked, fresh, 3 rows, 2, 1
    assert len(part.batches) == (5 if loss is causal else 6)  # a row without a label has no mean
    assert sum(part.weights) == pytest.approx(1)
    assert part.mean_loss() == pytest.approx(problem.mean_loss(), rel=1e-12)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    x = model(batch[0])
    return nn.functional.cross_entropy(x @ x.T, torch.arange(len(x)))


def test_a_batch_without_a_label_is_not_cut() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    labels = torch.tensor([0, 1])
    batches = [{"x": torch.eye(2), "labels": labels}, {"x": torch.eye(2), "labels": torch.full_like(labels, -100)}]
    found = cut(Problem.create(nn.Linear(2, 2), loss, batches), 1)
    assert [len(batch["labels"]) for batch in found.batches] == [1, 1, 2]
    assert found.weights == [0.25, 0.25, 0.5]


def test_rows_that_depend_on_each_other_are_not_cut() -> None:
    problem = problem_of(contrastive, models.data()[0])
    with pytest.raises(OutOfMemoryError, match="a batch of 16 rows needs about"):
        seen(problem, "auto", lambda part: len(part.batches) > 1)


def test_ways_are_tried_on_a_few_rows() -> None:
    part, times = sample(problem_of(models.loss, *models.data()))  # batches of 16 and 32 rows
    assert (len(part.batches), len(part.batches[0][0]), times) == (1, 4, 8)
    part, times = sample(problem_of(contrastive, *models.data()))
    assert (len(part.batches), len(part.batches[0][0]), times) == (1, 16, 2)


def test_nothing_fits() -> None:
    net, batches = whole()
    with pytest.raises(OutOfMemoryError) as raised:
        analyze(net, lambda m, b: Short.apply(models.loss(m, b)), batches, weights=models.weights(batches))
    said = str(raised.value)
    assert said.startswith("out of memory in a Hessian-vector product: 4611686018427387904 bytes more were asked for; ")
    assert "a batch of 1 row needs about" in said
    assert said.endswith("use --mode fresh, --batch-size 1, a shorter --sequence-length or fewer --tokens")


def test_a_mode_that_runs_out_of_memory_falls_out_as_such() -> None:
    def kept_is_dear(model: nn.Module, batch: Any) -> Tensor:
        if kept_is_dear.calls >= 0 and torch._C._functorch.maybe_current_level() is None:  # type: ignore[attr-defined]
            kept_is_dear.calls += 1  # type: ignore[attr-defined]
            if kept_is_dear.calls == kept_is_dear.fails:  # type: ignore[attr-defined]
                of_torch()
        return models.loss(model, batch)

    kept_is_dear.calls, kept_is_dear.fails = 0, 10**9  # type: ignore[attr-defined]
    problem = Problem.create(models.Net(), kept_is_dear, models.data(), [1, 2])
    free = choose(problem, mode="kept")
    assert free.mode == "kept"
    used = kept_is_dear.calls  # type: ignore[attr-defined]
    kept_is_dear.calls, kept_is_dear.fails = 0, used  # type: ignore[attr-defined]  # the graph that would be kept
    found = choose(problem)
    assert found.mode != "kept"
    assert found.refused["kept"].startswith("out of memory: 4611686018427387904 bytes")
    kept_is_dear.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(OutOfMemoryError, match="mode kept is out of memory"):
        choose(problem, mode="kept")


def test_a_network_that_is_cut_short_and_runs_out_of_memory_is_one_that_runs() -> None:
    net, batches = whole()

    def dear_without_blocks(model: Any, batch: Any) -> Tensor:
        if not len(model.layers):
            of_torch()
        return models.loss(model, batch)

    problem = Problem.create(net, dear_without_blocks, batches, models.weights(batches))
    blocks = find_blocks(net)
    assert blocks is not None
    with pytest.raises(RuntimeError, match="allocate"):
        survey(problem, blocks)


def test_no_second_derivative_is_still_that() -> None:
    class Never(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise NotImplementedError("no kernel for this")

    net, batches = whole()
    with pytest.raises(UnsupportedError, match="no second derivative here: no kernel for this"):
        analyze(net, lambda m, b: Never.apply(models.loss(m, b)), batches, weights=models.weights(batches))


REAL = """
import resource, sys
import torch
from torch import nn
from curvcli import analyze
from curvcli.errors import OutOfMemoryError

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
rows, wide = int(sys.argv[1]), int(sys.argv[2])
batches = [(torch.randn(rows, wide, 4), torch.randn(rows, wide, 4)) for _ in range(2)]
loss = lambda m, b: nn.functional.mse_loss(m(b[0]), b[1])
analyze(model, loss, [(x[:1, :2], y[:1, :2]) for x, y in batches])  # libraries are loaded, pools made
with open("/proc/self/statm") as stream:
    held = int(stream.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 60 * 2**20, held + 60 * 2**20))
try:
    report = analyze(model, loss, batches, depths=False, max_hvps=3)
except OutOfMemoryError as error:
    print("refused", error)
else:
    print("measured", report.full.status, *(f.message for f in report.findings if f.code == "cut-batches"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs what a process holds as Linux says it")
@pytest.mark.parametrize(
    ("rows", "wide", "said"),
    [(8, 50_000, "measured"), pytest.param(1, 600_000, "refused out of memory", marks=pytest.mark.slow)],
)
def test_at_a_real_limit(rows: int, wide: int, said: str) -> None:
    """60 MiB beyond what is held: eight rows of 1.5 MiB a layer fit when they are cut, one of 18 does not."""
    done = subprocess.run([sys.executable, "-c", REAL, str(rows), str(wide)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said), done.stdout
    if rows > 1:
        assert "2 were cut into" in done.stdout
