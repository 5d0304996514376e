"""The contract that every architecture is held to: its layers are found, and every product is its Hessian's.

The oracle is central differences of first-order gradients with all of the model in float64.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CASES, VOCABULARY, Case, all_in_float64
from places import ROOT
from rich.console import Console
from torch import Tensor, nn

from curvcli import analyze
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.curvature.hvp import MODES, build, choose, random_direction
from curvcli.curvature.problem import Problem, gradient, measurable
from curvcli.data.tasks import LOSSES, predictions
from curvcli.errors import UnsupportedError
from curvcli.models.blocks import find_blocks, stacks, survey
from curvcli.models.registered import twice_differentiable
from curvcli.render.table import show


def _problem(case: Case, model: nn.Module, dtype: torch.dtype = torch.float32) -> Problem:
    batches = [case.batch(3, dtype=dtype), case.batch(1, seed=2, dtype=dtype)]
    return Problem.create(model, LOSSES[case.task], batches, [predictions(b, case.task) for b in batches])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _differences(problem: Problem, tangents: list[Tensor], step: float) -> Tensor:
    parameters = list(problem.parameters.values())
    kept = [p.data for p in parameters]

    def at(sign: int) -> Tensor:
        for p, data, t in zip(parameters, kept, tangents, strict=True):
            p.data = data + sign * step * t
        return _flat(gradient(problem, list(problem.parameters)))

    above, below = at(1), at(-1)
    for p, data in zip(parameters, kept, strict=True):
        p.data = data
    return (above - below) / (2 * step)


def test_the_documentation_lists_what_is_tested() -> None:
    text = (ROOT / "docs/how-to/models.md").read_text()
    listed = re.search(r"included:\n\n(.*?)\n\n", text, re.DOTALL)
    assert listed is not None
    assert {name.strip() for name in listed[1].replace("\n", " ").split(",")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_layers_are_found(name: str) -> None:
    case = CASES[name]()
    blocks = find_blocks(case.build())
    assert blocks is not None
    assert (blocks.prefix, len(blocks.modules)) == (case.layers, case.count)


# One of each kind of attention, mask, experts and state; the others differ from one of these in a detail.
KINDS = ("llama", "gemma3", "bert", "vit", "t5", "mamba", "qwen2_moe")


@pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_products_are_the_hessians(name: str) -> None:
    case = CASES[name]()
    model = case.build().double()
    twice_differentiable(model)
    with measurable(model), all_in_float64():
        problem = _problem(case, model, torch.float64)
        names, tangents = list(problem.parameters), random_direction(problem)
        other = [torch.randn(t.shape, generator=torch.Generator().manual_seed(3), dtype=t.dtype) for t in tangents]
        truth = _differences(problem, tangents, 1e-6)
        images = {}
        for mode in MODES:
            if mode == "forward" and not case.forward:
                with pytest.raises(RuntimeError):
                    build(problem, mode).product(names, tangents)
                continue
            images[mode] = _flat(build(problem, mode).product(names, tangents))
            assert float((images[mode] - truth).norm() / truth.norm()) < 1e-6, mode
        reverse = _flat(build(problem, "kept").product(names, other))
        one, two = float(_flat(other) @ images["kept"]), float(_flat(tangents) @ reverse)
        assert abs(one - two) < 1e-10 * float(images["kept"].norm() * _flat(other).norm())
    with measurable(model.float()):
        short = _problem(case, model)
        assert choose(short).mode == "kept"
        small = [t.float() for t in tangents]
        if not case.forward:
            with pytest.raises(UnsupportedError, match="forward: "):
                choose(short, mode="forward")
        for mode in MODES if case.forward else MODES[:2]:
            assert choose(short, mode=mode).mode == mode
            image = _flat(build(short, mode).product(names, small)).double()
            assert float((image - truth).norm() / truth.norm()) < 1e-4, mode


@pytest.mark.parametrize(
    "name", ["llama", "bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "opt", "t5"))]
)
def test_a_model_in_memory_needs_no_preparation(name: str) -> None:
    """As transformers makes it: fused attention, a cache, checkpointing on, in training mode with dropout."""
    case = CASES[name]()
    plain = case.build()
    twice_differentiable(plain)
    used = case.build()
    used.gradient_checkpointing_enable()
    used.train()
    images = []
    for model in (plain, used):
        with measurable(model):
            problem = _problem(case, model)
            choice = choose(problem)
            tangents = random_direction(problem)
            images.append(_flat(build(problem, choice.mode).product(list(problem.parameters), tangents)))
    assert float((images[0] - images[1]).norm() / images[0].norm()) < 1e-5
    assert used.training
    assert any(getattr(m, "gradient_checkpointing", False) for m in used.modules())


@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2_moe", "qwen3_moe"))])
def test_experts_of_a_model_in_memory(name: str) -> None:
    """grouped_mm, which transformers takes by itself, has no forward mode; double backward through it is right."""
    case = CASES[name]()
    fused, plain = case.build(), case.build()
    twice_differentiable(plain)
    assert fused.config._experts_implementation == "grouped_mm"
    images = []
    for model in (fused, plain):
        with measurable(model):
            problem = _problem(case, model)
            if model is fused:
                with pytest.raises(UnsupportedError, match="forward: "):
                    choose(problem, mode="forward")
            else:
                assert choose(problem, mode="forward").mode == "forward"
            image = build(problem, choose(problem).mode).product(list(problem.parameters), random_direction(problem))
            images.append(_flat(image))
    assert float((images[0] - images[1]).norm() / images[0].norm()) < 1e-5


def test_a_padding_row_makes_the_gradient_no_gradient_and_is_lifted() -> None:
    """OPT pads with id 1: double backward and forward mode then differ, and both are symmetric without it."""
    case = CASES["opt"]()
    model = case.build()
    twice_differentiable(model)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx == 1
    problem = _problem(case, model)
    assert any((batch == 1).any() for batch in problem.batches)
    with pytest.raises(UnsupportedError, match="differs from double backward"):
        choose(problem, mode="forward")
    with measurable(model):
        assert choose(problem, mode="forward").mode == "forward"
    assert embedding.padding_idx == 1


def test_an_embedding_that_computes_with_its_padding_keeps_it() -> None:
    class Positions(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward((ids != self.padding_idx).cumsum(1) * (ids != self.padding_idx) + self.padding_idx)

    model = nn.Sequential(Positions(9, 4, padding_idx=1), nn.Linear(4, 3))
    ids = torch.tensor([[2, 3, 1, 1]])
    before = model(ids)
    with measurable(model):
        assert torch.equal(model(ids), before)


def _shallow(case: Case, model: nn.Module, batch: Any, **changes: Any) -> float:
    """Loss of a model built with fewer layers and the same weights."""
    other = case.build(**changes)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k in other.state_dict()})
    return LOSSES[case.task](other.eval(), batch).item()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("bert", "num_hidden_layers"),
        ("vit", "num_hidden_layers"),
        ("t5", "num_decoder_layers"),
        ("mamba", "num_hidden_layers"),
    ],
)
def test_a_network_cut_short_is_the_shallow_one(name: str, count: str) -> None:
    case = CASES[name]()
    model = case.build()
    problem = _problem(case, model)
    blocks, notes = survey(problem, find_blocks(model))
    assert blocks.truncation == "list"
    assert ("other-stacks" in notes) == (name == "t5")
    expected = _shallow(case, model, problem.batches[0], **{count: 1})
    assert float(problem.truncated(blocks, 1).batch_loss(0).detach()) == pytest.approx(expected, rel=1e-6)
    assert float(problem.truncated(blocks, 2).batch_loss(0)) == float(problem.batch_loss(0))


def test_shared_layers_are_said_and_cut_by_identities() -> None:
    """ALBERT asks for its one group by index, three times."""
    case = CASES["albert"]()
    model = case.build()
    problem = _problem(case, model)
    blocks, notes = survey(problem, find_blocks(model))
    assert blocks.truncation == "identities"
    assert "used 3 times" in notes["shared-layers"]
    ids = problem.batches[0]["input_ids"]
    inner = model.albert
    bare = model.predictions(inner.encoder.embedding_hidden_mapping_in(inner.embeddings(ids)))
    expected = nn.functional.cross_entropy(bare.flatten(0, 1), problem.batches[0]["labels"].flatten())
    assert float(problem.truncated(blocks, 0).batch_loss(0)) == pytest.approx(float(expected), rel=1e-6)


class Indexed(nn.Module):
    """Asks for its blocks by index, and they give tuples: an identity in their place would be indexed into."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x + torch.tanh(self.inner(x)),)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 4)
        self.layers = nn.ModuleList(self.Block() for _ in range(2))
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i in range(2):
            x = self.layers[i](x)[0]
        return self.head(x)


def test_what_cannot_be_cut_has_no_truncated_curve() -> None:
    torch.manual_seed(0)
    case = CASES["llama"]()
    report = analyze(Indexed(), lambda m, b: m(b).square().mean(), [case.batch(4, s) for s in (1, 2)])
    assert report.cumulative.truncated == []
    assert [e.status for e in report.cumulative.restricted] == ["converged"] * 3
    assert "no-truncation" in [f.code for f in report.findings]
    text = io.StringIO()
    show(report, Console(file=text))
    assert "cumulative over depth" in text.getvalue()


def test_stacks_of_convolutions() -> None:
    """torchvision's layout: several Sequentials of blocks, the largest first; transformers': one list of stages."""
    from transformers import ResNetConfig, ResNetForImageClassification

    class Stage(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3, padding=1)

    net = nn.Module()
    for i, width in enumerate((2, 4, 8), start=1):
        setattr(net, f"layer{i}", nn.Sequential(Stage(width), Stage(width)))
    assert [b.prefix for b in stacks(net)] == ["layer3", "layer2", "layer1"]
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)  # type: ignore[call-arg]
    blocks = find_blocks(ResNetForImageClassification(config))
    assert blocks is not None
    assert (blocks.prefix, len(blocks.modules)) == ("resnet.encoder.stages", 2)


SMOOTH = ("albert", "t5")


@pytest.mark.parametrize("name", [n if n in SMOOTH else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_analysis(name: str) -> None:
    """A whole report: full, layers, depths of either kind."""
    case = CASES[name]()
    model = case.build()
    batches = [case.batch(4, seed) for seed in range(2)]
    weights = [predictions(b, case.task) for b in batches]
    report = analyze(model, LOSSES[case.task], batches, weights=weights)
    assert report.full.status == "converged"
    assert {e.status for e in (*report.layers, *report.cumulative.restricted)} <= {"converged", "empty"}
    assert len(report.layers) == case.count
    assert len(report.cumulative.truncated) == case.count + 1
    assert {e.status for e in report.cumulative.truncated} == {"converged"}
    codes = {f.code for f in report.findings}
    assert ("shared-layers" in codes) == (name == "albert")
    assert ("other-stacks" in codes) == (name == "t5")


REACTIONS = (
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12",
    "C=CCN=C=S.CNCc1ccc(C#N)cc1.NNC(=O)c1cn2c(n1)CCCC2>>C=CCN1C(C2=CN3CCCCC3=N2)=NN=C1N(C)CC1=CC=C(C#N)C=C1",
    "CCO.CC(=O)O>>CCOC(C)=O",
)
SMILES = r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"


@pytest.mark.slow
def test_a_model_from_outside(tmp_path: Path) -> None:
    """The ALBERT of chemical reactions in the package rxnmapper: nobody here trained it, and it was saved years ago."""
    command = [sys.executable, "-m", "pip", "download", "rxnmapper==0.4.3", "--no-deps", "-q", "-d", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("rxnmapper 0.4.3 could not be downloaded: no package registry")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path, [n for n in wheel.namelist() if "/models/" in n])
    folder = next(tmp_path.rglob("config.json")).parent
    words = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().split("\n"))}
    with (tmp_path / "reactions.jsonl").open("w") as stream:
        for reaction in REACTIONS:
            ids = [words[w] for w in ("[CLS]", *re.findall(SMILES, reaction), "[SEP]")]
            hidden = [0 < i < len(ids) - 1 and i % 7 == 3 for i in range(len(ids))]
            row = {
                "input_ids": [words["[MASK]"] if h else i for i, h in zip(ids, hidden, strict=True)],
                "labels": [i if h else -100 for i, h in zip(ids, hidden, strict=True)],
            }
            stream.write(json.dumps(row) + "\n")
    report = analyze_checkpoint(folder, Options(data=tmp_path / "reactions.jsonl", optimizer="none", truncated=True))
    assert report.data.loss < 0.5  # ln 591 = 6.4 is chance
    assert (report.checkpoint.layers, round(report.checkpoint.parameters, -3)) == (1, 736_000)
    assert report.full.status == report.layers[0].status == "converged"
    assert "used 12 times" in next(f.message for f in report.findings if f.code == "shared-layers")
    assert [e.status for e in report.cumulative.truncated] == ["converged"] * 2
