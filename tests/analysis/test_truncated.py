"""Networks cut short: measured near initialisation or by option, and left out with a word where they say nothing."""

from __future__ import annotations

import pytest
import torch
from tiny import run_of
from torch import Tensor, nn

from curvcli import analyze
from curvcli.analysis.checkpoint import Options, open_for_analysis
from curvcli.analysis.track import key_of
from curvcli.documents import LrSchedule, Report
from curvcli.errors import InputError, UsageError
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
