"""Gradients that were clipped hard: a second moment that is not of the loss's own puts rho in doubt, and reports say so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import curvcli
from curvcli.analysis.checkpoint import Options, open_for_analysis
from curvcli.checkpoints.clipping import Clipping
from curvcli.documents import Report, Rule
from curvcli.errors import UsageError
from curvcli.judge.clipping import too_high
from curvcli.judge.gate import judge
from curvcli.judge.readings import ReportReadings
from curvcli.judge.run import judge_run
from curvcli.optimizers.base import OptimizerView
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.optimizers.update import over_moments


def trained(clip: float, optimizer: str = "AdamW") -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[Tensor, Tensor]]]:
    """A small regression, always on the same data, so that every gradient is nearly the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(64, 6), 3 * torch.randn(64, 3)
    made: torch.optim.Optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-4)
    for _ in range(60):
        made.zero_grad()
        loss(model, (x, y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        made.step()
    return model, made, [(x[:32], y[:32]), (x[32:], y[32:])]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_the_report_says_that_gradients_were_clipped_hard() -> None:
    model, optimizer, batches = trained(0.05)
    report = curvcli.analyze(model, loss, batches, optimizer, depths=False)
    said = {finding.code: finding for finding in report.findings}["gradient-over-moments"]
    assert said.severity == "warning"
    # Every gradient was of norm 0.05 to the optimizer: by closed form the factor is the norm over that. The
    # square of the norm behind two samples' is in expectation their inner product.
    one, two = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, b), list(model.parameters()))]) for b in batches
    )
    factor = float(said.message.split()[4])  # "the gradient here is N times as long"
    assert factor == pytest.approx(float(one @ two) ** 0.5 / 0.05, rel=0.08)
    batch = ((one @ one + two @ two) / 2).sqrt().item()
    assert report.optimizer.batch_ratio == pytest.approx(batch / 0.05, rel=0.08)


@pytest.mark.parametrize(("clip", "optimizer"), [(1e9, "AdamW"), (0.05, "SGD")])
def test_it_says_nothing_of_whole_gradients_or_without_a_second_moment(clip: float, optimizer: str) -> None:
    model, made, batches = trained(clip, optimizer)
    report = curvcli.analyze(model, loss, batches, made, depths=False)
    assert "gradient-over-moments" not in {finding.code for finding in report.findings}


def test_entries_without_a_gradient_until_now_do_not_count() -> None:
    """Rows of tokens that the run has not seen would make any gradient long."""
    parameter = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    optimizer.step()
    view = live(optimizer, {"p": parameter})
    found = over_moments(prepare(view, {"p": parameter}), ["p"], [torch.tensor([6.0, 8.0, 1e6, 1e6])])
    assert found == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("rates", [(1e-4, 1e-3), (1e-3, 1e-4)])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_neither_young_moments_nor_rates_by_group_count(rates: tuple[float, float], steps: int) -> None:
    """Gradients that are as long as all before them: the factor is 1, whatever P has of beta1 and of other groups' rates."""
    large, small = (torch.zeros(size, requires_grad=True) for size in (6, 2))
    groups = [{"params": [large], "lr": rates[0]}, {"params": [small], "lr": rates[1]}]
    optimizer = torch.optim.AdamW(groups)
    given = torch.tensor([1.0, -2.0, 3.0, 1.0, 1.0, 2.0]), torch.tensor([4.0, -1.0])
    for _ in range(steps):
        large.grad, small.grad = (g.clone() for g in given)
        optimizer.step()
    parameters = {"large": large, "small": small}
    assert over_moments(prepare(live(optimizer, parameters), parameters), ["large", "small"], given) == pytest.approx(
        1, rel=1e-4
    )


def test_a_second_moment_that_is_not_all_of_p_says_nothing() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.RMSprop([parameter], centered=True)
    for _ in range(50):
        parameter.grad = torch.tensor([1.0, -2.0])
        optimizer.step()
    parameters = {"p": parameter}
    assert over_moments(prepare(live(optimizer, parameters), parameters), ["p"], [torch.tensor([1.0, -2.0])]) is None


LR = 1e-2


def steep(clip: float) -> Report:
    """Of a healthy run, a fifth below its edge but for what is clipped away."""
    model, made, batches = trained(clip)
    for group in made.param_groups:
        group["lr"] = LR
    return curvcli.analyze(model, loss, batches, made, depths=False)


def test_no_verdict_is_given_where_clipping_alone_may_make_rho_too_high() -> None:
    whole, clipped = steep(1e9), steep(0.01)
    assert whole.judged.rho is not None
    assert clipped.judged.rho is not None
    assert whole.judged.rho < 0.3 < 2.5 < clipped.judged.rho
    assert whole.verdict == "stable"
    assert (clipped.verdict, clipped.findings[0].code) == ("unresolved", "unresolved-clipping")
    assert clipped.stable_lr is clipped.odds is None
    low = clipped.generalisation.rho_low
    assert low is not None
    assert low < 0.8
    run = judge_run([clipped])
    assert run.name == "unresolved"  # rho over 2.5 would make it hot
    assert "clipping may make its rho up to 1.3e+02 times too high" in run.reasons[0]
    reading = ReportReadings(clipped).rho()
    assert (reading.low, reading.narrow) == (low, "find out how hard gradients were clipped")
    part = judge([Rule(name="max-rho", limit=1.0, source="--max-rho")], ReportReadings(clipped))[0]
    assert part.outcome == "unresolved"


def test_a_young_optimizer_says_nothing_however_long_its_gradients_are() -> None:
    model, made, batches = trained(0.01)
    for group in made.param_groups:
        group["lr"] = 100.0 * LR
    for entry in made.state.values():
        entry["step"].fill_(6)
    young = curvcli.analyze(model, loss, batches, made, depths=False)
    assert too_high(young.optimizer) > 1
    assert young.verdict == "early"


def test_a_rho_that_is_past_the_edge_however_hard_gradients_were_clipped_is_told() -> None:
    clipped = steep(0.01)
    times = too_high(clipped.optimizer)
    for rho, name in ((2.4 * times, "unresolved"), (2.6 * times, "hot")):
        full = clipped.full.model_copy(update={"rho": rho})
        assert judge_run([clipped.model_copy(update={"full": full})]).name == name


def test_clipping_on_record_makes_rho_what_it_is_at_the_edge() -> None:
    """Full-batch training comes to rest where rho is 1 (arXiv 2207.14484); clipped hard, where rho s is, and not rho."""
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    y = torch.sin(2 * torch.tanh(x @ torch.randn(32, 32) / 4) @ torch.randn(32, 10) / 3)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    norms, clip = [], 0.003
    for _ in range(600):
        optimizer.zero_grad()
        loss(model, (x, y)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
    share = Clipping(clip, tuple(norms)).share
    assert share is not None
    assert share < 0.4
    known, unknown = (curvcli.analyze(model, loss, [(x, y)], optimizer, clip=s, depths=False) for s in (share, None))
    assert unknown.judged.rho is not None
    assert known.judged.rho is not None
    assert unknown.judged.rho > 2.5
    assert known.judged.rho == pytest.approx(1, abs=0.15)
    assert known.judged.rho == pytest.approx(share * unknown.judged.rho, rel=1e-3)
    assert known.optimizer.clip == share
    assert known.verdict == "edge"


def test_the_trainers_files_say_what_clipping_left(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    sample = Path("sample_checkpoints")
    run = tmp_path / "checkpoint-60"
    shutil.copytree(sample / "calm" / "checkpoint-60", run)
    options = Options(data=sample / "data" / "shard.bin", tokens=256)

    def ready(options: Options = options) -> tuple[float | None, str]:
        found = open_for_analysis(run, options).ready()
        assert isinstance(found.optimizer, OptimizerView)
        return found.optimizer.clip, found.provenance.notes["clipped-moments"]

    assert ready()[0] is None  # the Trainer's default may not have been in force
    torch.save(TrainingArguments(str(tmp_path), use_cpu=True, max_grad_norm=0.1), run / "training_args.bin")
    share, said = ready()
    assert share is None
    assert "and the second moment has seen 0." in said, "moments of longer gradients than the files allow"
    state = torch.load(run / "optimizer.pt", weights_only=True)
    for entry in state["state"].values():
        entry["exp_avg"] *= 0.1
        entry["exp_avg_sq"] *= 0.01
    torch.save(state, run / "optimizer.pt")
    norms = [e["grad_norm"] for e in json.loads((run / "trainer_state.json").read_text())["log_history"] if "grad_norm" in e]
    left = sum(0.1 / norm for norm in norms[-20:]) / 20
    share, said = ready()
    assert share == pytest.approx(left)
    assert said.endswith(f"{left:.2g} of a gradient was left of late")
    assert ready(replace(options, clip=0.5)) == (
        0.5,
        "clipping leaves 0.5 of a gradient, as was said",
    )


def test_a_share_that_nothing_can_count_with_is_not_taken_in_silence(tmp_path: Path) -> None:
    sample = Path("sample_checkpoints")
    run = tmp_path / "checkpoint-60"
    shutil.copytree(sample / "calm" / "checkpoint-60", run, ignore=shutil.ignore_patterns("optimizer*"))
    options = Options(data=sample / "data" / "shard.bin", tokens=256, clip=0.5)
    found = open_for_analysis(run, options).ready()
    assert "no --clip counts" in found.provenance.notes["clipping-not-counted"]
    assert "as was said" not in found.provenance.notes.get("clipped-moments", "")
    with pytest.raises(UsageError, match="--optimizer none takes no clip"):
        open_for_analysis(run, replace(options, optimizer="none")).ready()


def test_smoothed_labels_are_a_finding_until_the_loss_is_the_users_own(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    run = tmp_path / "checkpoint-60"
    shutil.copytree("sample_checkpoints/calm/checkpoint-60", run)
    torch.save(TrainingArguments(str(tmp_path), use_cpu=True, label_smoothing_factor=0.1), run / "training_args.bin")
    options = Options(data=Path("sample_checkpoints/data/shard.bin"), tokens=256)
    for spec, there in (("auto", True), ("curvcli.data.tasks:causal_loss", False)):
        ready = open_for_analysis(run, replace(options, loss=spec)).ready()
        assert ("label-smoothing" in {finding.code for finding in ready.provenance.findings}) == there
