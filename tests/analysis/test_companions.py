"""The cheap numbers beside rho, against dense Hessians and the optimizer's formulas; in gates; within budgets."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from tiny import run_of

from curvcli.analysis.api import analyze
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.documents import Report, Rule
from curvcli.documents.columns import PARTS, POINTS, Measurement, column, parts, shown
from curvcli.errors import OutOfTime
from curvcli.judge.gate import judge
from curvcli.judge.readings import ReportReadings
from curvcli.render import TEXT
from curvcli.render.html import report_page

DECAY, EPS = 0.02, 1e-8


@pytest.fixture(scope="module")
def trained() -> tuple[models.Net, torch.optim.Adam, list, Report]:  # type: ignore[type-arg]
    model, batches = models.Net(), models.data()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=DECAY)
    models.train(model, optimizer, batches)
    report = analyze(model, models.loss, batches, optimizer, weights=models.weights(batches), tolerance=1e-4, depths=False)
    return model, optimizer, batches, report


def test_quotients_along_the_gradient(trained: tuple) -> None:  # type: ignore[type-arg]
    model, optimizer, batches, report = trained
    names = [n for n, _ in model.named_parameters()]
    matrix = models.dense_hessian(model, batches, names)
    ids, targets = (torch.cat(both) for both in zip(*batches, strict=True))
    gradients = torch.autograd.grad(models.loss(model, (ids, targets)), list(model.parameters()))
    g = torch.cat([part.flatten() for part in gradients])
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]) / (1 - 0.999**12)
    p = (1 - 0.9**12) * (v.sqrt() + EPS)
    found = report.companions
    assert found is not None
    assert found.gradient_norm == pytest.approx(float(g.norm()), rel=1e-9)
    assert found.gradient_quotient == pytest.approx(float(g @ matrix @ g / (g @ g)), rel=1e-5)
    u = g / p
    decayed = matrix + DECAY * torch.eye(len(matrix))
    assert found.preconditioned_quotient == pytest.approx(float(u @ decayed @ u / (u @ g)), rel=1e-5)
    assert report.full.eigenvalue is not None
    assert found.preconditioned_quotient is not None
    assert found.preconditioned_quotient <= report.full.eigenvalue


def test_update_rms_is_that_of_adams_step(trained: tuple) -> None:  # type: ignore[type-arg]
    model, optimizer, _, report = trained

    def step(p: torch.Tensor) -> torch.Tensor:
        state = optimizer.state[p]
        return state["exp_avg"] / (1 - 0.9**12) / ((state["exp_avg_sq"] / (1 - 0.999**12)).sqrt() + EPS)

    def rms(module: torch.nn.Module) -> float:
        return float(torch.cat([step(p).flatten() for p in module.parameters()]).square().mean().sqrt())

    assert report.companions is not None
    assert report.companions.update_rms == pytest.approx(rms(model), rel=1e-6)
    for layer, module in zip(report.layers, model.layers, strict=True):
        assert layer.companions is not None
        assert layer.companions.update_rms == pytest.approx(rms(module), rel=1e-6)
        norms = [float(torch.linalg.svdvals(w.detach())[0]) for w in module.parameters() if w.dim() == 2]
        assert layer.companions.spectral_norm == pytest.approx(max(norms))
        assert (layer.companions.attention_logit, layer.companions.attention_entropy) == (None, None), "it has none"


def test_without_momentum_there_is_no_update(trained: tuple) -> None:  # type: ignore[type-arg]
    model, _, batches, _ = trained
    report = analyze(model, models.loss, batches, None, weights=models.weights(batches), depths=False)
    assert report.companions is not None
    assert report.companions.update_rms is None
    assert report.companions.gradient_quotient == pytest.approx(report.companions.preconditioned_quotient, rel=1e-6)


def test_what_is_maximised_has_the_signs_of_what_is_descended(trained: tuple) -> None:  # type: ignore[type-arg]
    model, _, batches, _ = trained
    found = []
    for sign, maximize in ((1, False), (-1, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, maximize=maximize)

        def loss(net: torch.nn.Module, batch: Any, sign: int = sign) -> torch.Tensor:
            return sign * models.loss(net, batch)

        report = analyze(model, loss, batches, optimizer, weights=models.weights(batches), depths=False)
        assert report.companions is not None
        found.append(report.companions.gradient_quotient)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Report:
    run = run_of(tmp_path_factory.mktemp("run"), 3)
    return analyze_checkpoint(run / "checkpoint-3", Options(tokens=256, mode="kept", depths=False, device="cpu"))


def test_attention_in_a_report_in_its_formats_and_in_a_gate(llama: Report) -> None:
    for layer in llama.layers:
        assert layer.companions is not None
        assert layer.companions.attention_logit is not None
        assert layer.companions.attention_entropy is not None
        # Hardly trained, attention is all but even: the mean over queries of the log of how many keys each has.
        even = float(torch.arange(1.0, 17.0).log().mean())
        assert layer.companions.attention_entropy == pytest.approx(even, rel=1e-2)
    assert "attention_entropy" in TEXT["csv"](llama).splitlines()[0]
    assert "entropy" not in TEXT["markdown"](llama)
    assert not {"attention_logit", "spectral_norm"} & {c.key for c in shown(PARTS, "table")}
    assert _outcomes(llama, logit=10.0, entropy=0.1) == ["passed", "passed"]
    assert _outcomes(llama, logit=1e-9, entropy=9.0) == ["broken", "broken"]
    old = llama.model_copy(update={"layers": [e.model_copy(update={"companions": None}) for e in llama.layers]})
    assert _outcomes(old, logit=10.0, entropy=0.1) == ["unresolved", "unresolved"]


def _outcomes(report: Report, *, logit: float, entropy: float) -> list[str]:
    limits = {"max-attention-logit": logit, "min-attention-entropy": entropy}
    rules = [Rule(name=name, limit=limit, source="here") for name, limit in limits.items()]
    return [found.outcome for found in judge(rules, ReportReadings(report))]


def test_columns_of_the_whole(llama: Report) -> None:
    assert llama.companions is not None
    for key in ("gradient_norm", "gradient_quotient", "preconditioned_quotient", "update_rms"):
        assert column(POINTS, key).get(Measurement(llama)) == getattr(llama.companions, key)
        assert column(POINTS, key).get(Measurement(llama.model_copy(update={"companions": None}))) is None
    full = parts(llama)[0]
    assert column(PARTS, "spectral_norm").get(full) is None


def test_a_budget_that_runs_out_leaves_them_out(trained: tuple, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[type-arg]
    model, optimizer, batches, _ = trained

    def late(*_: object) -> None:
        raise OutOfTime

    monkeypatch.setattr("curvcli.analysis.solve.companions", late)
    told: list[Report] = []
    report = analyze(
        model, models.loss, batches, optimizer, weights=models.weights(batches), depths=False, on_verdict=told.append
    )
    assert len(told) == 1, "the verdict does not wait for them"
    assert report.companions is None
    assert {layer.status for layer in report.layers} == {"skipped"}
    assert {layer.companions for layer in report.layers} == {None}


def test_pages_have_columns_for_what_there_is(llama: Report) -> None:
    page = report_page(llama)
    assert ">attention entropy</th>" in page
    without = llama.model_copy(update={"layers": [e.model_copy(update={"companions": None}) for e in llama.layers]})
    assert "attention entropy" not in report_page(without)
