"""Damage that loads: absurd weights, moments that no gradients make, state that belongs to other parameters."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvcli.analysis.checkpoint import Options, analyze_checkpoint, open_for_analysis
from curvcli.analysis.document import Provenance
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.state.evidence import Evidence, choose, contradictions, gather
from curvcli.checkpoints.state.mapping import AmbiguousStateError, map_state, single_order
from curvcli.checkpoints.state.soundness import state_findings, weight_findings
from curvcli.data.shards import read_shard
from curvcli.data.tasks import causal_loss
from curvcli.errors import InputError
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.preconditioner import prepare

NAMES = [f"{run}/checkpoint-{step}" for run in ("calm", "hot") for step in (10, 60, 600)] + ["nanogpt/ckpt.pt"]
FEW = ("calm/checkpoint-10", "hot/checkpoint-60", "nanogpt/ckpt.pt")
Sample = tuple[nn.Module, OptimizerView, Evidence, int | None]


@pytest.fixture(scope="module", params=[n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def sample(request: pytest.FixtureRequest, samples: Path) -> Sample:
    checkpoint = open_checkpoint(samples / request.param)
    model = checkpoint.model()
    windows = read_shard(samples / "data/shard.bin", checkpoint, tokens=2048, sequence_length=64).windows
    assert checkpoint.optimizer is not None
    return model, checkpoint.optimizer.view(model), gather(model, causal_loss, windows.split(1)), checkpoint.step


def _swapped(view: OptimizerView, i: int, j: int) -> OptimizerView:
    """The view with the state of two layers exchanged."""
    places = {i: j, j: i}

    def other(match: re.Match[str]) -> str:
        return f".{places.get(int(match[1]), int(match[1]))}."

    return replace(view, state={name: view.state[re.sub(r"\.(\d+)\.", other, name)] for name in view.state})


def test_sound_checkpoints_have_no_findings(sample: Sample) -> None:
    model, view, evidence, step = sample
    assert weight_findings(model) == []
    assert state_findings(view, step, "here") == []
    assert contradictions(view, evidence, "here") == []


def test_two_layers_swapped_are_noticed(sample: Sample) -> None:
    _, view, evidence, _ = sample
    layers = sorted({int(m[1]) for name in view.state if (m := re.search(r"\.(\d+)\.", name))})
    missed = []
    for i, j in pairwise(layers):
        try:
            contradictions(_swapped(view, i, j), evidence, "here")
            missed.append((i, j))
        except InputError as error:
            assert "swapped" in str(error)  # noqa: PT017
    assert len(missed) <= 1  # one pair of hot/checkpoint-10, whose second moment is ten steps old


def test_moments_of_nothing_are_noticed(sample: Sample) -> None:
    _, view, evidence, _ = sample
    generator = torch.Generator().manual_seed(0)

    def shuffled(v: Tensor) -> Tensor:
        return v.flatten()[torch.randperm(v.numel(), generator=generator)].view_as(v)

    mixed = {name: {**entry, "exp_avg_sq": shuffled(entry["exp_avg_sq"])} for name, entry in view.state.items()}
    found = contradictions(replace(view, state=mixed), evidence, "here")
    assert [f.code for f in found] == ["moments-contradict-gradient"]


def test_a_moment_is_ranked_once_whatever_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at the same entries as those of its shape, or two tensors could not be held against each other's."""
    model = nn.ModuleDict({"layers": nn.Sequential(*(nn.Linear(200, 200, bias=False) for _ in range(4)))})
    evidence = gather(model, lambda m, x: m["layers"](x).square().mean(), list(torch.randn(2, 8, 200)))  # type: ignore[index]
    first, *others = evidence.picks.values()
    assert len(first) < 200 * 200
    assert all(torch.equal(first, other) for other in others)
    asked: list[str] = []
    ranked = Evidence.ranked

    def counted(self: Evidence, name: str, moment: Tensor) -> Tensor:
        asked.append(name)
        return ranked(self, name, moment)

    monkeypatch.setattr(Evidence, "ranked", counted)
    names = [name for name, _ in model.named_parameters()]
    view = OptimizerView((Group(tuple(names), {"lr": 0.1}),), {name: {"exp_avg_sq": torch.rand(200, 200)} for name in names})
    assert [f.code for f in contradictions(view, evidence, "here")] == ["moments-contradict-gradient"]
    assert asked == names


def test_two_layers_swapped_in_the_file_are_refused(run: Path) -> None:
    model = open_checkpoint(run).model()
    names = [n for n, _ in model.named_parameters()]
    order = [n for n in names if "norm" not in n] + [n for n in names if "norm" in n]
    document = torch.load(run / "optimizer.pt", weights_only=True)
    state = document["state"]
    for index, name in enumerate(order):
        if ".layers.2." in name:
            other = order.index(name.replace(".2.", ".5."))
            state[index], state[other] = state[other], state[index]
    torch.save(document, run / "optimizer.pt")
    with pytest.raises(InputError, match=r"layers model\.layers\.2 and model\.layers\.5 fit each other"):
        analyze_checkpoint(run, Options(max_hvps=3))


class Twins(nn.Module):
    """Two towers of one shape, so that shapes alone cannot tell in which order they were given to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(3))
        self.right = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a = b = x
        for left, right in zip(self.left, self.right, strict=True):
            a, b = torch.tanh(left(a)), torch.tanh(right(b * b))
        return a + 0.3 * b


def _squared(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.roll(1, dims=-1)).square().mean()


def _right_first(model: nn.Module) -> list[list[str]]:
    names = [n for n, _ in model.named_parameters()]
    return [sorted(names, key=lambda n: (n.startswith("left"), names.index(n)))]


@pytest.mark.parametrize("true", ["single", "right first"])
def test_gradients_decide_between_orders(true: str) -> None:
    model = Twins()
    order = {"single": single_order, "right first": _right_first}[true](model)[0]
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam([parameters[n] for n in order], lr=1e-3)
    scale = torch.logspace(-1, 0.5, 24)
    batches = [torch.randn(8, 24, generator=torch.Generator().manual_seed(i)) * scale for i in range(40)]
    for batch in batches[:30]:
        optimizer.zero_grad()
        _squared(model, batch).backward()
        optimizer.step()
    document = optimizer.state_dict()
    for group in document["param_groups"]:
        group.pop("param_names", None)
    with pytest.raises(AmbiguousStateError, match="2 orders") as caught:
        map_state(document, model, (single_order, _right_first), path="here")
    view, finding = choose(caught.value, gather(model, _squared, batches[30:]))
    assert finding.code == "order-by-gradient"
    for name, parameter in parameters.items():
        assert torch.equal(view.state[name]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])
    # Moments that say nothing leave it undecided, and then nothing is guessed.
    for entry in document["state"].values():
        entry["exp_avg_sq"] = torch.rand(24, 24)
    with pytest.raises(AmbiguousStateError) as caught:
        map_state(document, model, (single_order, _right_first), path="here")
    with pytest.raises(InputError, match="only"):
        choose(caught.value, gather(model, _squared, batches[30:]))


@settings(max_examples=80, deadline=None)
@given(
    a=st.floats(0, 0.99),
    b=st.floats(0.3, 0.9999),
    steps=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "spikes", "growing", "worst"]),
)
def test_no_gradients_break_the_bound(a: float, b: float, steps: int, seed: int, kind: str) -> None:
    """PyTorch's own AdamW on any gradients, those that reach the bound among them."""
    generator = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.zeros(16))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(a, b))
    for step in range(steps):
        gradient = torch.randn(16, generator=generator)
        if kind == "spikes":
            gradient *= torch.rand(16, generator=generator) < 0.1
        elif kind == "growing":
            gradient *= 1.3**step
        elif kind == "worst":
            gradient = torch.full((16,), (a / b) ** (steps - step - 1) + 1e-6)
        parameter.grad = gradient
        optimizer.step()
    view = OptimizerView((Group(("p",), {"betas": (a, b)}),), {"p": optimizer.state[parameter]})
    assert state_findings(view, steps, "here") == []


def test_the_bound_is_reached(tmp_path: Path) -> None:
    """It could not be lower: gradients in proportion to (a/b)^age come within a part in a thousand of it."""
    a, b, steps = 0.9, 0.99, 80
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([parameter], betas=(a, b))
    for step in range(steps):
        parameter.grad = torch.full((4,), (a / b) ** (steps - step - 1))
        optimizer.step()
    entry = optimizer.state[parameter]
    view = OptimizerView((Group(("p",), {"betas": (a, b)}),), {"p": entry})
    assert state_findings(view, steps, "here") == []
    entry["exp_avg"][2] *= 1.003
    with pytest.raises(InputError, match="1 of 4 entries of p"):
        state_findings(view, steps, "here")


def _view(run: Path) -> tuple[nn.Module, OptimizerView]:
    checkpoint = open_checkpoint(run)
    model = checkpoint.model()
    assert checkpoint.optimizer is not None
    return model, checkpoint.optimizer.view(model)


NAME = "model.layers.2.mlp.up_proj.weight"
DAMAGE = {
    "zero second moment": (lambda e: e["exp_avg_sq"].view(-1).__setitem__(7, 0.0), "first moment that no gradients"),
    "negative second moment": (lambda e: e["exp_avg_sq"].view(-1).__setitem__(7, -1e-9), "negative entries"),
    "first moment of top bit": (lambda e: e["exp_avg"].view(-1).__setitem__(7, 1e30), "first moment that no gradients"),
    "fractional step": (lambda e: e.__setitem__("step", torch.tensor(9.5)), "took"),
    "step NaN": (lambda e: e.__setitem__("step", torch.tensor(float("nan"))), "took"),
    "step negative": (lambda e: e.__setitem__("step", -3), "took"),
    "step 0": (lambda e: e.__setitem__("step", torch.tensor(0.0)), "took no step"),
    "step text": (lambda e: e.__setitem__("step", "many"), "took"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_moments_that_cannot_be_are_refused(name: str, run: Path) -> None:
    damage, said = DAMAGE[name]
    _, view = _view(run)
    damage(view.state[NAME])
    with pytest.raises(InputError, match=said):
        state_findings(view, 10, "here")


def test_other_betas_by_option_answer_the_bound(run: Path) -> None:
    """The bound is of the betas in force, which --betas names where the file's are later ones."""
    _, view = _view(run)
    v = view.state[NAME]["exp_avg_sq"]
    view.state[NAME]["exp_avg"].copy_(v.sqrt() * 5)  # C is 7.3 at (0.9, 0.999), 2.3 at (0.9, 0.99) after ten steps
    with pytest.raises(InputError, match="pass --betas"):
        state_findings(view, 10, "here")
    other = tuple(replace(g, options={**g.options, "betas": (0.9, 0.999)}) for g in view.groups)
    assert state_findings(replace(view, groups=other), 10, "here") == []


def test_absurd_values_are_findings(run: Path) -> None:
    model, view = _view(run)
    with torch.no_grad():
        model.get_parameter(NAME).view(-1)[5] *= 2.0**100
        model.get_parameter("model.layers.1.mlp.up_proj.weight").zero_()
    assert [f.code for f in weight_findings(model)] == ["absurd-weight", "constant-weights"]
    view.state[NAME]["exp_avg_sq"].view(-1)[5] *= 2.0**64
    found = state_findings(view, 11, "here")
    assert [f.code for f in found] == ["absurd-moment", "step-mismatch"]
    assert NAME in found[0].message
    view.state[NAME]["exp_avg_sq"].fill_(1e30)
    assert "median 1e+30" in state_findings(view, 10, "here")[0].message


def test_a_step_of_its_own_is_a_finding(run: Path) -> None:
    _, view = _view(run)
    view.state[NAME]["step"] = torch.tensor(12.0)
    assert [f.code for f in state_findings(view, 12, "here")] == ["uneven-steps"]
    view.state[NAME]["step"] = torch.tensor(3.0)  # so few steps allow less, and the bound itself says so
    with pytest.raises(InputError, match="first moment that no gradients"):
        state_findings(view, 10, "here")


def test_findings_reach_the_measurement(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (run / "trainer_state.json").read_text()
    (run / "trainer_state.json").write_text(re.sub(r'"global_step": \d+', '"global_step": 11', text))
    given: list[object] = []

    def measured(*_: object, provenance: Provenance, **__: object) -> None:
        given.extend(f.code for f in provenance.findings)

    monkeypatch.setattr("curvcli.analysis.checkpoint.analyze", measured)
    open_for_analysis(run, Options()).measure()
    assert given == ["step-mismatch"]


@pytest.mark.slow
def test_findings_reach_the_report(run: Path) -> None:
    text = (run / "trainer_state.json").read_text()
    (run / "trainer_state.json").write_text(re.sub(r'"global_step": \d+', '"global_step": 11', text))
    report = analyze_checkpoint(run, Options(max_hvps=3, tokens=64, sequence_length=16))
    assert "step-mismatch" in [f.code for f in report.findings if f.severity == "warning"]


def test_an_entry_that_one_parameter_lacks_is_refused(run: Path) -> None:
    document = torch.load(run / "optimizer.pt", weights_only=True)
    del document["state"][3]["step"]
    torch.save(document, run / "optimizer.pt")
    checkpoint = open_checkpoint(run)
    model = checkpoint.model()
    assert checkpoint.optimizer is not None
    with pytest.raises(InputError, match="has no 'step'"):
        prepare(checkpoint.optimizer.view(model), dict(model.named_parameters()))


def test_a_matrix_without_entries_is_no_damage() -> None:
    """As of a layer that a network was built without: there is nothing to take the largest of."""
    model = nn.ModuleDict({"none": nn.Embedding(0, 4), "some": nn.Linear(4, 4)})
    assert weight_findings(model) == []
