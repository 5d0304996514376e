"""The full model without the embedding rows that a shard hardly looks up, and the verdict that is on it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from functools import partial
from math import inf
from typing import Any

import models
import published
import pytest
import stepped
import torch
from budgets import late_after
from rare import RARE, measured, shard, trained
from torch import Tensor, nn

from curvcli.analysis import api, whole
from curvcli.analysis.api import analyze
from curvcli.curvature import resources
from curvcli.curvature.inverse_root import Diagonal
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.problem import Problem
from curvcli.curvature.rotated import Rotated
from curvcli.curvature.scratch import Scratch
from curvcli.documents import Report
from curvcli.errors import OutOfTime
from curvcli.models.rows import apart, lookups


def test_the_body_is_the_matrix_without_the_row() -> None:
    report, model, optimizer = measured(2)
    names = [n for n, _ in model.named_parameters()]
    hessian = models.dense_hessian(model, shard(2), names)
    entries, row = [], torch.zeros(len(hessian), dtype=torch.bool)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        step = float(state["step"])
        entries.append((1 - 0.9**step) * ((state["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8))
        if name == "embed.weight":
            row[RARE * 5 : (RARE + 1) * 5] = True
    root = torch.cat([entry.reshape(-1) for entry in entries]).rsqrt()
    matrix = root[:, None] * hessian * root
    assert report.full.eigenvalue == pytest.approx(models.top(matrix), rel=1e-4)
    assert report.body is not None
    assert report.body.rows == 1
    assert report.body.eigenvalue == pytest.approx(models.top(matrix[~row][:, ~row]), rel=1e-4)
    assert report.full.eigenvalue > 2 * report.body.eigenvalue, "the row carries the top direction"


def test_under_a_limit_the_full_models_vector_makes_room_for_the_bodys_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "return_blocks", lambda: True)
    put, solve = Scratch.put, Lanczos.extremes
    given: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def noted(self: Scratch, tensors: Sequence[Tensor]) -> list[Tensor]:
        given.extend(weakref.ref(t) for t in tensors)
        return put(self, tensors)

    def watched(self: Lanczos, operator: Any, **said: Any) -> Any:
        if said.get("support") is not None:
            left = [t() for t in given]
            alive.append(sum(t is not None and t.shape == (operator.space.size,) for t in left))
        return solve(self, operator, **said)

    monkeypatch.setattr(Scratch, "put", noted)
    monkeypatch.setattr(Lanczos, "extremes", watched)
    report, _, _ = measured(2, memory="64GiB")
    assert report.body is not None
    assert alive == [0]


def test_the_verdict_and_its_bracket_are_the_bodys() -> None:
    report, _, _ = measured(2)
    assert report.body is not None
    assert report.body.rho is not None
    assert report.generalisation.rho_low is not None
    assert report.generalisation.rho_high is not None
    assert report.generalisation.rho_low <= report.body.rho <= report.generalisation.rho_high
    assert report.full.rho is not None
    assert report.full.rho > report.generalisation.rho_high
    assert report.judged is report.body
    found = {finding.code: finding for finding in report.findings}
    assert f"rho {report.full.rho:.3g}" in found["rare-rows"].message
    assert f"{report.body.rho:.3g}" in report.findings[0].message


def numbers(report: Report) -> dict[str, object]:
    """All but what differs from run to run."""
    return report.model_dump(exclude={"cost", "versions"})


def test_the_verdict_without_the_row_comes_before_the_full_model_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Report] = []
    report, _, _ = measured(2, on_verdict=seen.append)
    assert seen[0].body is not None
    assert (seen[0].body.status, seen[0].full.status) == ("converged", "unconverged")
    assert (seen[0].verdict, seen[0].generalisation) == (report.verdict, report.generalisation)
    assert report.full.status == "converged"
    assert report.full.hvps > seen[0].full.hvps > 0
    # The same digits where the full model's solve ends first.
    monkeypatch.setattr(whole, "ROOMY", inf)
    straight, _, _ = measured(2, on_verdict=seen.append)
    assert seen[1].full.status == "converged"
    assert numbers(straight) == numbers(report)
    assert straight.cost.hvps == report.cost.hvps


def test_a_solve_does_not_wait_where_that_would_leave_the_other_few_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a basis on disk, which has room for as many vectors as there may be products and no more."""
    monkeypatch.setattr("curvcli.analysis.solve.unplanned", lambda *_: (14, True))
    seen: list[Report] = []
    model, optimizer = trained(2)
    report = analyze(model, models.loss, shard(2), optimizer, max_hvps=14, on_verdict=seen.append)
    assert report.body is not None
    assert (report.body.status, report.full.status) == ("converged", "converged")
    assert seen[0].full.status == "converged"


def test_products_by_differences_are_certified_before_the_verdict() -> None:
    """Their solver makes products of its own at the end of a solve, and none of it is left for later."""
    seen: list[Report] = []
    model, optimizer = trained(2)
    how = {"tolerance": 1e-2, "max_hvps": 300, "on_verdict": seen.append}
    report = analyze(model, models.loss, shard(2), optimizer, mode="differences", **how)  # type: ignore[arg-type]
    exact = analyze(model, models.loss, shard(2), optimizer, mode="kept", **how)  # type: ignore[arg-type]
    assert report.full.status == exact.full.status == "converged"
    assert (seen[0].full.status, seen[1].full.status) == ("converged", "unconverged")
    assert report.full.eigenvalue == pytest.approx(exact.full.eigenvalue, rel=1e-3)
    assert report.full.residual > exact.full.residual, "with what two lengths differ by"


def test_progress_counts_the_solves_that_nobody_planned() -> None:
    model, optimizer = trained(2)
    seen: list[tuple[str, float]] = []
    analyze(model, models.loss, shard(2), optimizer, progress=lambda stage, done: seen.append((stage, done)), max_hvps=300)
    stages = [stage for stage, _ in seen]
    assert {"full model without rare rows", "full model with rare rows"} <= set(stages)
    fractions = [done for _, done in seen]
    assert fractions == sorted(fractions)
    assert all(done < 1 for stage, done in seen if stage != "report")


def test_a_budget_that_ends_after_the_verdict_leaves_the_full_model_unconverged() -> None:
    seen: list[Report] = []

    def tell(report: Report) -> None:
        seen.append(report)
        clock.setattr(Lanczos, "expired", True)

    with pytest.MonkeyPatch.context() as clock:
        report, _, _ = measured(2, on_verdict=tell, deadline=time.monotonic() + 1000)
    assert report.body is not None
    assert (report.body.status, report.full.status) == ("converged", "unconverged")
    assert report.verdict == seen[0].verdict
    assert {part.status for part in report.layers} == {"skipped"}


def test_a_row_that_only_seemed_to_carry_the_top_direction_stays_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the full model's solve goes on its vector leaves the row: the verdict is on the full model after all."""
    masses = iter([1.0, 1.0, 0.0])  # at the pause, of what is known then, and at the end
    monkeypatch.setattr(whole, "_mass", lambda vector, mask: next(masses))
    seen: list[Report] = []
    report, _, _ = measured(2, on_verdict=seen.append)
    assert seen[0].body is not None
    assert report.body is None
    assert report.judged is report.full
    assert report.full.status == "converged"
    assert report.generalisation != seen[0].generalisation


def test_no_verdict_rests_on_rows_whose_products_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "Lanczos", partial(Lanczos, asymmetry=-1.0))
    report, _, _ = measured(2)
    assert (report.full.status, report.full.eigenvalue, report.body) == ("asymmetric", None, None)
    assert report.verdict == "unresolved"
    assert report.findings[0].code in ("full-asymmetric", "no-threshold")


def test_a_row_that_is_looked_up_often_enough_counts() -> None:
    report, _, _ = measured(12)
    assert report.body is None
    assert report.judged is report.full


def test_rare_rows_beside_the_top_direction_change_nothing() -> None:
    model = models.Net(blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = analyze(model, models.loss, shard(1), optimizer)
    assert report.body is None


def test_lookups_are_counted_over_all_batches() -> None:
    model, batches = models.Net(), shard(3)
    loss, found = lookups(Problem.create(model, models.loss, batches, [40.0] * 4))
    ids = torch.cat([batch[0] for batch in batches])
    assert torch.equal(found.counts[id(model.embed.weight)], torch.bincount(ids, minlength=7))
    assert loss == pytest.approx(float(models.loss(model, (ids, torch.cat([b[1] for b in batches])))))
    rare = found.rare(model.embed.weight, 10)
    assert rare is not None
    assert rare.nonzero().flatten().tolist() == [RARE]
    assert found.rare(model.head.weight, 10) is None  # type: ignore[arg-type]


def test_rows_that_p_mixes_are_none_to_leave_out() -> None:
    weight, rare = torch.ones(4, 3), torch.tensor([False, True, False, False])
    entries, side = Diagonal(1 + torch.rand(4, 3)), torch.linalg.qr(torch.randn(3, 3))[0]
    whole = torch.linalg.qr(torch.randn(4, 4))[0]
    others = torch.eye(4)
    others[~rare[:, None] & ~rare] = side.reshape(-1)
    for left, alone in ((None, True), (whole, False), (others, True)):
        assert apart(Rotated((left, side), entries), weight, rare) == alone
    assert apart(entries, weight, rare)


@pytest.mark.slow
@pytest.mark.parametrize("largest", [6, 9])
def test_the_body_of_soap(largest: int) -> None:
    """With the vocabulary over `max_precond_dim` P is of each row alone; below, rows are mixed and none is left out."""
    model = models.Net(blocks=1)
    optimizer = published.SOAP(model.parameters(), lr=1e-3, betas=(0.9, 0.999), max_precond_dim=largest)
    models.train(model, optimizer, shard(2), steps=20)
    optimizer.state[model.embed.weight]["exp_avg_sq"][RARE] *= 1e-8
    report = analyze(model, models.loss, shard(2), optimizer, tolerance=1e-6, max_hvps=300)
    assert ("rows-mixed" in {f.code for f in report.findings}) == (largest == 9)
    if largest == 9:
        assert report.body is None
        return
    assert report.body is not None
    found = stepped.metric(optimizer, model)
    p = torch.block_diag(
        *(torch.linalg.inv(stepped.as_matrix(r.solve, model.get_parameter(n).detach())) for n, r in found.root.items())
    )
    kept = torch.ones(len(p), dtype=torch.bool)
    kept[RARE * 5 : (RARE + 1) * 5] = False
    values, vectors = torch.linalg.eigh(p[kept][:, kept])
    half = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    hessian = models.dense_hessian(model, shard(2), list(found.root))[kept][:, kept]
    assert report.body.eigenvalue == pytest.approx(models.top(half @ hessian @ half), rel=1e-4)
    assert report.full.eigenvalue is not None
    assert report.full.eigenvalue > 1.2 * report.body.eigenvalue


def test_a_verdict_on_the_body_is_none_where_time_runs_out_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full model's rho is that of few tokens' luck, and no verdict for want of time."""
    before, model, optimizer = measured(2)
    assert before.body is not None
    monkeypatch.setattr(whole, "ROOMY", inf)  # the full model's solve ends first
    (deadline,) = late_after(monkeypatch, whole, "_mass")
    report = analyze(model, models.loss, shard(2), optimizer, tolerance=1e-6, max_hvps=300, deadline=deadline)
    assert report.full.eigenvalue == before.full.eigenvalue
    assert report.body is not None
    assert (report.body.status, report.body.eigenvalue, report.body.rows) == ("skipped", None, 1)
    assert report.verdict == "unresolved"
    assert report.findings[0].code == "unresolved-budget"
    assert report.generalisation.rho_high is None


def test_the_full_model_is_kept_where_the_alarm_breaks_into_a_product_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    before, model, optimizer = measured(2)
    real = Lanczos.extremes

    def rung(self: Lanczos, *arguments: Any, **options: Any) -> Any:
        if options.get("support") is not None:
            raise OutOfTime
        return real(self, *arguments, **options)

    monkeypatch.setattr(Lanczos, "extremes", rung)
    report = analyze(model, models.loss, shard(2), optimizer, tolerance=1e-6, max_hvps=300)
    assert report.full.eigenvalue == before.full.eigenvalue
    assert report.body is not None
    assert report.body.status == "skipped"


def test_where_all_rows_that_move_are_rare_none_is_left_out() -> None:
    """Of nothing there is no eigenvalue, and no basis."""
    model = models.Net(vocab=40, blocks=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "embed.weight")
    batches = [(ids, ids * 3 % 40) for ids in torch.randperm(40).chunk(4)]
    optimizer = torch.optim.Adam([model.embed.weight], lr=1e-2)
    models.train(model, optimizer, batches)
    report = analyze(model, models.loss, batches, optimizer)
    assert report.full.status == "converged"
    assert report.body is None
    assert "rows-all-rare" in {finding.code for finding in report.findings}


def test_a_weight_tied_to_a_larger_head_has_rows_that_nothing_looks_up() -> None:
    """As of a vocabulary that is padded for speed: the embedding knows of 7 tokens, the head and the weight have 12 rows."""
    model, optimizer = trained(2)
    model.head = nn.Linear(5, 12).double()
    with torch.no_grad():
        model.head.weight[:7] = model.embed.weight
    model.embed.weight = model.head.weight
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    models.train(model, optimizer, shard(0), steps=20)
    optimizer.state[model.embed.weight]["exp_avg_sq"][RARE] = 1e-12
    report = analyze(model, models.loss, shard(2), optimizer, tolerance=1e-6, max_hvps=300)
    assert report.body is not None
    assert report.body.rows == 6
