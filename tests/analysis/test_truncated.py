"""Networks cut short: measured near initialisation or by option, and left out with a word where they say nothing."""

from __future__ import annotations

import pytest
import torch
from tiny import run_of
from torch import Tensor, nn

from curvcli import analyze
from curvcli.analysis.checkpoint import Options, open_for_analysis
from curvcli.analysis.cuts import Cut
from curvcli.analysis.solve import Measurement
from curvcli.analysis.track import key_of
from curvcli.documents import LrSchedule, Report
from curvcli.errors import InputError, OutOfTime, UsageError
from curvcli.schedules import Measured, grow_from

DEPTH, WIDTH = 4, 5


class Residual(nn.Module):
    """h + W h, four times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def error(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch[:, :WIDTH])
    return ((out - batch[:, WIDTH:]) ** 2).mean()


def measured(*, trained: bool, **options: object) -> tuple[Report, float, float]:
    """The report, and the losses of the first batch cut to two layers and whole, by the formula."""
    model = Residual()
    inputs = torch.randn(3, 8, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        half = inputs[0]
        for layer in model.layers[: DEPTH // 2]:
            half = half + half @ layer.weight.T
        # Nearly what the network makes of them, or what nothing has to do with them.
        noise = torch.randn(3, 8, WIDTH, generator=torch.Generator().manual_seed(2))
        wanted = model(inputs) + 0.1 * noise if trained else 100 * noise
        losses = [float(((out - wanted[0]) ** 2).mean()) for out in (half, model(inputs[0]))]
    batches = list(torch.cat([inputs, wanted], dim=-1))
    settings = {"lr": 0.1, "mode": "fresh", "layers": model.layers, **options}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return analyze(model, error, batches, optimizer, **settings), losses[0], losses[1]  # type: ignore[arg-type]


def test_they_are_left_out_of_a_trained_network_and_the_finding_says_why() -> None:
    report, half, whole = measured(trained=True)
    assert half > 1.1 * whole
    assert report.cumulative.truncated == []
    assert len(report.cumulative.restricted) == DEPTH + 1
    (said,) = [finding.message for finding in report.findings if finding.code == "truncated-left-out"]
    assert f"is {half:.3g} where the whole's is {whole:.3g}:" in said
    assert "--truncated" in said
    with pytest.raises(InputError, match="curv analyze --truncated"):
        grow_from(Measured(report), lr=LrSchedule(kind="constant", peak=0.1, warmup_steps=0, total_steps=None))


@pytest.mark.parametrize("mode", ["fresh", "kept"])
def test_they_are_measured_where_cutting_costs_no_loss(mode: str) -> None:
    """At depth 0 nothing that trains is left, as of LoRA: that network has no gradient, and no graph that could be kept."""
    report, half, whole = measured(trained=False, mode=mode)
    assert half < 1.1 * whole
    assert [e.status for e in report.cumulative.truncated] == ["empty", *["converged"] * DEPTH]
    assert "unconverged-parts" not in {finding.code for finding in report.findings}
    assert not [finding for finding in report.findings if finding.code == "truncated-left-out"]


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_asked_for_is_done_wherever_in_training(trained: bool) -> None:
    asked, declined = (measured(trained=trained, truncated=wish)[0] for wish in (True, False))
    assert len(asked.cumulative.truncated) == DEPTH + 1
    assert declined.cumulative.truncated == []
    assert not [f for report in (asked, declined) for f in report.findings if f.code == "truncated-left-out"]


def test_they_are_part_of_the_depths() -> None:
    with pytest.raises(UsageError, match="--no-depths, or --truncated"):
        measured(trained=True, depths=False, truncated=True)
    assert not [f for f in measured(trained=True, depths=False)[0].findings if f.code == "truncated-left-out"]


def test_the_key_of_what_is_kept_has_the_option(tmp_path: object) -> None:
    run = run_of(tmp_path, 1) / "checkpoint-1"  # type: ignore[arg-type]
    keys = {key_of(open_for_analysis(run, Options(tokens=64, truncated=wish))) for wish in (None, True, False)}
    assert len(keys) == 3


class Numbered(nn.Module):
    """As torchtitan has its layers: in a dictionary, by their number."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)]
        self.layers = (
            nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)}) if kind is nn.ModuleDict else kind(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers:
            x = x + layer(x)
        return x


def test_layers_in_a_dictionary_are_those_of_a_list() -> None:
    batch = torch.randn(8, 2 * WIDTH, generator=torch.Generator().manual_seed(1))

    def of(kind: type[nn.Module]) -> dict[str, object]:
        model = Numbered(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        report = analyze(model, error, [batch], optimizer, mode="fresh", truncated=True)
        return report.model_dump(include={"layers", "cumulative", "full"})

    found = of(nn.ModuleDict)
    assert len(found["layers"]) == DEPTH  # type: ignore[arg-type]
    assert found == of(nn.ModuleList)


@pytest.mark.parametrize(
    ("half", "whole", "unigram", "means"),
    [
        (5.0, 4.6, None, True),  # as of a network in memory, whose loss may be anything
        (5.1, 4.6, None, False),
        (4.6, 4.55, 3.07, True),  # ten steps in, it has not learned what the frequencies tell
        (2.63, 2.62, 3.07, False),  # cutting costs nothing, and yet it has learned
        (3.05, 3.02, 3.07, True),  # what the frequencies tell, and no more
        (float("nan"), 4.6, 3.07, False),
        (-5.0, -4.6, None, True),  # of what is maximised
    ],
)
def test_a_network_that_has_learned_from_context_is_not_near_its_initialisation(
    half: float, whole: float, unigram: float | None, means: bool
) -> None:
    assert Cut(half, whole, unigram).means == means


def test_the_finding_names_the_losses_that_decided() -> None:
    assert "is 2.63 where its tokens' frequencies alone give 3.07:" in Cut(2.7, 2.63, 3.07).why_not()
    assert "is 5.1 where the whole's is 4.6:" in Cut(5.1, 4.6, 3.07).why_not()
    assert "is 5.1 where the whole's is 4.6:" in Cut(-5.1, -4.6).why_not(negated=True)


def test_a_checkpoint_s_shard_says_what_frequencies_alone_give(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, 1) / "checkpoint-1"  # type: ignore[arg-type]
    opened = open_for_analysis(run, Options(tokens=64))
    begun: list[Measurement] = []

    def run_none(self: Measurement, on_full: object) -> None:
        begun.append(self)
        raise OutOfTime

    monkeypatch.setattr(Measurement, "run", run_none)
    with pytest.raises(OutOfTime):
        opened.measure()
    (work,) = begun
    provenance = opened.ready().provenance
    assert provenance.data is not None
    assert work.cut is not None
    assert work.cut.unigram == provenance.data(1.0).unigram_loss
    # A fresh network's loss is far above it.
    assert work.cut.unigram is not None
    assert 0 < work.cut.unigram < work.cut.whole
    assert work.cuts


class Grouped(Residual):
    """Blocks that are asked for by their number, two at a time: the loop runs with none, and not with one."""

    def forward(self, x: Tensor) -> Tensor:
        for first in range(0, len(self.layers), 2):
            x = x + self.layers[first](x) + 0.1 * self.layers[first + 1](x)
        return x


def test_what_runs_without_blocks_and_not_with_one_is_cut_by_identities() -> None:
    model = Grouped()
    batches = list(torch.randn(2, 8, 2 * WIDTH, generator=torch.Generator().manual_seed(1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = analyze(model, error, batches, optimizer, layers=model.layers, truncated=True)
    assert [part.depth for part in report.cumulative.truncated] == list(range(DEPTH + 1))
    assert {part.status for part in report.cumulative.truncated[1:]} == {"converged"}


def test_a_depth_that_does_not_run_costs_its_curve_and_not_the_analysis() -> None:
    class Net(Residual):
        def forward(self, x: Tensor) -> Tensor:
            if len(self.layers) == DEPTH - 1:
                raise IndexError("three are no number")
            return super().forward(x)

    model = Net()
    batches = list(torch.randn(2, 8, 2 * WIDTH, generator=torch.Generator().manual_seed(1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = analyze(model, error, batches, optimizer, layers=model.layers, truncated=True)
    assert report.full.status == "converged"
    assert report.cumulative.truncated == []
    assert "no-truncation" in {finding.code for finding in report.findings}
