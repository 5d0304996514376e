"""Why a checkpoint is sharp: quotients against dense Hessians, and planted culprits that have to be named."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from tiny import build, run_of
from torch import Tensor, nn

from curvcli.analysis import carriers as carried
from curvcli.analysis import explain as explaining
from curvcli.analysis.carriers import carriers, rests
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.analysis.explain import explain
from curvcli.analysis.solve import Measurement
from curvcli.curvature import resources
from curvcli.curvature.lanczos import Lanczos
from curvcli.curvature.problem import Problem
from curvcli.curvature.ritz import Extremes
from curvcli.data.tasks import labelled_loss
from curvcli.documents import Explanation
from curvcli.errors import OutOfTime, UnsupportedError

IGNORED = -100


# --- quotients on a small network --------------------------------------------------------------


def _shard() -> list[dict[str, Tensor]]:
    """Three sequences of 5 labels, two of which are not counted, in two batches."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(7, (3, 5), generator=generator)
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[1, 0] = labels[1, 4] = IGNORED
    return [{"input_ids": ids[:2], "labels": labels[:2]}, {"input_ids": ids[2:], "labels": labels[2:]}]


def _along(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters() if n in names}


def _problem(loss: Any = labelled_loss) -> Problem:
    return Problem.create(models.Net(), loss, _shard(), [8.0, 5.0])


def _wanted(problem: Problem, along: dict[str, Tensor]) -> dict[tuple[int, int], float]:
    """u'H_t u by the dense Hessian of each label's loss alone."""
    names = list(along)
    flat = torch.cat([along[n].flatten() for n in names])
    ids, labels = (torch.cat([b[key] for b in problem.batches]) for key in ("input_ids", "labels"))
    found = {}
    for row, place in (labels != IGNORED).nonzero().tolist():
        one = [(ids[row, place][None], labels[row, place][None])]  # the network sees a token at a time
        found[row, place] = float(flat @ models.dense_hessian(problem.model, one, names) @ flat)
    return found


NAMES = ["embed.weight", "layers.1.norm.weight", "layers.1.up.weight", "head.bias"]


def test_predictions_and_sequences_against_dense_hessians() -> None:
    problem = _problem()
    along = _along(problem.model, NAMES)
    wanted = _wanted(problem, along)
    found = carriers(problem, labelled_loss, "masked-lm", along, sum(wanted.values()) / 13)
    assert found.per == "prediction"
    assert found.predictions is not None
    places = zip(found.predictions.row.tolist(), found.predictions.position.tolist(), strict=True)
    assert dict(zip(places, found.predictions.curvature.tolist(), strict=True)) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    for row, count in enumerate([5, 3, 5]):
        mean = sum(value for (r, _), value in wanted.items() if r == row) / count
        assert float(found.quotients[row]) == pytest.approx(mean, rel=1e-6)
        assert float(found.weights[row]) == pytest.approx(count / 13)
    assert found.total == pytest.approx(sum(wanted.values()) / 13, rel=1e-6)
    assert float(found.shares.sum()) == pytest.approx(1)


def test_a_loss_of_ones_own_goes_by_sequences() -> None:
    """The same numbers by double backward on each sequence."""
    problem = _problem(lambda model, batch: labelled_loss(model, batch))
    along = _along(problem.model, NAMES)
    exact = carriers(problem, labelled_loss, "masked-lm", along, sum(_wanted(problem, along).values()) / 13)
    found = carriers(problem, problem.loss, "masked-lm", along, exact.total)
    assert (found.per, found.predictions) == ("sequence", None)
    assert torch.allclose(found.quotients, exact.quotients, rtol=1e-9)
    assert torch.allclose(found.weights, exact.weights)
    (rest,) = rests(problem, found)
    top = int(exact.shares.argmax())
    kept = [i for i in range(3) if i != top]
    assert (rest.what, rest.removed, rest.total) == ("sequences", 1, 3)
    assert rest.share == pytest.approx(float(exact.shares.max()))
    wanted = sum(exact.weights[i] * _mean(problem, i) for i in kept) / sum(exact.weights[i] for i in kept)
    assert rest.problem.mean_loss() == pytest.approx(float(wanted))


def _mean(problem: Problem, row: int) -> float:
    columns = {key: torch.cat([b[key] for b in problem.batches])[row : row + 1] for key in ("input_ids", "labels")}
    with torch.no_grad():
        return float(labelled_loss(problem.model, columns))


def test_predictions_that_add_up_to_something_else_are_not_believed() -> None:
    problem = _problem()
    found = carriers(problem, labelled_loss, "masked-lm", _along(problem.model, NAMES), 1e3)
    assert found.per == "sequence"
    assert "where lambda is 1000" in found.why


def test_where_predictions_cannot_be_had_sequences_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no third derivative")

    problem = _problem()
    along = _along(problem.model, NAMES)
    exact = carriers(problem, labelled_loss, "masked-lm", along, sum(_wanted(problem, along).values()) / 13)
    monkeypatch.setattr(carried, "second_derivatives", fail)
    found = carriers(problem, labelled_loss, "masked-lm", along, exact.total)
    assert (found.per, found.why) == ("sequence", "RuntimeError: no third derivative")
    assert torch.allclose(found.quotients, exact.quotients, rtol=1e-9)


def test_rows_that_depend_on_each_other_are_not_told_apart() -> None:
    def spread(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["input_ids"]).var()

    problem = _problem(spread)
    found = carriers(problem, spread, "masked-lm", _along(problem.model, NAMES), 1.0)
    assert found.per == "nothing"
    assert rests(problem, found) == []


def test_what_is_maximised_has_the_other_sign() -> None:
    problem = _problem()
    along = _along(problem.model, NAMES)
    mean = sum(_wanted(problem, along).values()) / 13
    found = carriers(problem.negated(), labelled_loss, "masked-lm", along, -mean, negated=True)
    assert found.per == "prediction"
    assert found.total == pytest.approx(-mean, rel=1e-6)
    rest = rests(problem, found, negated=True)[1].problem
    assert rest.mean_loss() < 0


def test_the_rest_without_its_heaviest_predictions() -> None:
    problem = _problem()
    along = _along(problem.model, NAMES)
    wanted = _wanted(problem, along)
    found = carriers(problem, labelled_loss, "masked-lm", along, sum(wanted.values()) / 13)
    sequences, predictions = rests(problem, found)
    assert (predictions.what, predictions.removed, predictions.total) == ("predictions", 1, 13)
    heaviest = max(wanted, key=lambda place: wanted[place])
    assert predictions.share == pytest.approx(wanted[heaviest] / sum(wanted.values()), rel=1e-6)
    ids, labels = (torch.cat([b[key] for b in problem.batches]) for key in ("input_ids", "labels"))
    labels[heaviest] = IGNORED
    with torch.no_grad():
        mean = float(labelled_loss(problem.model, {"input_ids": ids, "labels": labels}))
    assert predictions.problem.mean_loss() == pytest.approx(mean)
    assert sequences.removed == 1


# --- a checkpoint with a culprit ---------------------------------------------------------------


@pytest.fixture(scope="module")
def culprit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequence 7 of 24 alone has token 60, at every second place; its embedding is so short that its norm bends."""
    place = tmp_path_factory.mktemp("culprit")
    model = build()
    with torch.no_grad():
        model.model.embed_tokens.weight[60] *= 0.05
    model.save_pretrained(place)
    rows = np.random.default_rng(0).integers(0, 50, (24, 25))
    rows[7, ::2] = 60
    np.save(place / "data.npy", rows)
    return place


def _explained(place: Path, **more: Any) -> Explanation:
    return explain(place, data=place / "data.npy", device="cpu", **more)


@pytest.fixture(scope="module")
def found(culprit: Path) -> Explanation:
    return _explained(culprit, optimizer="SGD", lr=0.5)


def test_the_planted_token_and_sequence_are_named_at_the_top(found: Explanation) -> None:
    assert found.estimate.status == "converged"
    assert (found.rows[0].tensor, found.rows[0].rows_of, found.rows[0].row) == ("model.embed_tokens.weight", "tokens", 60)
    assert found.rows[0].mass > 0.9
    assert max(found.parts, key=lambda part: part.mass).name == "embedding"
    assert found.sequences[0].sequence == 7
    assert found.sequences[0].share > 0.9
    assert {token.position % 2 for token in found.sequences[0].tokens} == {0}, "what is predicted from token 60"


@pytest.mark.slow
def test_its_removal_is_the_removal_of_its_curvature(found: Explanation, culprit: Path, tmp_path: Path) -> None:
    """Against the shard that never had it, measured by itself."""
    sequences = found.removals[0]
    assert (sequences.what, sequences.removed, sequences.total) == ("sequences", 1, 24)
    rows = np.delete(np.load(culprit / "data.npy"), 7, axis=0)
    np.save(tmp_path / "rest.npy", rows)
    alone = explain(culprit, data=tmp_path / "rest.npy", device="cpu", optimizer="SGD", lr=0.5)
    assert sequences.estimate.status == "converged"
    assert sequences.estimate.eigenvalue == pytest.approx(alone.estimate.eigenvalue, rel=1e-3)
    assert found.estimate.eigenvalue is not None
    assert sequences.estimate.eigenvalue is not None
    assert sequences.estimate.eigenvalue < found.estimate.eigenvalue / 3


@pytest.mark.slow
def test_the_verdict_is_said_to_be_of_a_few(found: Explanation, culprit: Path) -> None:
    assert found.estimate.eigenvalue is not None
    assert found.removals[0].estimate.eigenvalue is not None
    between = 2 / (found.removals[0].estimate.eigenvalue * found.estimate.eigenvalue) ** 0.5
    few = _explained(culprit, optimizer="SGD", lr=between)
    assert few.removals[0].verdict == "stable" != few.verdict
    assert few.removals[0].changes
    assert "verdict-of-few" in {finding.code for finding in few.findings}
    calm = _explained(culprit, optimizer="SGD", lr=between / 1e3)
    assert (calm.verdict, [removal.changes for removal in calm.removals]) == ("stable", [False, False])
    assert "verdict-of-few" not in {finding.code for finding in calm.findings}


@pytest.mark.parametrize(("owner", "name"), [(explaining._Explainer, "masses"), (explaining, "rests")])
def test_what_a_budget_does_not_reach_is_left_out_and_said(
    culprit: Path, found: Explanation, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline passes after the direction is known: before the pass over the data, or after it."""
    passed = False
    theirs = getattr(owner, name)

    def at(*given: Any, **more: Any) -> Any:
        nonlocal passed
        passed = True
        return theirs(*given, **more)

    def in_time(work: Measurement) -> None:
        if passed:
            raise OutOfTime

    monkeypatch.setattr(owner, name, at)
    monkeypatch.setattr(Measurement, "in_time", in_time)
    short = _explained(culprit, optimizer="SGD", lr=0.5)
    assert short.findings[0].code == "out-of-time"
    assert short.parts == found.parts
    assert (short.per, short.sequences) == (("nothing", []) if name == "masses" else ("prediction", found.sequences))
    assert short.removals == []
    assert len(found.removals) == 2


def test_a_rest_that_was_cut_short_has_no_verdict(culprit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is "unresolved" for want of time what becomes of lambda without a few sequences."""

    class Again(Measurement):
        def folded(self, hvp: Any) -> Any:
            self.solver = replace(self.solver, deadline=time.monotonic())
            return super().folded(hvp)

    monkeypatch.setattr(explaining, "Measurement", Again)
    told = _explained(culprit, optimizer="SGD", lr=0.5, budget=3600)
    assert told.removals == []
    codes = {finding.code for finding in told.findings}
    assert "out-of-time" in codes
    assert "verdict-of-few" not in codes


def test_the_gradient_is_held_against_the_second_moment_as_analyze_does(tmp_path: Path) -> None:
    place = run_of(tmp_path, 1, 2, 3) / "checkpoint-3"
    options = Options(tokens=64, mode="kept", depths=False, device="cpu")
    wanted = analyze_checkpoint(place, options).optimizer
    told = explain(place, tokens=64, mode="kept", device="cpu").optimizer
    assert wanted.gradient_ratio is not None
    assert wanted.batch_ratio is not None
    assert told.gradient_ratio == pytest.approx(wanted.gradient_ratio, rel=1e-4)
    assert told.batch_ratio == pytest.approx(wanted.batch_ratio, rel=1e-4)


@pytest.mark.parametrize(
    ("mode", "memory", "threads"), [("kept", None, True), ("fresh", None, False), ("kept", 2**40, False)]
)
def test_what_is_left_is_walked_by_threads_as_the_whole_is(
    mode: str, memory: int | None, threads: bool, culprit: Path, found: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a limit of memory by one, whose results the plan has counted."""
    monkeypatch.setattr(resources, "return_blocks", lambda: True)
    seen: list[bool] = []
    theirs = explaining._Explainer.solved

    def solved(self: explaining._Explainer, work: Measurement) -> Any:
        seen.append(work.threads)
        return theirs(self, work)

    monkeypatch.setattr(explaining._Explainer, "solved", solved)
    walked = _explained(culprit, optimizer="SGD", lr=0.5, mode=mode, memory=memory)
    assert seen == [threads] * 3
    for one, other in zip(walked.removals, found.removals, strict=True):
        assert one.estimate.eigenvalue == pytest.approx(other.estimate.eigenvalue, rel=1e-5)


def test_a_deadline_that_has_passed_is_no_explanation(culprit: Path) -> None:
    with pytest.raises(OutOfTime):
        _explained(culprit, optimizer="SGD", lr=0.5, budget=0)


def test_shares_add_up(found: Explanation) -> None:
    assert found.per == "prediction"
    assert found.sum == pytest.approx(found.estimate.eigenvalue, rel=1e-3)
    assert sum(part.mass for part in found.parts) == pytest.approx(1)
    assert sum(kind.mass for kind in found.kinds) == pytest.approx(1)
    first = found.sequences[0]
    assert first.share == pytest.approx(first.quotient / 24 / found.sum, rel=1e-6)
    assert found == Explanation.read(found.to_json())


@pytest.mark.parametrize("status", ["asymmetric", "non-finite"])
def test_without_an_estimate_nothing_is_explained(status: Any, culprit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A status, no shares, also where there is a vector of products that are wrong."""
    theirs = Lanczos.extremes

    def failed(self: Lanczos, *given: Any, **more: Any) -> Extremes:
        found = replace(theirs(self, *given, **more), status=status)
        return found if status == "asymmetric" else replace(found, top=None, bottom=None, vector=None)

    monkeypatch.setattr(Lanczos, "extremes", failed)
    found = _explained(culprit, optimizer="SGD", lr=0.5)
    assert (found.estimate.status, found.estimate.eigenvalue) == (status, None)
    assert (found.parts, found.sequences, found.removals, found.per) == ([], [], [], "nothing")


def test_a_loss_that_overflows_is_refused(culprit: Path) -> None:
    model = build()
    with torch.no_grad():
        model.lm_head.weight *= 1e30
    model.save_pretrained(culprit.parent / "huge")
    with pytest.raises(UnsupportedError, match="is not finite on this data"):
        explain(culprit.parent / "huge", data=culprit / "data.npy", device="cpu", optimizer="none")


@pytest.mark.slow
def test_a_coupled_decay_is_a_part_of_its_own(culprit: Path) -> None:
    plain = _explained(culprit, optimizer="SGD", lr=0.5)
    decayed = _explained(culprit, optimizer="SGD", lr=0.5, weight_decay=10.0)
    assert (plain.decay, decayed.per) == (0, "prediction")
    assert decayed.decay == pytest.approx(10, rel=1e-4), "of a unit vector"
    assert decayed.sum == pytest.approx(decayed.estimate.eigenvalue, rel=1e-3)
    assert decayed.sequences[0].share == pytest.approx(plain.sequences[0].share, rel=1e-2)


@pytest.mark.slow
def test_the_direction_is_that_of_the_body_where_the_verdict_is_on_it(culprit: Path) -> None:
    """Token 60 five times: rows that the shard hardly looks up are left out of the verdict, and of what explains it."""
    rows = np.load(culprit / "data.npy")
    rows[7, 10::2] = 3
    np.save(culprit / "rare.npy", rows)
    found = explain(culprit, data=culprit / "rare.npy", device="cpu", optimizer="SGD", lr=0.5)
    assert found.direction == "body"
    assert 60 not in {row.row for row in found.rows if row.mass > 0 and "embed" in row.tensor}
    assert found.sum == pytest.approx(found.estimate.eigenvalue, rel=1e-3)


@pytest.mark.slow
def test_progress_goes_forward(culprit: Path) -> None:
    said: list[float] = []
    explain(
        culprit,
        data=culprit / "data.npy",
        device="cpu",
        optimizer="SGD",
        lr=0.5,
        progress=lambda stage, done: said.append(done),
    )
    assert said == sorted(said)
    assert said[-1] <= 1


def test_of_a_classifier_an_example_is_a_sequence() -> None:
    """Labels of one a row have no positions."""
    problem = _problem()
    batches = [{"input_ids": b["input_ids"][:, 0], "labels": b["labels"][:, 1]} for b in problem.batches]
    part = replace(problem, batches=batches, weights=[2 / 3, 1 / 3])
    along = _along(problem.model, NAMES)
    flat = torch.cat([along[n].flatten() for n in NAMES])
    wanted = []
    for batch in batches:
        for i, label in zip(batch["input_ids"], batch["labels"], strict=True):
            wanted.append(float(flat @ models.dense_hessian(problem.model, [(i[None], label[None])], NAMES) @ flat))
    found = carriers(part, labelled_loss, "classification", along, sum(wanted) / 3)
    assert found.per == "sequence"
    assert found.quotients.tolist() == pytest.approx(wanted, rel=1e-6)
    assert [rest.what for rest in rests(part, found)] == ["sequences"]
