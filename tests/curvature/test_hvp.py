"""Hessian-vector products by every mode, on real transformer code, against central differences in float64."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from fused import FusedCrossEntropy, OneWayTanh
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from curvcli import analyze
from curvcli.curvature.hvp import MODES, Mode, build, choose
from curvcli.curvature.problem import Problem
from curvcli.data.tasks import causal_loss
from curvcli.errors import UnsupportedError, UsageError
from curvcli.models.blocks import find_blocks

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=19, n_positions=16, n_embd=8, n_layer=2, n_head=2)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=19,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=True,
        )
    ),
}


def _problem(name: str) -> Problem:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(19, (rows, 9), generator=generator) for rows in (3, 1)]
    return Problem.create(model, causal_loss, batches, [3, 1])


def _random(problem: Problem, names: list[str]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(problem.parameters[n].shape, generator=generator, dtype=torch.float64) for n in names]


def _differences(problem: Problem, names: list[str], tangents: list[Tensor], step: float) -> Tensor:
    chosen = [problem.parameters[n] for n in names]

    def gradient(sign: float) -> Tensor:
        with torch.no_grad():
            for p, t in zip(chosen, tangents, strict=True):
                p.add_(t, alpha=sign * step)
        rows = torch.cat(list(problem.batches))
        parts = torch.autograd.grad(causal_loss(problem.model, rows), chosen)
        with torch.no_grad():
            for p, t in zip(chosen, tangents, strict=True):
                p.sub_(t, alpha=sign * step)
        return torch.cat([p.reshape(-1) for p in parts])

    return (gradient(1) - gradient(-1)) / (2 * step)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", ["all", "last block", "first block"])
def test_against_differences(mode: str, name: str, part: str) -> None:
    problem = _problem(name)
    names = list(problem.parameters)
    if part != "all":
        wanted = ".1." if part == "last block" else ".0."
        names = [n for n in names if wanted in n]
    tangents = _random(problem, names)
    image = torch.cat([t.detach().reshape(-1) for t in build(problem, mode).product(names, tangents)])  # type: ignore[arg-type]
    # Llama's norms and softmax cast to float32 inside: its differences need a long step and are good to 1e-4.
    truth = _differences(problem, names, tangents, 1e-6 if name == "gpt2" else 1e-4)
    assert float((image - truth).norm() / truth.norm()) < (1e-6 if name == "gpt2" else 2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_subset_is_the_mean_over_some_batches(mode: str) -> None:
    problem = _problem("gpt2")
    names = list(problem.parameters)
    tangents = _random(problem, names)
    one = build(problem, mode).subset([1]).product(names, tangents)  # type: ignore[arg-type]
    other = build(problem.subset([1]), "fresh").product(names, tangents)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one, other, strict=True))


def test_truncation_is_the_shallow_model_and_is_undone() -> None:
    problem = _problem("llama")
    blocks = find_blocks(problem.model)
    assert blocks is not None
    before = problem.mean_loss()
    shallow = MODELS["llama"]()
    shallow.config.num_hidden_layers = 1
    short = LlamaForCausalLM(shallow.config).double().eval()  # type: ignore[arg-type]
    short.load_state_dict({k: v for k, v in problem.model.state_dict().items() if ".layers.1." not in k})
    expected = sum(w * float(causal_loss(short, b)) for w, b in zip(problem.weights, problem.batches, strict=True))
    assert problem.truncated(blocks, 1).mean_loss() == pytest.approx(expected, abs=1e-12)
    assert problem.mean_loss() == before


def test_choice_takes_an_exact_mode_and_respects_memory() -> None:
    problem = _problem("gpt2")
    free = choose(problem)
    assert (free.mode, set(free.seconds), free.refused) == ("kept", {"kept"}, {})
    tight = choose(problem, memory=1.0)
    assert (tight.mode, set(tight.seconds)) == ("fresh", {"fresh"})
    assert "GiB" in tight.refused["kept"]
    for mode in MODES:
        assert choose(problem, mode=mode).mode == mode


def test_a_loss_that_reaches_inside_the_model_rules_forward_mode_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    problem = Problem.create(model, lambda m, b: m[2](torch.tanh(m[0](b))).square().mean(), [x])
    assert choose(problem).mode == "kept"
    with pytest.raises(UnsupportedError, match="forward: "):
        choose(problem, mode="forward")


def test_no_second_derivative_is_said() -> None:
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            return g * 2

    model = nn.Linear(3, 1)
    problem = Problem.create(model, lambda m, b: OneWay.apply(m(b)).square().mean(), [torch.ones(2, 3)])
    with pytest.raises(UnsupportedError, match="zero or missing"):
        choose(problem)


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, b: m[1](OneWayTanh.apply(m[0](b))).square().mean(),
        lambda m, b: FusedCrossEntropy.apply(m[1](torch.tanh(m[0](b))), b.argmax(dim=1) % 2),
    ],
    ids=["inside", "fused loss"],
)
def test_a_second_derivative_missing_in_part_is_refused(loss) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    before = [p.clone() for p in model.parameters()]
    batches = [torch.randn(8, 3), torch.randn(8, 3)]
    with pytest.raises(UnsupportedError, match="second derivatives of this loss are wrong"):
        analyze(model, loss, batches)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_kinks_are_no_missing_derivative() -> None:
    """On ReLU differences of gradients prove nothing, and exact products stand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2))
    report = analyze(model, lambda m, b: m(b).square().mean(), [torch.randn(8, 3), torch.randn(8, 3)])
    assert report.full.status == "converged"


def test_unequal_batches_need_weights() -> None:
    with pytest.raises(UsageError, match="weights"):
        Problem.create(nn.Linear(3, 1), lambda m, b: m(b).mean(), [torch.ones(2, 3), torch.ones(1, 3)])


@pytest.mark.parametrize("mode", ["kept", "fresh"])
def test_a_product_holds_no_gradient_and_leaves_no_hook(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are as large as the parameters: of each batch only the graph is held, while the next is worked on."""
    problem = _problem("gpt2")
    names = list(problem.parameters)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def spy(gradient: Tensor) -> GradientEdge:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(gradient))
        return get_gradient_edge(gradient)

    monkeypatch.setattr("curvcli.curvature.hvp.get_gradient_edge", spy)
    engine = build(problem, mode)
    engine.product(names, _random(problem, names))
    assert len(alive) == 2 * len(names)
    assert max(alive) <= 1
    assert not any(reference() is not None for reference in seen)
    assert not any(parameter._backward_hooks for parameter in problem.parameters.values())
