"""Which heads are plain enough for the loss in chunks, and that it is the models' own loss and curvature then."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import CASES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from curvcli.curvature.cross_entropy import linear_cross_entropy
from curvcli.curvature.hvp import MODES, Mode, build, random_direction
from curvcli.curvature.problem import Problem
from curvcli.data import tasks

CHUNKED = "curvcli.models.head.linear_cross_entropy"
PLAIN = ("gemma2", "mamba")  # logits capped, and cast from float64


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The loss in chunks of two tokens, however few logits there are; the number of tokens at each call."""
    calls: list[int] = []

    def small(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        calls.append(len(labels))
        return linear_cross_entropy(hidden, weight, bias, labels, chunk=2 * weight.shape[0])

    monkeypatch.setattr(CHUNKED, small)
    monkeypatch.setattr(tasks, "LOGITS", 0)
    return calls


def _product(model: nn.Module, loss: Any, batch: Any, mode: Mode = "fresh") -> tuple[float, list[Tensor]]:
    problem = Problem.create(model, loss, [batch])
    value = problem.mean_loss()
    image = build(problem, mode).product(list(problem.parameters), random_direction(problem))
    return value, [t.detach() for t in image]


def _plainly(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[float, list[Tensor]]:
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "LOGITS", sys.maxsize)
        return _product(*arguments)


def _apart(found: tuple[float, list[Tensor]], wanted: tuple[float, list[Tensor]]) -> float:
    off = sum(float((a - b).double().square().sum()) for a, b in zip(found[1], wanted[1], strict=True))
    size = sum(float(b.double().square().sum()) for b in wanted[1])
    return max(abs(found[0] - wanted[0]), (off / size) ** 0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "gemma2", "mamba", "bert", "t5", "falcon"])
def test_architectures(name: str, mode: Mode, chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    model, batch = case.build().double(), case.batch()
    found = _product(model, tasks.LOSSES[case.task], batch, mode)
    assert bool(chunks) == (name not in PLAIN)
    assert _apart(found, _plainly(monkeypatch, model, tasks.LOSSES[case.task], batch, mode)) < 1e-10


def test_ignored_labels_masks_and_padding_on_the_left(chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["llama"]()
    model, window = case.build().double(), case.batch()
    labels, mask = window.clone(), torch.ones_like(window)
    labels[:, :3] = -100
    labels[1] = -100
    mask[0, :3] = 0
    columns = {"input_ids": window, "attention_mask": mask, "labels": labels}
    found = _product(model, tasks.causal_loss, columns)
    assert chunks[-1] == 2 * 5  # of the positions that count alone
    assert _apart(found, _plainly(monkeypatch, model, tasks.causal_loss, columns)) < 1e-10
    with torch.no_grad():
        assert torch.isnan(tasks.causal_loss(model, {**columns, "labels": torch.full_like(labels, -100)}))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_adapters(targets: list[str], chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen head is taken; one with an adapter of its own is a sum, and no plain head."""
    case = CASES["llama"]()
    model = get_peft_model(case.build(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).double()
    found = _product(model, tasks.causal_loss, case.batch())
    assert bool(chunks) == (targets == ["q_proj"])
    assert _apart(found, _plainly(monkeypatch, model, tasks.causal_loss, case.batch())) < 1e-10


class Net(nn.Module):
    """A language model that does something to its logits, or to its head's input."""

    def __init__(self, after: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        super().__init__()
        torch.manual_seed(0)
        # As wide as the vocabulary, so that shapes give nothing away.
        self.embed, self.body, self.head = nn.Embedding(19, 19), nn.Linear(19, 19), nn.Linear(19, 19)
        self.after = after

    def forward(self, ids: Tensor) -> Tensor:
        return self.after(self.head(torch.tanh(self.body(self.embed(ids)))))


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda t: t,
    "scaled": lambda t: t * 0.5,
    "capped": lambda t: 3 * torch.tanh(t / 3),
    "in place": lambda t: t.mul_(0.5),
    "masked in place": lambda t: t.index_fill_(-1, torch.tensor([3]), -1e4),
    "a view": lambda t: t.view(-1, t.shape[1], 19),
    "a copy": lambda t: t.clone(),
}


@pytest.mark.parametrize("after", AFTER)
def test_what_is_done_to_logits_is_noticed(after: str, chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Net(AFTER[after]).double().eval(), CASES["llama"]().batch()
    found = _product(model, tasks.causal_loss, batch)
    taken = [count for count in chunks if count == batch[:, 1:].numel()]
    assert bool(taken) == (after == "nothing")
    assert _apart(found, _plainly(monkeypatch, model, tasks.causal_loss, batch)) < 1e-10


def test_what_is_done_to_the_head_later_is_noticed(chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Net().double().eval(), CASES["llama"]().batch()
    _product(model, tasks.causal_loss, batch)
    assert chunks
    chunks.clear()
    hook = model.head.register_forward_hook(lambda module, inputs, output: output * 2)
    assert _apart(
        _product(model, tasks.causal_loss, batch), _plainly(monkeypatch, model, tasks.causal_loss, batch)
    ) < 1e-10  # fmt: skip
    hook.remove()
    hook = model.head.register_forward_hook(lambda module, inputs, output: None)
    tasks.causal_loss(model, batch)
    assert not chunks  # who only listens is to hear logits
    hook.remove()
    model.after = AFTER["in place"]
    found = _product(model, tasks.causal_loss, batch)
    assert _apart(found, _plainly(monkeypatch, model, tasks.causal_loss, batch)) < 1e-10
    model.after = AFTER["nothing"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tasks.causal_loss(model.float(), batch).item() == pytest.approx(
            _plainly(monkeypatch, model, tasks.causal_loss, batch)[0], abs=1e-6
        )
    assert not chunks


def test_a_model_that_is_never_the_same_twice_is_left_alone(chunks: list[int]) -> None:
    model, batch = Net().eval(), CASES["llama"]().batch()
    model.body.register_forward_hook(lambda module, inputs, output: output + torch.rand_like(output))
    tasks.causal_loss(model, batch)
    assert batch[:, 1:].numel() not in chunks


def test_forward_mode_alone_neither_looks_for_a_head_nor_says_that_there_is_none(chunks: list[int]) -> None:
    model, batch = Net().double().eval(), CASES["llama"]().batch()
    problem = Problem.create(model, tasks.causal_loss, [batch])
    names, along = list(problem.parameters), random_direction(problem)
    first = build(problem, "forward").product(names, along)
    assert not chunks
    fresh = build(problem, "fresh").product(names, along)
    again = build(problem, "forward").product(names, along)
    assert chunks[-1] == batch[:, 1:].numel()
    assert all(torch.allclose(a, b) and torch.allclose(a, c) for a, b, c in zip(first, fresh, again, strict=True))


def test_a_small_model_keeps_every_bit_and_a_large_one_does_not_go_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(CHUNKED, lambda hidden, *others: calls.append(len(hidden)) or hidden.sum())
    model, batch = Net().eval(), CASES["llama"]().batch()
    tasks.causal_loss(model, batch)
    assert not calls
    monkeypatch.setattr(tasks, "LOGITS", batch[:, 1:].numel() * 19)
    tasks.causal_loss(model, batch)
    assert not calls
    monkeypatch.setattr(tasks, "LOGITS", batch[:, 1:].numel() * 19 - 1)
    tasks.causal_loss(model, batch)
    assert calls == [7, 7]  # the few tokens of the comparison, which came out apart: so the plain loss was taken


def test_the_model_is_as_it_was(chunks: list[int]) -> None:
    model = Net().eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    tasks.causal_loss(model, CASES["llama"]().batch())
    assert chunks
    assert all(vars(module) == before[name] for name, module in model.named_modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
